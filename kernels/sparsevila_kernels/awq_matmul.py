"""y = x W of a W4A16 weight: 4-bit codes, activations in 16 bits or float32.

Knows: which way is fastest for how many rows, on which device. Does not know: models, or where weights come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import Backend, choose
from .awq_weight import AwqWeight

OPERATOR_ROWS = 32


def awq_matmul(x: Tensor, weight: AwqWeight, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """x [M, K] times the dequantised weight, plus bias [N] -> [M, N] in x's dtype (float32, bfloat16, float16).

    Raises:
        ValueError: x is not [M, K] floating point on the weight's device, or bias is not [N] in x's dtype.
    """
    if x.dim() != 2 or x.shape[1] != weight.num_in or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not floating point [M, {weight.num_in}]")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")
    if bias is not None and (bias.shape != (weight.num_out,) or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, not {x.dtype} [{weight.num_out}]")
    choose(backend, x)
    y = _on_cpu(x, weight)
    return y if bias is None else y.add_(bias)


def _on_cpu(x: Tensor, weight: AwqWeight) -> Tensor:
    if x.dtype == torch.bfloat16 and weight.in_blocks and x.shape[0] <= OPERATOR_ROWS:
        codes = weight.codes.view(-1, weight.num_in // 2)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, weight.group_size, weight.operator_steps)
        return y[:, : weight.num_out].contiguous()
    return _by_pieces(x, weight)


def _by_pieces(x: Tensor, weight: AwqWeight) -> Tensor:
    return torch.mm(x, weight.dequantize(x.dtype))
