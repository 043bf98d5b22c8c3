"""y = x W^T of a W8A8 linear: int8 weights with a scale per output channel, activations quantised per token on the way.

Knows: symmetric int8, exact integer sums, the shapes that each way of multiplying int8 takes. Does not know: which linears of a
model are quantised, or how the smoothing of inputs was found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._launch import Backend, choose

TOP = 127


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """weight[n, k] * smooth[k] = values[n, k] * scales[n]: values i8 [N, K], scales f32 [N], smooth f32 [K] or None for ones."""

    values: Tensor
    scales: Tensor
    smooth: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.values.dim() != 2:
            raise ValueError(f"values are {self.values.dtype} {tuple(self.values.shape)}, not int8 [N, K]")
        num_out, num_in = self.values.shape
        for name, tensor, num in (("scales", self.scales, num_out), ("smooth", self.smooth, num_in)):
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != (num,)):
                raise ValueError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}, not float32 {(num,)}")

    @classmethod
    def of(cls, weight: Tensor, smooth: Tensor | None = None) -> Int8Weight:
        """Quantise nn.Linear's weight [N, K] to nearest, its columns times `smooth` first; a channel of zeros gets scale 0.

        Raises:
            ValueError: the weight is not finite, or smooth is not finite and positive.
        """
        if not torch.isfinite(weight).all():
            raise ValueError("weight holds NaN or infinity")
        wide = weight.float()
        if smooth is not None:
            smooth = smooth.float().to(weight.device)
            if not (torch.isfinite(smooth) & (smooth > 0)).all():
                raise ValueError("smooth must be finite and above 0")
            wide = wide * smooth
        values, scales = quantize_rows(wide)
        return cls(values, scales, smooth)

    @property
    def num_in(self) -> int:
        return self.values.shape[1]

    @property
    def num_out(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.smooth is None else self.smooth.nbytes)

    def to(self, device: torch.device | str) -> Int8Weight:
        smooth = None if self.smooth is None else self.smooth.to(device)
        return Int8Weight(self.values.to(device), self.scales.to(device), smooth)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as nn.Linear has it, [N, K]."""
        wide = self.values.float() * self.scales[:, None]
        return (wide if self.smooth is None else wide / self.smooth).to(dtype)


def quantize_rows(x: Tensor, smooth: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [M, K] / smooth -> (i8 [M, K], scales f32 [M] = amax / 127); a row of zeros gets scale 0."""
    wide = x.float() if smooth is None else x.float() / smooth
    scales = wide.abs().amax(-1) / TOP if x.shape[1] else wide.new_zeros(x.shape[0])
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return (wide * inverse[:, None]).round_().clamp_(-TOP, TOP).to(torch.int8), scales


def int8_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """x [M, K] quantised per row, times the weight, plus bias [N] -> [M, N] in x's dtype.

    The sum over K is exact: 32-bit integers hold it for K up to 133,000.

    Raises:
        ValueError: x is not [M, K] floating point on the weight's device, or bias is not [N].
    """
    if x.dim() != 2 or x.shape[1] != weight.num_in or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not floating point [M, {weight.num_in}]")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")
    if bias is not None and bias.shape != (weight.num_out,):
        raise ValueError(f"bias is {tuple(bias.shape)}, not [{weight.num_out}]")
    choose(backend, x)
    values, scales = quantize_rows(x, weight.smooth)
    y = torch._int_mm(values, weight.values.t()).float()
    y = y.mul_(scales[:, None]).mul_(weight.scales)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
