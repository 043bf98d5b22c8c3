"""W4A16 on a GPU: the fused product for few rows, and the kernel that unpacks a weight for the product of many.

    columns  [--- 128 ---][--- 128 ---] ...     one program each: (tile of rows, tile of columns, split)
    K        [ 256 ][ 256 ][ 256 ][ 256 ] ...   steps of one program: a tile of words i32 [32, 128], then its 8 planes
    plane    sum += x[:, 32 k] (code - zero)[32 k, 128]      after the last plane of a group: total += sum * scale

(code - zero) is exact in 16 bits and the scale multiplies an fp32 sum: no weight is ever rounded. Splits leave fp32 sums that a
second kernel adds in order, without atomics. Up to FEW_ROWS rows the tile, and the order of every addition in it, is the same
whatever their number: a row's bits do not depend on who else is in the batch.

Looked at in SASS for sm_90: words go to shared memory by cp.async in pieces of 16 bytes, from there straight into the registers
that mma.sync reads, and only there become 16-bit numbers: two per (shift, lop3, packed subtract). Scale and zero share a word, so
that they come by cp.async as well; a plain load in the loop would be waited for. That is 2.7 instructions per weight in all
(groups of 128, 16 rows). An H200 reads 9.6 weights in a picosecond and issues instructions for 30 lanes: were weights converted
one by one, or did they pass through shared memory after that, instructions and not the memory would bound the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._launch import INTERPRETED, Variant, cdiv, constexpr, jit, launch, tl
from .awq_weight import PLANE_ROWS, PLANES, SPAN, AwqWeight

FEW_ROWS = 16  # the rows of a decode step: one tile
BLOCK_COLUMNS, NUM_WARPS, SUM_COLUMNS = 128, 4, 512
# Programs that a launch should have at least: two for each of the 132 multiprocessors of an H200 (three fit by registers).
TARGET_PROGRAMS = 264
MIN_SPANS = 2  # steps of a split, so that loads run ahead of products
MAX_SPLITS = 16
PLANES_OF_GROUP = {num * PLANE_ROWS: num for num in (1, 2, 4)}

SCALES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# 0x4300 is 128 in bfloat16, 0x6400 is 1024 in float16: a code in the lowest bits of either adds itself.


def _unpack_two(plane: int, magic: int) -> str:
    """PTX: from the words of two neighbouring k, nibble `plane` of both as 16-bit floats magic + code, packed."""
    halves, shift = ("0x5410", "0x7632")[plane // 4], 4 * (plane % 4)
    body = f"prmt.b32 t, $1, $2, {halves}; shr.u32 t, t, {shift}; lop3.b32 $0, t, 0x000f000f, {magic:#x}, 0xEA;"
    return "{ .reg .b32 t; " + body + " }"


_UNPACK_BF16 = constexpr([_unpack_two(plane, 0x43004300) for plane in range(PLANES)])
_UNPACK_FP16 = constexpr([_unpack_two(plane, 0x64006400) for plane in range(PLANES)])


@jit
def _steps_of(words, zero, PLANE: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """words i32 [32, columns] and zero i32 [columns] -> code - zero of one plane, exact."""
    if UPCAST:  # the interpreter converts no integers to bfloat16 and knows no assembler
        return (((words >> (4 * PLANE)) & 15) - zero[None, :]).to(tl.float32)
    elif DTYPE == tl.bfloat16:
        raised = tl.inline_asm_elementwise(_UNPACK_BF16[PLANE], "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        return raised - (zero | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)[None, :]
    else:
        raised = tl.inline_asm_elementwise(_UNPACK_FP16[PLANE], "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        return raised - (zero | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)[None, :]


@jit
def _scale_of(step, SCALE: tl.constexpr):
    """fp32 scale out of the words that AwqWeight.step_words describes."""
    if SCALE == "bf16":
        return (step.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif SCALE == "fp16":
        return (step & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (step & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@jit
def _zero_of(step, SCALE: tl.constexpr):
    return (step >> (32 if SCALE == "fp32" else 16)).to(tl.int32)


@jit
def _group_of(span, plane, group_size, num_groups, GROUP_PLANES: tl.constexpr):
    """The group in which a plane lies; the last one for planes past the end of K, whose inputs are 0."""
    if GROUP_PLANES == 8:  # groups of whole spans, or one for all of K
        group = span * 256 // group_size
    else:
        group = span * (8 // GROUP_PLANES) + plane // GROUP_PLANES
    return tl.minimum(group, num_groups - 1)


@jit(do_not_specialize=["num_rows"])
def _awq_matmul(
    x, words, step_words, bias, out, num_rows, num_in, num_out, num_groups, group_size, spans_each,
    x_row, bias_row, out_split,
    SCALE: tl.constexpr, GROUP_PLANES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of x [M, K] W over one split of K -> out [split, M, N]."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = tl.program_id(2) * spans_each
    real_row, real_column = row < num_rows, column < num_out
    k = tl.arange(0, 32)
    word_at = words + (first * 32 + k).to(tl.int64)[:, None] * num_out + column[None, :]
    x_at = x + row.to(tl.int64)[:, None] * x_row + (first * 256 + k)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for span in range(first, tl.minimum(tl.cdiv(num_in, 256), first + spans_each)):
        held = tl.load(word_at, mask=real_column[None, :], other=0)
        for plane in tl.static_range(8):
            if TAIL == "any":
                inside = (span * 256 + plane * 32 + k) < num_in
                some = tl.load(x_at + plane * 32, mask=real_row[:, None] & inside[None, :], other=0.0)
            else:
                # K ends with a plane: past it there are no rows, which costs fewer registers than columns that are masked.
                last = num_rows if TAIL == "none" else tl.where(span * 256 + plane * 32 < num_in, num_rows, 0)
                some = tl.load(x_at + plane * 32, mask=(row < last)[:, None], other=0.0)
            if plane % GROUP_PLANES == 0:
                group = _group_of(span, plane, group_size, num_groups, GROUP_PLANES)
                step = tl.load(step_words + group.to(tl.int64) * num_out + column, mask=real_column, other=0)
                zero, scale = _zero_of(step, SCALE), _scale_of(step, SCALE)
                part = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            steps = _steps_of(held, zero, plane, x.dtype.element_ty, UPCAST)
            if UPCAST:
                part = tl.dot(some.to(tl.float32), steps, part, input_precision="ieee")
            else:
                part = tl.dot(some, steps, part)
            if plane % GROUP_PLANES == GROUP_PLANES - 1:
                total += part * scale[None, :]
            if GROUP_PLANES == 1 and plane == 3:
                tl.debug_barrier()  # keeps ptxas from loading the words of all eight groups at once, and spilling
        word_at += 32 * num_out.to(tl.int64)
        x_at += 256
    real = real_row[:, None] & real_column[None, :]
    if bias is not None:
        bias_at = row.to(tl.int64)[:, None] * bias_row + column[None, :]
        total += tl.load(bias + bias_at, mask=real, other=0.0).to(tl.float32)
    at = tl.program_id(2).to(tl.int64) * out_split + row.to(tl.int64)[:, None] * num_out + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real)


@jit(do_not_specialize=["num_rows"])
def _add_splits(partial, bias, out, num_rows, num_out, bias_row, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """partial f32 [splits, M, N], added from the first to the last, plus bias -> out [M, N]."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < num_out
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):  # unrolled: all loads are under way at once
        total += tl.load(partial + (split * num_rows + row) * num_out + column, mask=real, other=0.0)
    if bias is not None:
        total += tl.load(bias + row * bias_row + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * num_out + column, total.to(out.dtype.element_ty), mask=real)


