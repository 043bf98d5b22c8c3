"""The 4-bit format of AutoAWQ (`version: gemm`) as functions of tensors, and the way into it from compressed-tensors.

qweight i32 [K, N/8]     8 output columns in a word: nibble i of word w holds column 8w + ORDER[i]
qzeros  i32 [K/g, N/8]   the same packing; values 0..15, without the "+1" of GPTQ
scales      [K/g, N]     float16 (AutoAWQ) or bfloat16 (gptqmodel)
W[k, n] = (q[k, n] - z[k // g, n]) * s[k // g, n],  which is the transpose of nn.Linear's weight [N, K]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLES = 8  # 4-bit codes in a word of 32 bits
TOP_CODE = 15
PIECE_WORDS = 1 << 15  # that a CPU takes apart at a time: 256 KiB of codes, in its L2
SYMMETRIC_ZERO = 8  # what "no zero point" means for unsigned codes


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15, any integer dtype, [R, C] -> i32 [R, C / 8] in AutoAWQ's order.

    Raises:
        ValueError: C is not a multiple of 8.
    """
    return _to_words(codes, ORDER)


def unpack(words: Tensor) -> Tensor:
    """i32 [R, C / 8] in AutoAWQ's order -> codes u8 [R, C].

    Raises:
        ValueError: words are not int32.
    """
    return _to_codes(words, _spread_in_order)


def pack_natural(codes: Tensor) -> Tensor:
    """Codes [R, C] -> i32 [R, C / 8], nibble i of word w holding column 8w + i (compressed-tensors, and our kernels).

    Raises:
        ValueError: C is not a multiple of 8.
    """
    return _to_words(codes, range(NIBBLES))


def unpack_natural(words: Tensor) -> Tensor:
    """i32 [R, C / 8] in natural order -> codes u8 [R, C].

    Raises:
        ValueError: words are not int32.
    """
    return _to_codes(words, _spread_natural)


def dequantize_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """AutoAWQ tensors -> [K, N]: the product rounded once to scales' dtype, as AutoAWQ does, then cast to `dtype`.

    Raises:
        ValueError: the shapes do not belong together, see `check_gemm`.
    """
    num_in, num_out, group = check_gemm(qweight, qzeros, scales)
    if group != group_size:
        raise ValueError(f"group_size is {group_size}, but {num_in} inputs and scales {tuple(scales.shape)} are groups of {group}")
    steps = unpack(qweight).to(torch.int8).view(-1, group, num_out) - unpack(qzeros).to(torch.int8).unsqueeze(1)
    return (steps * scales.unsqueeze(1)).view(num_in, num_out).to(dtype or scales.dtype)


