"""The weight of one quantized linear as matmul wants to read it: repacked once, at load.

planes   i32 [ceil(K/256) * 32, N]    word 32b + r of a column: nibble i holds k = 256b + 32i + r. One load brings 8 planes of
                                      32 consecutive k, so that a group is some whole planes and its scale is applied to
                                      their sum, not to weights. Neighbouring columns lie side by side.
blocks   u8 [ceil(N/64), K, 32]       what torch's int4 operator for CPUs reads with AVX-512: byte j of a row holds column j
                                      of the block in its low nibble and column j + 32 in its high one
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor

from ._launch import cdiv
from .awq_format import TOP_CODE, check_gemm, unpack

PLANES, PLANE_ROWS = 8, 32
SPAN = PLANES * PLANE_ROWS  # inputs in the words of one row of planes
PIECE_ELEMENTS = 1 << 19  # that `dequantize` works on at a time: 2 MiB in float32
BLOCK = 64  # columns in one block of torch's operator
Layout = Literal["auto", "planes", "blocks"]
OPERATOR_GROUPS = (32, 64, 128, 256)  # which torch's operator takes


@dataclass(frozen=True, eq=False)
class AwqWeight:
    """W[k, n] = (code - zeros[k // g, n]) * scales[k // g, n]; what `awq_matmul` takes. Make one with `from_gemm`.

    codes: in one of the two layouts above, which their dtype tells; zeros u8 [K/g, N]; scales [K/g, N], float.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    num_in: int

    @classmethod
    def from_gemm(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, layout: Layout = "auto") -> AwqWeight:
        """From AutoAWQ's tensors (awq_format.py), on their device; "auto" lays them out for it.

        Raises:
            ValueError: a dtype or shape that the format does not have, or scales that are not finite.
        """
        check_gemm(qweight, qzeros, scales)
        if not torch.isfinite(scales).all():
            raise ValueError("scales hold NaN or infinity")
        return cls.from_codes(unpack(qweight), unpack(qzeros), scales, layout)

    @classmethod
    def from_codes(cls, codes: Tensor, zeros: Tensor, scales: Tensor, layout: Layout = "auto") -> AwqWeight:
        """From codes u8 [K, N], zeros u8 [K/g, N] and scales [K/g, N] that belong together."""
        if layout == "auto":
            layout = "blocks" if suits_operator(codes.device, len(codes) // len(scales)) else "planes"
        lay = _to_blocks if layout == "blocks" else _to_planes
        return cls(lay(codes), zeros.contiguous(), scales.contiguous(), len(codes))

    @classmethod
    def cat(cls, weights: Sequence[AwqWeight]) -> AwqWeight:
        """Side by side along N: one product instead of several (q, k and v; gate and up).

        Raises:
            ValueError: they differ in inputs, groups or device.
        """
        first = weights[0]
        for other in weights[1:]:
            if (other.num_in, other.group_size, other.device) != (first.num_in, first.group_size, first.device):
                theirs = f"{other.num_in} inputs in groups of {other.group_size} on {other.device}"
                raise ValueError(f"cannot join {theirs} to {first.num_in} in groups of {first.group_size} on {first.device}")
        dtypes = {w.scales.dtype for w in weights}
        scales = torch.cat([w.scales if len(dtypes) == 1 else w.scales.float() for w in weights], 1)
        zeros = torch.cat([w.zeros for w in weights], 1)
        if first.in_blocks and any(w.num_out % BLOCK for w in weights[:-1]):
            codes = _to_blocks(torch.cat([w.unpacked() for w in weights], 1))
        else:
            codes = torch.cat([w.codes for w in weights], 0 if first.in_blocks else 1)
        return cls(codes, zeros, scales, first.num_in)

    @property
    def num_out(self) -> int:
        """N."""
        return self.scales.shape[1]

    @property
    def group_size(self) -> int:
        """Rows of the weight that share a scale and a zero."""
        return self.num_in // self.scales.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.scales.device

    @property
    def in_blocks(self) -> bool:
        """Whether the codes lie as torch's CPU operator reads them; else in planes."""
        return self.codes.dtype == torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes that the weight holds."""
        tensors = (self.codes, self.zeros, self.scales, self.operator_steps if self.in_blocks else self.step_words)
        return sum(t.nbytes for t in tensors)

    def to(self, device: torch.device | str) -> AwqWeight:
        """On another device, laid out for it; itself if it is there already."""
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if device == self.device:
            return self
        zeros, scales = self.zeros.to(device), self.scales.to(device)
        if not self.in_blocks and not suits_operator(device, self.group_size):
            return AwqWeight(self.codes.to(device), zeros, scales, self.num_in)
        return AwqWeight.from_codes(self.unpacked().to(device), zeros, scales)

    def unpacked(self, first: int = 0, stop: int | None = None) -> Tensor:
        """The codes alone, u8 [K, N], or of columns [first, stop)."""
        stop = self.num_out if stop is None else stop
        if self.in_blocks:
            block = first // BLOCK
            held = self.codes[block : cdiv(stop, BLOCK)]
            lanes = torch.cat((held & TOP_CODE, held >> 4), -1).transpose(0, 1).reshape(self.num_in, -1)
            return lanes[:, first - block * BLOCK : stop - block * BLOCK]
        words = self.codes[:, first:stop].reshape(-1, 1, PLANE_ROWS, stop - first)
        planes = torch.arange(0, 4 * PLANES, 4, dtype=torch.int32, device=self.device)[:, None, None]
        return ((words >> planes) & TOP_CODE).to(torch.uint8).view(-1, stop - first)[: self.num_in]

    def dequantized(self, dtype: torch.dtype, num_columns: int) -> Iterator[tuple[slice, Tensor]]:
        """W by pieces of columns, (their slice, [K, n]): each product rounded once, to `dtype`."""
        for first in range(0, self.num_out, num_columns):
            columns = slice(first, min(self.num_out, first + num_columns))
            steps = self.unpacked(columns.start, columns.stop).float().view(len(self.scales), self.group_size, -1)
            product = steps.sub_(self.zeros[:, None, columns]).mul_(self.scales[:, None, columns].float())
            yield columns, product.view(self.num_in, -1).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [K, N]: each product rounded once, to `dtype` (float32 holds it exactly for 16-bit scales)."""
        out = torch.empty((self.num_in, self.num_out), dtype=dtype, device=self.device)
        for columns, piece in self.dequantized(dtype, max(1, PIECE_ELEMENTS // (BLOCK * self.num_in)) * BLOCK):
            out[:, columns] = piece
        return out

    @cached_property
    def step_words(self) -> Tensor:
        """What our kernels read instead of zeros and scales, one word for both [K/g, N]: the scale's bits below, the zero above.

        i32 = zero << 16 | 16 bits; i64 = zero << 32 | 32 bits for scales in float32.
        """
        wide, bits = (torch.int64, 32) if self.scales.dtype == torch.float32 else (torch.int32, 16)
        scales = self.scales.contiguous().view(torch.int32 if bits == 32 else torch.int16).to(wide)
        return (self.zeros.to(wide) << bits) | (scales & ((1 << bits) - 1))

    @cached_property
    def operator_steps(self) -> Tensor:
        """What torch's operator takes beside the codes: scale and (8 - zero) * scale, bf16 [K/g, whole blocks, 2].

        It computes (code - 8) * scale + offset. The offset is rounded to bfloat16, an error of at most 1/64 of a step of the code.
        """
        scales = self.scales.float()
        steps = torch.stack((scales, (8 - self.zeros.float()) * scales), -1)
        padding = len(self.codes) * BLOCK - self.num_out
        return torch.nn.functional.pad(steps, (0, 0, 0, padding)).to(torch.bfloat16)


def suits_operator(device: torch.device, group_size: int) -> bool:
    """Whether torch's int4 operator takes such a weight and is worth it: only AVX-512 gains over bfloat16 (28 ms with AVX2, as
    bfloat16 itself, where AVX-512 takes 1.8).
    """
    return device.type == "cpu" and group_size in OPERATOR_GROUPS and _operator_reads_blocks()


@lru_cache(maxsize=1)
def _operator_reads_blocks() -> bool:
    """The layout is torch's own affair: ask it once whether it is the one that we know."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    codes = torch.arange(2 * BLOCK * 16, dtype=torch.int32).view(2 * BLOCK, 16) * 7 % 16
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(theirs.flatten(), _to_blocks(codes.t().to(torch.uint8)).flatten())


def _to_planes(codes: Tensor) -> Tensor:
    num_in, num_out = codes.shape
    lanes = torch.nn.functional.pad(codes, (0, 0, 0, -num_in % SPAN)).view(cdiv(num_in, SPAN), PLANES, PLANE_ROWS, num_out)
    words = torch.zeros((len(lanes), PLANE_ROWS, num_out), dtype=torch.int32, device=codes.device)
    for plane in range(PLANES):
        words |= lanes[:, plane].to(torch.int32) << (4 * plane)
    return words.view(-1, num_out)


def _to_blocks(codes: Tensor) -> Tensor:
    num_in, num_out = codes.shape
    lanes = torch.nn.functional.pad(codes, (0, -num_out % BLOCK)).view(num_in, -1, 2, BLOCK // 2).transpose(0, 1)
    return (lanes[:, :, 0] | lanes[:, :, 1] << 4).contiguous()
