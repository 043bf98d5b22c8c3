"""y = x W^T of a W8A8 linear: int8 weights with a scale per output channel, activations quantized per token on the way.

On a GPU always our kernels: torch._int_mm takes no less than 17 rows there and only multiples of 8, and its 32-bit result would
cross the memory twice more before it has become 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _int8_triton
from ._launch import Backend, choose

TOP = 127
# Products of 127 * 127 whose sum a float32 still holds exactly: 2^24 / 127^2 = 1040.
EXACT_IN_FLOAT32 = 1024
ALIGNED = 16  # rows of int8 on a GPU begin at multiples of this


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """weight[n, k] * smooth[k] = values[n, k] * scales[n]: values i8 [N, K], scales f32 [N], smooth f32 [K] or None for ones."""

    values: Tensor
    scales: Tensor
    smooth: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dtype != torch.int8 or self.values.dim() != 2:
            raise ValueError(f"values are {self.values.dtype} {tuple(self.values.shape)}, not int8 [N, K]")
        for name, tensor, num in (("scales", self.scales, self.num_out), ("smooth", self.smooth, self.num_in)):
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != (num,)):
                raise ValueError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}, not float32 {(num,)}")

    @classmethod
    def of(cls, weight: Tensor, smooth: Tensor | None = None) -> Int8Weight:
        """Quantize nn.Linear's weight [N, K] to nearest, its columns times `smooth` first; a channel of zeros gets scale 0.

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
        values, scales = quantize_rows(wide, backend="torch")
        return cls(values, scales, smooth)

    @property
    def num_in(self) -> int:
        """K."""
        return self.values.shape[1]

    @property
    def num_out(self) -> int:
        """N."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds."""
        return self.values.nbytes + self.scales.nbytes + (0 if self.smooth is None else self.smooth.nbytes)

    def to(self, device: torch.device | str) -> Int8Weight:
        """On another device; what is there already is not copied."""
        smooth = None if self.smooth is None else self.smooth.to(device)
        return Int8Weight(self.values.to(device), self.scales.to(device), smooth)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as nn.Linear has it, [N, K]."""
        wide = self.values.float() * self.scales[:, None]
        return (wide if self.smooth is None else wide / self.smooth).to(dtype)

    @cached_property
    def aligned_values(self) -> Tensor:
        """`values`, or a copy with zeros behind each row, for a GPU to read 16 bytes at a time."""
        return pad(self.values, (0, -self.num_in % ALIGNED)).contiguous()


def quantize_rows(x: Tensor, smooth: Tensor | None = None, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """x [M, K] / smooth -> (i8 [M, K], scales f32 [M] = the row's largest magnitude / 127). A row of zeros gets scale 0."""
    if choose(backend, x) == "triton" and x.numel():
        return _int8_triton.quantize_rows(x, smooth, x.shape[1])
    wide = x.float() if smooth is None else x.float() / smooth
    # By a tensor: CUDA multiplies by the reciprocal of a plain number, and would round otherwise than CPUs and our kernel.
    top = torch.full((), TOP, dtype=wide.dtype, device=x.device)
    scales = wide.abs().amax(-1) / top if x.shape[1] else wide.new_zeros(x.shape[0])
    values = (wide / torch.where(scales > 0, scales, 1)[:, None]).round_().clamp_(-TOP, TOP)
    return values.to(torch.int8), scales


def int8_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """x [M, K] quantized per row, times the weight, plus bias [N] -> [M, N] in x's dtype.

    The sum over K is exact: 32 bits hold it for K up to 133,000.

    Raises:
        ValueError: x is not [M, K] floating point on the weight's device, or bias is not [N].
    """
    if x.dim() != 2 or x.shape[1] != weight.num_in or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not floating point [M, {weight.num_in}]")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")
    if bias is not None and bias.shape != (weight.num_out,):
        raise ValueError(f"bias is {tuple(bias.shape)}, not [{weight.num_out}]")
    in_triton = choose(backend, x) == "triton"
    if not x.shape[0]:
        return x.new_empty(0, weight.num_out)
    if in_triton:
        values, scales = _int8_triton.quantize_rows(x, weight.smooth, weight.aligned_values.shape[1])
        return _int8_triton.matmul(values, scales, weight.aligned_values, weight.scales, bias, x.dtype)
    values, scales = quantize_rows(x, weight.smooth, backend="torch")
    y = product(values, weight.values).float().mul_(scales[:, None]).mul_(weight.scales)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def product(a: Tensor, b: Tensor) -> Tensor:
    """i8 [M, K] times i8 [N, K] transposed -> i32 [M, N], exact on every machine.

    With VNNI, torch._int_mm takes half the time of a bfloat16 product and a fifth of a float32 one (256 x 1280 x 3840, one
    thread: 10, 16 and 53 ms); without, float32 products of pieces of K take the float32 time and a fifth more.
    """
    (num_rows, num_in), num_out = a.shape, len(b)
    # Of one input, torch 2.13 adds its product to whatever the memory of the result held.
    if a.is_cpu and num_in > 1 and _int_mm_is_exact() or a.is_cuda and num_rows > 16 and not (num_in % 8 or num_out % 8):
        return torch._int_mm(a, b.t())
    wide = torch.float32 if a.is_cpu else torch.float64  # float32 products on a GPU may be TF32
    total = torch.zeros(num_rows, num_out, dtype=torch.int32, device=a.device)
    for some, other in zip(a.split(EXACT_IN_FLOAT32, 1), b.split(EXACT_IN_FLOAT32, 1), strict=True):
        total += torch.mm(some.to(wide), other.to(wide).t()).to(torch.int32)
    return total


@lru_cache(maxsize=1)
def _int_mm_is_exact() -> bool:
    """Without VNNI instructions oneDNN's int8 product silently saturates 16-bit sums (torch 2.13: wrong from K = 37 on)."""
    signs = torch.arange(16 * 64).view(16, 64) % 7 < 4
    a = torch.where(signs, TOP, -TOP).to(torch.int8)
    return torch.equal(torch._int_mm(a, a.t()).long(), a.long() @ a.long().t())