def quantize_rtn(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """nn.Linear weight [N, K] -> (qweight, qzeros, scales f16), rounded to nearest exactly as AutoAWQ rounds.

    Bit-equal to AutoAWQ 0.2.9 (`AwqQuantizer.pseudo_quantize_tensor`, then `WQLinear_GEMM.from_linear`): statistics and
    codes in the weight's own dtype, scale in float16, zero = round(-min / scale). Like there, a group whose weights all have
    one sign saturates: its range is not made to hold 0.

    Raises:
        ValueError: N is not a multiple of 8, K not of group_size, or the weight is not finite.
    """
    num_out, num_in = weight.shape
    if group_size < 1 or num_in % group_size:
        raise ValueError(f"group_size {group_size} does not divide the {num_in} inputs")
    if num_out % NIBBLES:
        raise ValueError(f"{num_out} outputs are no multiple of {NIBBLES}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight holds NaN or infinity")
    groups = weight.reshape(num_out, num_in // group_size, group_size)
    top, bottom = groups.amax(-1), groups.amin(-1)
    scales = (top - bottom).clamp(min=1e-5) / TOP_CODE
    zeros = (-torch.round(bottom / scales)).clamp_(0, TOP_CODE)
    codes = torch.clamp(torch.round(groups / scales.unsqueeze(-1)) + zeros.unsqueeze(-1), 0, TOP_CODE)
    codes = codes.reshape(num_out, num_in).t().to(torch.uint8)
    return pack(codes), pack(zeros.t().to(torch.uint8)), scales.t().contiguous().half()


def from_pack_quantized(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None = None, shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """compressed-tensors `pack-quantized` (4 bits) -> AutoAWQ (qweight, qzeros, scales), without loss.

    packed i32 [N, K/8] (`weight_packed`) holds K in natural order; scales [N, K/g] (`weight_scale`); zero_points i32 [N/8, K/g]
    (`weight_zero_point`) holds N in natural order, None for symmetric weights; shape (N, K) (`weight_shape`).
    Both formats store value + 8 for signed values, so codes and zeros shift together.

    Raises:
        ValueError: the shapes do not belong together.
    """
    codes = unpack_natural(packed)
    num_out, num_in = codes.shape
    if shape is not None and tuple(shape) != (num_out, num_in):
        raise ValueError(f"shape says {tuple(shape)}, packed holds {(num_out, num_in)}")
    if scales.dim() != 2 or scales.shape[0] != num_out or not scales.shape[1] or num_in % scales.shape[1]:
        raise ValueError(f"scales {tuple(scales.shape)} do not fit {num_out} outputs and {num_in} inputs")
    if num_out % NIBBLES:
        raise ValueError(f"{num_out} outputs are no multiple of {NIBBLES}")
    if zero_points is None:
        zeros = torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)
    else:
        zeros = unpack_natural(zero_points.t()).t()
        if zeros.shape != scales.shape:
            raise ValueError(f"zero_points hold {tuple(zeros.shape)}, scales {tuple(scales.shape)}")
    return pack(codes.t()), pack(zeros.t()), scales.t().contiguous()


def check_gemm(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[int, int, int]:
    """(K, N, group size) of AutoAWQ tensors.

    Raises:
        ValueError: a dtype or a shape that the format does not have; names the tensor and the rule.
    """
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        if words.dtype != torch.int32 or words.dim() != 2:
            raise ValueError(f"{name} is {words.dtype} {tuple(words.shape)}, not int32 with two dimensions")
    if not scales.is_floating_point() or scales.dim() != 2:
        raise ValueError(f"scales are {scales.dtype} {tuple(scales.shape)}, not floating point with two dimensions")
    num_in, num_out = qweight.shape[0], qweight.shape[1] * NIBBLES
    num_groups = scales.shape[0]
    if scales.shape[1] != num_out:
        raise ValueError(f"scales {tuple(scales.shape)} have no column for each of the {num_out} outputs of qweight")
    if not num_groups or num_in % num_groups:
        raise ValueError(f"scales {tuple(scales.shape)} do not divide the {num_in} inputs of qweight into equal groups")
    if qzeros.shape != (num_groups, qweight.shape[1]):
        raise ValueError(f"qzeros {tuple(qzeros.shape)} should be {(num_groups, qweight.shape[1])}, as scales and qweight say")
    return num_in, num_out, num_in // num_groups


def _to_words(codes: Tensor, order: tuple[int, ...] | range) -> Tensor:
    rows, columns = codes.shape
    if columns % NIBBLES:
        raise ValueError(f"{columns} codes are no multiple of {NIBBLES}")
    lanes = codes.reshape(rows, columns // NIBBLES, NIBBLES)
    words = torch.zeros(lanes.shape[:2], dtype=torch.int32, device=codes.device)
    for nibble, lane in enumerate(order):
        words |= lanes[:, :, lane].to(torch.int32) << (4 * nibble)
    return words


def _to_codes(words: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """A code to a byte, eight at a time in 64 bits: loading 68 M codes takes 0.6 s on one core, and 1.2 in passes by nibble."""
    if words.dtype != torch.int32 or words.dim() != 2:
        raise ValueError(f"words are {words.dtype} {tuple(words.shape)}, not int32 with two dimensions")
    codes = torch.empty(words.shape, dtype=torch.int64, device=words.device)
    rows_each = max(1, PIECE_WORDS // max(1, words.shape[1])) if words.is_cpu else max(1, len(words))
    for first in range(0, len(words), rows_each):
        codes[first : first + rows_each] = spread(words[first : first + rows_each].to(torch.int64))
    return codes.view(torch.uint8)


def _spread_natural(word: Tensor) -> Tensor:
    """Nibble i of 32 bits -> byte i of 64."""
    word = word & 0xFFFFFFFF
    for shift, mask in ((16, 0x0000FFFF0000FFFF), (8, 0x00FF00FF00FF00FF), (4, 0x0F0F0F0F0F0F0F0F)):
        word = (word << shift).bitwise_or_(word).bitwise_and_(mask)
    return word


def _spread_in_order(word: Tensor) -> Tensor:
    """Nibble i of 32 bits -> byte ORDER[i] of 64: the lower four to even bytes, the upper four to odd ones."""
    even, odd = word & 0xFFFF, (word >> 16) & 0xFFFF
    for shift, mask in ((24, 0x000000FF000000FF), (12, 0x000F000F000F000F)):
        even = (even << shift).bitwise_or_(even).bitwise_and_(mask)
        odd = (odd << shift).bitwise_or_(odd).bitwise_and_(mask)
    return even.bitwise_or_(odd << 8)
