"""Copies of KV rows on a GPU: every layer, keys and values, in one launch; with int8 in between."""

from __future__ import annotations

from torch import Tensor

from ._launch import Variant, cdiv, jit, launch, next_power_of_2, tl

TILE = 4096  # elements that one program moves at a time, of keys and as many of values: 64 bytes a thread and tensor in 16 bits
NUM_WARPS = 4


@jit(do_not_specialize=["num_rows"])
def _copy(
    src_k, src_v, dst_k, dst_v, src_rows, dst_rows, num_rows, src_rows_layer, src_rows_step, dst_rows_layer, dst_rows_step,
    src_layer, src_slot, src_head, dst_layer, dst_slot, dst_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of one layer."""
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real_row = row < num_rows
    source = tl.load(src_rows + layer * src_rows_layer + row * src_rows_step, mask=real_row, other=0)
    target = tl.load(dst_rows + layer * dst_rows_layer + row * dst_rows_step, mask=real_row, other=0)
    inner = tl.arange(0, WIDTH)
    head, d = inner // HEAD_DIM, inner % HEAD_DIM
    real = real_row[:, None] & (inner < HEADS * HEAD_DIM)[None, :]
    take = layer * src_layer + source[:, None] * src_slot + (head * src_head + d)[None, :]
    give = layer * dst_layer + target[:, None] * dst_slot + (head * dst_head + d)[None, :]
    k, v = tl.load(src_k + take, mask=real, other=0.0), tl.load(src_v + take, mask=real, other=0.0)
    tl.store(dst_k + give, k, mask=real)
    tl.store(dst_v + give, v, mask=real)


@jit(do_not_specialize=["num_rows"])
def _quantize(
    src_k, src_v, rows, values, scales, num_rows, rows_layer, rows_step, src_layer, src_slot, src_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some (row, head) of the keys or the values of one layer."""
    layer, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real_pair = pair < num_rows * HEADS
    source = tl.load(rows + layer * rows_layer + (pair // HEADS) * rows_step, mask=real_pair, other=0)
    real = real_pair[:, None] & (d < HEAD_DIM)[None, :]
    take = layer * src_layer + (source * src_slot + (pair % HEADS) * src_head)[:, None] + d[None, :]
    if part == 0:
        wide = tl.load(src_k + take, mask=real, other=0.0).to(tl.float32)
    else:
        wide = tl.load(src_v + take, mask=real, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(wide), 1), 127.0)
    usable = scale >= 1.1754943508222875e-38
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    wide = tl.minimum(tl.maximum(wide * inverse[:, None], -127.0), 127.0)
    whole = (wide + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to nearest, ties to even, as torch does
    at = (layer * 2 + part) * num_rows * HEADS + pair
    tl.store(values + at[:, None] * HEAD_DIM + d[None, :], whole.to(tl.int8), mask=real)
    tl.store(scales + at, scale, mask=real_pair)


@jit(do_not_specialize=["num_rows"])
def _dequantize(
    values, scales, dst_k, dst_v, rows, num_rows, rows_layer, rows_step, dst_layer, dst_slot, dst_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some (row, head) of the keys or the values of one layer."""
    layer, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    pair, d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    real_pair = pair < num_rows * HEADS
    real = real_pair[:, None] & (d < HEAD_DIM)[None, :]
    at = (layer * 2 + part) * num_rows * HEADS + pair
    scale = tl.load(scales + at, mask=real_pair, other=0.0)
    wide = tl.load(values + at[:, None] * HEAD_DIM + d[None, :], mask=real, other=0).to(tl.float32) * scale[:, None]
    target = tl.load(rows + layer * rows_layer + (pair // HEADS) * rows_step, mask=real_pair, other=0)
    give = layer * dst_layer + (target * dst_slot + (pair % HEADS) * dst_head)[:, None] + d[None, :]
    if part == 0:
        tl.store(dst_k + give, wide.to(dst_k.dtype.element_ty), mask=real)
    else:
        tl.store(dst_v + give, wide.to(dst_v.dtype.element_ty), mask=real)


def copy_rows(src_k: Tensor, src_v: Tensor, dst_k: Tensor, dst_v: Tensor, src_rows: Tensor, dst_rows: Tensor) -> None:
    """dst[l, dst_rows[l, i]] = src[l, src_rows[l, i]]; rows [L, n], expanded where all layers share them."""
    num_layers, num_rows = src_rows.shape
    heads, head_dim = src_k.shape[2:]
    width = next_power_of_2(heads * head_dim)
    block_rows = max(1, TILE // width)
    launch(
        _copy, (cdiv(num_rows, block_rows), num_layers),
        src_k, src_v, dst_k, dst_v, src_rows, dst_rows, num_rows, *src_rows.stride(), *dst_rows.stride(),
        *src_k.stride()[:3], *dst_k.stride()[:3],
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_ROWS=block_rows, WIDTH=width, num_warps=NUM_WARPS, device=src_k.device,
    )  # fmt: skip


def quantize_rows(src_k: Tensor, src_v: Tensor, rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """rows [L, n] -> values i8 [L, 2, n, Hkv, D] and scales f32 [L, 2, n, Hkv], both written."""
    _by_pairs(_quantize, (src_k, src_v, rows, values, scales), src_k, rows)


def dequantize_rows(values: Tensor, scales: Tensor, dst_k: Tensor, dst_v: Tensor, rows: Tensor) -> None:
    """The way back, into rows [L, n] of the arena."""
    _by_pairs(_dequantize, (values, scales, dst_k, dst_v, rows), dst_k, rows)


def _by_pairs(kernel: object, tensors: tuple[Tensor, ...], arena: Tensor, rows: Tensor) -> None:
    num_layers, num_rows = rows.shape
    heads, head_dim = arena.shape[2:]
    width = next_power_of_2(head_dim)
    block = max(1, TILE // width)
    launch(
        kernel, (cdiv(num_rows * heads, block), num_layers, 2), *tensors, num_rows, *rows.stride(), *arena.stride()[:3],
        HEADS=heads, HEAD_DIM=head_dim, BLOCK=block, WIDTH=width, num_warps=NUM_WARPS, device=arena.device,
    )  # fmt: skip


def _pair_variant(kernel: object, names: dict[str, str], prefix: str, heads: int, head_dim: int) -> Variant:
    ints = {"num_rows": "i32", "rows_layer": "i32", "rows_step": "i32"}
    ints |= {f"{prefix}_{what}": "i64:16" if what == "layer" else "i32:16" for what in ("layer", "slot", "head")}
    width = next_power_of_2(head_dim)
    constexprs = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK": TILE // width, "WIDTH": width}
    return Variant(kernel, {name: f"*{kind}:16" for name, kind in names.items()} | ints, constexprs, {"num_warps": NUM_WARPS})


def _copy_variant(dtype: str, heads: int, head_dim: int) -> Variant:
    signature = {name: f"*{dtype}:16" for name in ("src_k", "src_v", "dst_k", "dst_v")}
    signature |= {"src_rows": "*i64:16", "dst_rows": "*i64:16", "num_rows": "i32"}
    signature |= {f"{side}_rows_{what}": "i32" for side in ("src", "dst") for what in ("layer", "step")}
    signature |= {f"{side}_layer": "i64:16" for side in ("src", "dst")}
    signature |= {f"{side}_{what}": "i32:16" for side in ("src", "dst") for what in ("slot", "head")}
    width = next_power_of_2(heads * head_dim)
    constexprs = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_ROWS": max(1, TILE // width), "WIDTH": width}
    return Variant(_copy, signature, constexprs, {"num_warps": NUM_WARPS})


_SRC = {"src_k": "bf16", "src_v": "bf16", "rows": "i64", "values": "i8", "scales": "fp32"}
_DST = {"dst_k": "bf16", "dst_v": "bf16", "rows": "i64", "values": "i8", "scales": "fp32"}
VARIANTS = [
    _copy_variant("bf16", 4, 128),
    _copy_variant("fp32", 8, 80),
    _pair_variant(_quantize, _SRC, "src", 4, 128),
    _pair_variant(_quantize, _SRC, "src", 7, 80),
    _pair_variant(_dequantize, _DST, "dst", 4, 128),
    _pair_variant(_dequantize, _DST, "dst", 7, 96),
]
