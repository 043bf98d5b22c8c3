"""y = x W for a W4A16 weight: 4-bit codes in groups, activations in 16 bits or float32.

               few rows                                         many rows
CUDA           fused Triton product, words read once            unpacked by a kernel in pieces, then torch.mm
CPU, AVX-512   torch's int4 operator, bfloat16 only             unpacked in pieces that stay in the L2, then torch.mm
other CPU      unpacked in pieces, then torch.mm
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import _awq_triton
from ._launch import Backend, choose
from .awq_weight import BLOCK, AwqWeight

# Rows up to which the fused GPU kernel serves. Not measured on a GPU. By reckoning for an H200 and 68 M weights: unpacking
# writes and reads 2 bytes a weight beside the 0.5 read, 64 us, and the product of 128 rows takes 22; the fused kernel issues 3.1
# instructions per weight and tile of 32 rows, 48 us for 128 rows at 60 % of the issue rate.
FUSED_ROWS = 128
SCRATCH_BYTES = 64 << 20  # of an unpacked piece on a GPU
# Rows up to which torch's int4 operator serves on a CPU. Its time grows with each row, and unpacking costs the same for all.
# Milliseconds on one thread of a Zen 4 (AVX-512 BF16, shared), the least of 100 rounds in turn, weights not in the L3:
#     K x N          rows    1     8     16    32    48    64    96
#     1024 x 2816    int4    0.29  0.58  1.1   2.1   3.2   4.3   6.7
#                    unpack  3.0   2.8   3.0   3.6   4.2   4.5   5.6
#                    bf16    0.65  0.81  1.0   1.4   1.8   2.2   3.1
#     3584 x 3584    int4    0.73  2.4   4.8   9.6   15    27    28
#                    unpack  16    15    16    18    19    25    23
#                    bf16    2.5   2.8   3.7   5.5   10    9.1   13
# A weight of its own in bfloat16 would be faster from 16 rows on, for four times the memory.
OPERATOR_ROWS = 64
PIECE_BYTES = 2 << 20  # of an unpacked piece on a CPU; 1 to 4 MiB took the same time


def awq_matmul(x: Tensor, weight: AwqWeight, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """x [M, K] times the dequantized weight, plus bias [N] or [M, N] -> [M, N] in x's dtype (bfloat16, float16, float32).

    Sums are in fp32. On CUDA, up to 16 rows the bits of a row do not depend on the other rows. float32 rows are multiplied with
    the exact dequantized weight.

    Raises:
        ValueError: x is not [M, K] in such a dtype on the weight's device, bias is not of such a shape in x's dtype, or backend is
            "triton" and the kernels cannot read the weight (blocks, or groups other than 32, 64, 128, whole 256s and all of K).
    """
    if x.dim() != 2 or x.shape[1] != weight.num_in or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not bfloat16, float16 or float32 [M, {weight.num_in}]")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weight on {weight.device}")
    shapes = ((weight.num_out,), (x.shape[0], weight.num_out))
    if bias is not None and (bias.shape not in shapes or bias.dtype != x.dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, not {x.dtype} {shapes[0]} or {shapes[1]}")
    in_triton = choose(backend, x) == "triton"
    if in_triton and (weight.in_blocks or not _awq_triton.group_planes(weight)):
        if backend == "triton":
            raise ValueError(f"backend 'triton': cannot read {'blocks' if weight.in_blocks else f'groups of {weight.group_size}'}")
        in_triton = False
    if not x.shape[0]:
        return x.new_empty(0, weight.num_out)
    if in_triton:
        if x.shape[0] <= FUSED_ROWS and x.dtype != torch.float32:
            return _awq_triton.matmul(x, weight, bias)
        return _unpacked_on_gpu(x, weight, bias)
    if x.dtype == torch.bfloat16 and weight.in_blocks:
        y = _int4_operator(x, weight) if x.shape[0] <= OPERATOR_ROWS else _unpacked_blocks(x, weight)
    else:
        y = _unpacked(x, weight)
    return y if bias is None else y.add_(bias)


def _unpacked_on_gpu(x: Tensor, weight: AwqWeight, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape[0], weight.num_out)
    tile = _awq_triton.BLOCK_COLUMNS
    columns = max(1, SCRATCH_BYTES // (x.element_size() * weight.num_in * tile)) * tile
    for first in range(0, weight.num_out, columns):
        stop = min(weight.num_out, first + columns)
        piece = _awq_triton.dequantize(weight, x.dtype, first, stop)
        if bias is None:
            torch.mm(x, piece, out=y[:, first:stop])
        else:
            torch.addmm(bias[..., first:stop], x, piece, out=y[:, first:stop])
    return y


def _unpacked(x: Tensor, weight: AwqWeight) -> Tensor:
    y = x.new_empty(x.shape[0], weight.num_out)
    piece_bytes = PIECE_BYTES if x.is_cpu else SCRATCH_BYTES
    for columns, piece in weight.dequantized(x.dtype, max(1, piece_bytes // (4 * weight.num_in * BLOCK)) * BLOCK):
        torch.mm(x, piece, out=y[:, columns])
    return y


def _int4_operator(x: Tensor, weight: AwqWeight) -> Tensor:
    codes = weight.codes.view(-1, weight.num_in // 2)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, weight.group_size, weight.operator_steps)
    return y[:, : weight.num_out].contiguous()


def _unpacked_blocks(x: Tensor, weight: AwqWeight) -> Tensor:
    """bfloat16 on a CPU: some blocks of 64 columns at a time, in few whole-tensor passes over what stays in the L2."""
    num_blocks, num_in, half = weight.codes.shape
    group, num_groups = weight.group_size, len(weight.scales)
    blocks_each = max(1, PIECE_BYTES // (num_in * BLOCK * 2))
    padding = (0, num_blocks * BLOCK - weight.num_out)
    zeros, scales = (pad(t, padding).to(x.dtype).view(num_groups, 1, -1, BLOCK) for t in (weight.zeros, weight.scales))
    y = x.new_empty(x.shape[0], num_blocks * BLOCK)
    nibbles = torch.empty((blocks_each, num_in, half), dtype=torch.uint8)
    piece = x.new_empty(num_in, blocks_each, BLOCK)
    for first in range(0, num_blocks, blocks_each):
        held = weight.codes[first : first + blocks_each]
        if len(held) < blocks_each:
            nibbles, piece = nibbles[: len(held)], x.new_empty(num_in, len(held), BLOCK)
        lanes = piece.transpose(0, 1)
        lanes[..., :half].copy_(torch.bitwise_and(held, 15, out=nibbles))
        lanes[..., half:].copy_(torch.bitwise_right_shift(held, 4, out=nibbles))
        columns = slice(first, first + len(held))
        steps = piece.view(num_groups, group, len(held), BLOCK)
        steps.sub_(zeros[:, :, columns]).mul_(scales[:, :, columns])
        torch.mm(x, piece.view(num_in, -1), out=y[:, first * BLOCK : (first + len(held)) * BLOCK])
    return y[:, : weight.num_out].contiguous()
