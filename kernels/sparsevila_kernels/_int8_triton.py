"""W8A8 on a GPU: rows to int8 in one pass, and the int8 product with both scales, bias and cast in its last lines."""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import Variant, cdiv, jit, launch, next_power_of_2, tl

GROUP_TILES = 8  # tiles of rows that share their columns of the weight in the L2
# Rows up to which a narrow tile serves; wide tiles are what Hopper's wgmma wants. Not measured on a GPU.
NARROW_ROWS = 64
NARROW, WIDE = (32, 64, 128, 4, 4), (128, 128, 128, 8, 3)  # rows, columns, K of a tile, warps, stages


@jit
def _quantize_rows(x, smooth, values, scales, num_in, x_row, values_row, BLOCK: tl.constexpr):
    """One row of x [M, K] / smooth -> values i8 [M, values_row], zeros behind K, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    real = column < num_in
    wide = tl.load(x + row * x_row + column, mask=real, other=0.0).to(tl.float32)
    if smooth is not None:
        wide = tl.div_rn(wide, tl.load(smooth + column, mask=real, other=1.0))
    scale = tl.div_rn(tl.max(tl.abs(wide), 0), 127.0)
    wide = tl.div_rn(wide, tl.where(scale > 0.0, scale, 1.0))
    wide = tl.minimum(tl.maximum(wide, -127.0), 127.0)
    whole = (wide + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to nearest, ties to even, as torch does
    tl.store(values + row * values_row + column, whole.to(tl.int8), mask=column < values_row)
    tl.store(scales + row, scale)


@jit(do_not_specialize=["num_rows"])
def _int8_matmul(
    a, b, a_scales, b_scales, bias, out, num_rows, num_out, num_in,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_IN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of a i8 [M, K] times b i8 [N, K] transposed -> out [M, N]."""
    row_tiles, column_tiles = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_out, BLOCK_COLUMNS)
    strip = tl.program_id(0) // (GROUP * column_tiles)
    height = tl.minimum(GROUP, row_tiles - strip * GROUP)
    inside = tl.program_id(0) % (GROUP * column_tiles)
    row = (strip * GROUP + inside % height) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = inside // height * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    k = tl.arange(0, BLOCK_IN)
    a_at = a + row.to(tl.int64)[:, None] * num_in + k[None, :]
    b_at = b + column.to(tl.int64)[None, :] * num_in + k[:, None]
    real_row, real_column = row < num_rows, column < num_out
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
    for start in range(0, num_in, BLOCK_IN):
        real = k < num_in - start
        some = tl.load(a_at + start, mask=real_row[:, None] & real[None, :], other=0)
        other = tl.load(b_at + start, mask=real_column[None, :] & real[:, None], other=0)
        total = tl.dot(some, other, total, out_dtype=tl.int32)
    y = total.to(tl.float32) * tl.load(a_scales + row, mask=real_row, other=0.0)[:, None]
    y *= tl.load(b_scales + column, mask=real_column, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=real_column, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * num_out + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=real_row[:, None] & real_column[None, :])


def quantize_rows(x: Tensor, smooth: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """x [M, K] / smooth -> (i8 [M, width], zeros behind K; scales f32 [M])."""
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, num_in = x.shape
    values = torch.empty((num_rows, width), dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    launch(
        _quantize_rows, (num_rows,), x, smooth, values, scales, num_in, x.stride(0), width,
        BLOCK=block, num_warps=_row_warps(block), device=x.device,
    )  # fmt: skip
    return values, scales


def matmul(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a i8 [M, K], b i8 [N, K], scales f32 of their rows -> a b^T [M, N], scaled, plus bias."""
    (num_rows, num_in), num_out = a.shape, len(b)
    out = torch.empty((num_rows, num_out), dtype=dtype, device=a.device)
    rows, columns, block_in, num_warps, num_stages = NARROW if num_rows <= NARROW_ROWS else WIDE
    launch(
        _int8_matmul, (cdiv(num_rows, rows) * cdiv(num_out, columns),),
        a, b, a_scales, b_scales, bias, out, num_rows, num_out, num_in,
        BLOCK_ROWS=rows, BLOCK_COLUMNS=columns, BLOCK_IN=block_in, GROUP=GROUP_TILES,
        num_warps=num_warps, num_stages=num_stages, device=a.device,
    )  # fmt: skip
    return out


def _row_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _product_variant(dtype: str, tile: tuple[int, ...]) -> Variant:
    pointers = {"a": "*i8:16", "b": "*i8:16", "a_scales": "*fp32:16", "b_scales": "*fp32:16", "bias": f"*{dtype}:16"}
    ints = {"num_rows": "i32", "num_out": "i32:16", "num_in": "i32:16"}
    constexprs = dict(zip(("BLOCK_ROWS", "BLOCK_COLUMNS", "BLOCK_IN"), tile, strict=False))
    options = {"num_warps": tile[3], "num_stages": tile[4]}
    return Variant(_int8_matmul, pointers | ints | {"out": f"*{dtype}:16"}, constexprs | {"GROUP": GROUP_TILES}, options)


def _rows_variant(dtype: str, block: int, width: str) -> Variant:
    signature = {"x": f"*{dtype}:16", "smooth": "*fp32:16", "values": "*i8:16", "scales": "*fp32:16"}
    signature |= {"num_in": width, "x_row": width, "values_row": "i32:16"}
    return Variant(_quantize_rows, signature, {"BLOCK": block}, {"num_warps": _row_warps(block)})


VARIANTS = [
    _product_variant("bf16", NARROW),
    _product_variant("bf16", WIDE),
    _product_variant("fp32", WIDE),
    _rows_variant("bf16", 2048, "i32:16"),
    _rows_variant("fp32", 16384, "i32"),
]
