"""Linear maps in the forms that weights come in: plain, 4-bit, 8-bit; for our own loop and as modules for transformers' code.

lean:           Matrix.mm(x), Matrix.addmm(base, x), Matrix.tail_mm(x, first)        [in, out]
transformers:   AwqLinear, Int8Linear in the place of nn.Linear                      [out, in]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsevila_kernels import AwqWeight, Int8Weight, awq_matmul, int8_matmul


class Matrix(Protocol):
    """W [K, N], applied to rows x [T, K]; results have x's dtype."""

    def mm(self, x: Tensor) -> Tensor:
        """x @ W [T, N]."""
        ...

    def addmm(self, base: Tensor, x: Tensor) -> Tensor:
        """base + x @ W [T, N], base [N] or [T, N], which is left as it is."""
        ...

    def tail_mm(self, x: Tensor, first: int) -> Tensor:
        """The columns of x @ W from `first` on: [T, N - first]."""
        ...


class DenseMatrix:
    """W as a tensor [K, N]: one product of torch for each call."""

    __slots__ = ("_weight",)

    def __init__(self, weight: Tensor):
        self._weight = weight

    def mm(self, x: Tensor) -> Tensor:
        """x @ W [T, N]."""
        return torch.mm(x, self._weight)

    def addmm(self, base: Tensor, x: Tensor) -> Tensor:
        """base + x @ W [T, N]."""
        return torch.addmm(base, x, self._weight)

    def tail_mm(self, x: Tensor, first: int) -> Tensor:
        """The columns of x @ W from `first` on: a view of the weight is enough."""
        return torch.mm(x, self._weight[:, first:])


class AwqMatrix:
    """W in 4 bits."""

    __slots__ = ("_weight",)

    def __init__(self, weight: AwqWeight):
        self._weight = weight

    def mm(self, x: Tensor) -> Tensor:
        """x @ W [T, N]."""
        return awq_matmul(x, self._weight)

    def addmm(self, base: Tensor, x: Tensor) -> Tensor:
        """base + x @ W [T, N]."""
        return awq_matmul(x, self._weight, base)

    def tail_mm(self, x: Tensor, first: int) -> Tensor:
        """All columns are computed: one layer of a prefill needs this, and a second copy of its weights would cost more."""
        return awq_matmul(x, self._weight)[:, first:]


class AwqLinear(nn.Module):
    """nn.Linear with a 4-bit weight."""

    def __init__(self, weight: AwqWeight, bias: nn.Parameter | None):
        """bias [N] in the model's dtype."""
        super().__init__()
        self.in_features, self.out_features = weight.num_in, weight.num_out
        self.packed = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return awq_matmul(x.reshape(-1, self.in_features), self.packed, self.bias).view(*x.shape[:-1], self.out_features)


class Int8Linear(nn.Module):
    """nn.Linear with an 8-bit weight, one scale for each output, and inputs rounded to 8 bits row by row."""

    def __init__(self, weight: Int8Weight, bias: nn.Parameter | None):
        """bias [N] in the model's dtype."""
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self.packed = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return int8_matmul(x.reshape(-1, self.in_features), self.packed, self.bias).view(*x.shape[:-1], self.out_features)


def take_matrix(modules: Sequence[Any], dense_form: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Matrix:
    """Parallel linears (of the same input) as one matrix, their outputs side by side; biases are not looked at.

    modules: nn.Linear or AwqLinear. dense_form: weight [N, K] -> [K, N], as plain products want it. Where not all are quantized, or
    not in groups of one size, all become plain weights of `dtype`.
    """
    packed = [module.packed for module in modules if isinstance(module, AwqLinear)]
    if len(packed) == len(modules) and len({weight.group_size for weight in packed}) == 1:
        return AwqMatrix(packed[0] if len(packed) == 1 else AwqWeight.cat(packed))
    plain = [m.packed.dequantize(dtype).t() if isinstance(m, AwqLinear) else m.weight.data for m in modules]
    return DenseMatrix(dense_form(plain[0] if len(plain) == 1 else torch.cat(plain)))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all weights below a module, shared ones once."""
    quantized = sum(m.packed.nbytes for m in module.modules() if isinstance(m, AwqLinear | Int8Linear))
    return quantized + sum({p.data_ptr(): p.nbytes for p in module.parameters()}.values())