@jit(do_not_specialize=["first_tile"])
def _dequantize(
    words, step_words, out, num_in, num_out, num_groups, group_size, first_tile, num_columns,
    SCALE: tl.constexpr, GROUP_PLANES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """256 k of some columns of the weight, each product rounded once -> out [K, num_columns]."""
    inner = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    span = tl.program_id(1)
    column, real = first_tile * BLOCK_COLUMNS + inner, inner < num_columns
    k = tl.arange(0, 32)
    held = tl.load(words + (span * 32 + k).to(tl.int64)[:, None] * num_out + column[None, :], mask=real[None, :], other=0)
    for plane in tl.static_range(8):
        if plane % GROUP_PLANES == 0:
            group = _group_of(span, plane, group_size, num_groups, GROUP_PLANES)
            step = tl.load(step_words + group.to(tl.int64) * num_out + column, mask=real, other=0)
            zero, scale = _zero_of(step, SCALE), _scale_of(step, SCALE)
        value = (((held >> (4 * plane)) & 15) - zero[None, :]).to(tl.float32) * scale[None, :]
        row = span * 256 + plane * 32 + k
        at = row.to(tl.int64)[:, None] * num_columns + inner[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=(row < num_in)[:, None] & real[None, :])


def group_planes(weight: AwqWeight) -> int:
    """How many planes of a span share a group; 0 if the kernels cannot take such groups (they start within planes)."""
    if len(weight.scales) == 1 or weight.group_size % SPAN == 0:
        return PLANES
    return PLANES_OF_GROUP.get(weight.group_size, 0)


def block_rows(num_rows: int, planes: int) -> int:
    """Rows of a tile. With groups of 32 two tiles of 16 spill no registers, and one of 32 does."""
    return FEW_ROWS if num_rows <= FEW_ROWS or planes == 1 else 2 * FEW_ROWS


def num_stages(tile: int, planes: int) -> int:
    """How far loads run ahead, as far as registers go."""
    return 3 if tile == FEW_ROWS and planes > 1 else 2


def tail_of(num_in: int) -> str:
    """What lies behind K in its last span: nothing, whole planes, or a part of one."""
    return "none" if num_in % SPAN == 0 else "planes" if num_in % PLANE_ROWS == 0 else "any"


def num_splits(num_tiles: int, num_in: int) -> int:
    """Into how many parts K is cut for so many tiles of rows and columns."""
    num_spans = cdiv(num_in, SPAN)
    wanted = min(MAX_SPLITS, cdiv(TARGET_PROGRAMS, num_tiles))
    return cdiv(num_spans, max(MIN_SPANS, cdiv(num_spans, wanted)))


def matmul(x: Tensor, weight: AwqWeight, bias: Tensor | None) -> Tensor:
    """The fused product; x [M, K] in bfloat16 or float16, groups that `group_planes` knows; bias [N] or [M, N]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_out, planes = x.shape[0], weight.num_out, group_planes(weight)
    tile = block_rows(num_rows, planes)
    tiles = cdiv(num_rows, tile), cdiv(num_out, BLOCK_COLUMNS)
    splits = num_splits(tiles[0] * tiles[1], weight.num_in)
    bias = bias if bias is None or bias.stride(-1) == 1 else bias.contiguous()
    bias_row = bias.stride(0) if bias is not None and bias.dim() == 2 else 0
    out = x.new_empty(num_rows, num_out)
    sums = out if splits == 1 else x.new_empty((splits, num_rows, num_out), dtype=torch.float32)
    launch(
        _awq_matmul,
        (*tiles, splits),
        x, weight.codes, weight.step_words, bias if splits == 1 else None, sums,
        num_rows, weight.num_in, num_out, len(weight.scales), weight.group_size,
        cdiv(cdiv(weight.num_in, SPAN), splits), x.stride(0), bias_row, num_rows * num_out,
        SCALE=SCALES[weight.scales.dtype], GROUP_PLANES=planes, BLOCK_ROWS=tile, BLOCK_COLUMNS=BLOCK_COLUMNS,
        TAIL=tail_of(weight.num_in), UPCAST=INTERPRETED, num_warps=NUM_WARPS, num_stages=num_stages(tile, planes), device=x.device,
    )  # fmt: skip
    if splits > 1:
        grid = (num_rows, cdiv(num_out, SUM_COLUMNS))
        settings = {"SPLITS": splits, "BLOCK": SUM_COLUMNS, "num_warps": NUM_WARPS}
        launch(_add_splits, grid, sums, bias, out, num_rows, num_out, bias_row, device=x.device, **settings)
    return out


def dequantize(weight: AwqWeight, dtype: torch.dtype, first: int, stop: int) -> Tensor:
    """Columns [first, stop) of the weight -> [K, stop - first]; first is a multiple of BLOCK_COLUMNS."""
    assert first % BLOCK_COLUMNS == 0, first
    out = torch.empty((weight.num_in, stop - first), dtype=dtype, device=weight.device)
    launch(
        _dequantize,
        (cdiv(stop - first, BLOCK_COLUMNS), cdiv(weight.num_in, SPAN)),
        weight.codes, weight.step_words, out, weight.num_in, weight.num_out, len(weight.scales),
        weight.group_size, first // BLOCK_COLUMNS, stop - first,
        SCALE=SCALES[weight.scales.dtype], GROUP_PLANES=group_planes(weight), BLOCK_COLUMNS=BLOCK_COLUMNS,
        num_warps=NUM_WARPS, device=weight.device,
    )  # fmt: skip
    return out


def _variant(dtype: str, group: int, rows: int, out: str, bias: bool, tail: str) -> Variant:
    ints = {name: "i32:16" for name in ("num_in", "num_out", "x_row", "bias_row", "out_split")}
    ints |= {name: "i32" for name in ("num_rows", "num_groups", "group_size", "spans_each")}
    pointers = {"x": dtype, "words": "i32", "step_words": "i32", "out": out} | ({"bias": dtype} if bias else {})
    constexprs: dict[str, Any] = {"GROUP_PLANES": group, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": BLOCK_COLUMNS, "TAIL": tail}
    constexprs |= {"UPCAST": False, "SCALE": "fp16"} | ({} if bias else {"bias": None})
    options = {"num_warps": NUM_WARPS, "num_stages": num_stages(rows, group)}
    return Variant(_awq_matmul, ints | {name: f"*{kind}:16" for name, kind in pointers.items()}, constexprs, options)


VARIANTS = [
    _variant("bf16", 4, FEW_ROWS, "fp32", bias=False, tail="none"),
    _variant("bf16", 1, FEW_ROWS, "fp32", bias=False, tail="planes"),
    _variant("fp16", 8, FEW_ROWS, "fp16", bias=True, tail="any"),
    _variant("bf16", 4, 2 * FEW_ROWS, "bf16", bias=True, tail="none"),
    _variant("bf16", 2, 2 * FEW_ROWS, "fp32", bias=False, tail="planes"),
    Variant(
        _add_splits,
        {"partial": "*fp32:16", "bias": "*bf16:16", "out": "*bf16:16", "num_rows": "i32", "num_out": "i32:16"}
        | {"bias_row": "i32:16"},
        {"SPLITS": MAX_SPLITS, "BLOCK": SUM_COLUMNS},
        {"num_warps": NUM_WARPS},
    ),
    Variant(
        _dequantize,
        {"words": "*i32:16", "step_words": "*i32:16", "out": "*bf16:16", "num_in": "i32:16"}
        | {"num_out": "i32:16", "num_groups": "i32", "group_size": "i32", "first_tile": "i32", "num_columns": "i32:16"},
        {"SCALE": "bf16", "GROUP_PLANES": 4, "BLOCK_COLUMNS": BLOCK_COLUMNS},
        {"num_warps": NUM_WARPS},
    ),
]
