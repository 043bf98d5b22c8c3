"""The small operations of small_ops.py as kernels: a few rows to a program, all arithmetic in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._launch import Variant, cdiv, jit, launch, next_power_of_2, tl

ROWS_TILE = 1024  # elements of several short rows in one program; a longer row has a program of its own
HEADS_TILE = 8  # heads of one token in one program of rope_write: 4 programs a token for 28 + 4 + 4 heads of 128
SILU_TILE = 1024


@jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x, residual, weight, normed, total, num_rows, x_token, x_head, residual_token, residual_head, weight_head, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some rows of [T, heads, D] -> normed, and total = x + residual where there is one; both contiguous."""
    row, d = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, WIDTH)
    real_row, inside = row < num_rows, d < SIZE
    real = real_row[:, None] & inside[None, :]
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    wide = tl.load(x + (token * x_token + head * x_head)[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)
    out = row.to(tl.int64)[:, None] * SIZE + d[None, :]
    if residual is not None:
        at = (token * residual_token + head * residual_head)[:, None] + d[None, :]
        wide += tl.load(residual + at, mask=real, other=0.0).to(tl.float32)
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + out, rounded, mask=real)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    by = tl.load(weight + (head * weight_head)[:, None] + d[None, :], mask=real, other=0.0).to(tl.float32)
    tl.store(normed + out, (wide * scale[:, None] * by).to(normed.dtype.element_ty), mask=real)


@jit
def _rope_write(
    qkv, cos, sin, qk_norm, q_out, k_arena, v_arena, slots, eps, qkv_row, cos_row, arena_slot, arena_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Some heads of one row. Heads lie as [queries | keys | values]; values are copied."""
    row = tl.program_id(0).to(tl.int64)
    head, d = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS), tl.arange(0, WIDTH)
    inside = d < HEAD_DIM
    rolled = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
    real = (head < HEADS + 2 * KV_HEADS)[:, None] & inside[None, :]
    at = qkv + row * qkv_row + head[:, None] * HEAD_DIM
    x = tl.load(at + d[None, :], mask=real, other=0.0)
    first, second = x.to(tl.float32), tl.load(at + rolled[None, :], mask=real, other=0.0).to(tl.float32)
    turns = real & (head < HEADS + KV_HEADS)[:, None]
    if qk_norm is not None:
        scale = tl.rsqrt(tl.sum(first * first, 1) / HEAD_DIM + eps)[:, None]
        by = qk_norm + head[:, None] * HEAD_DIM
        first = first * scale * tl.load(by + d[None, :], mask=turns, other=0.0).to(tl.float32)
        second = second * scale * tl.load(by + rolled[None, :], mask=turns, other=0.0).to(tl.float32)
    by_cos = tl.load(cos + row * cos_row + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    by_sin = tl.load(sin + row * cos_row + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    turned = (first * by_cos + second * by_sin).to(q_out.dtype.element_ty)
    tl.store(q_out + (row * HEADS + head)[:, None] * HEAD_DIM + d[None, :], turned, mask=real & (head < HEADS)[:, None])
    slot = tl.load(slots + row) * arena_slot
    key, value = head - HEADS, head - HEADS - KV_HEADS
    tl.store(k_arena + slot + key[:, None] * arena_head + d[None, :], turned, mask=turns & (key >= 0)[:, None])
    tl.store(v_arena + slot + value[:, None] * arena_head + d[None, :], x, mask=real & (value >= 0)[:, None])


@jit
def _silu_mul(gate_up, out, size, gate_up_row, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = column < size
    gate = tl.load(gate_up + row * gate_up_row + column, mask=real, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_row + size + column, mask=real, other=0.0).to(tl.float32)
    tl.store(out + row * size + column, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=real)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(normed, x + residual or None), contiguous, in x's dtype; x [T, D] or [T, heads, D]."""
    heads, size = (x.shape[1] if x.dim() == 3 else 1), x.shape[-1]
    x, weight = _dense_last(x), weight.contiguous()
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(normed)
    residual = None if residual is None else _dense_last(residual)
    width = next_power_of_2(size)
    block_rows, num_rows = max(1, ROWS_TILE // width), x.shape[0] * heads
    launch(
        _rms_norm, (cdiv(num_rows, block_rows),),
        x, residual, weight, normed, total, num_rows, *_steps(x), *((0, 0) if residual is None else _steps(residual)),
        size if weight.dim() == 2 else 0, eps,
        HEADS=heads, SIZE=size, BLOCK_ROWS=block_rows, WIDTH=width, num_warps=_warps(width), device=x.device,
    )  # fmt: skip
    return normed, total


def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, qk_norm: Tensor | None, eps: float, k_arena: Tensor, v_arena: Tensor, slots: Tensor
) -> Tensor:
    """Shapes as in small_ops.py -> q [T, Hq, D]."""
    qkv, cos, sin = _dense_last(qkv), cos.contiguous(), sin.contiguous()
    (num_rows, width), (_, num_kv_heads, head_dim) = qkv.shape, k_arena.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    q = torch.empty((num_rows, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    launch(
        _rope_write, (num_rows, cdiv(num_heads + 2 * num_kv_heads, HEADS_TILE)),
        qkv, cos, sin, None if qk_norm is None else qk_norm.contiguous(), q, k_arena, v_arena, slots.contiguous(), eps,
        qkv.stride(0), head_dim, k_arena.stride(0), k_arena.stride(1),
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_HEADS=HEADS_TILE, WIDTH=next_power_of_2(head_dim),
        num_warps=4, device=qkv.device,
    )  # fmt: skip
    return q


def silu_mul(gate_up: Tensor) -> Tensor:
    """[T, 2F] -> [T, F]."""
    gate_up = _dense_last(gate_up)
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, cdiv(size, SILU_TILE))
    launch(_silu_mul, grid, gate_up, out, size, gate_up.stride(0), BLOCK=SILU_TILE, num_warps=4, device=gate_up.device)
    return out


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _steps(x: Tensor) -> tuple[int, int]:
    """Strides of tokens and heads."""
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def _warps(width: int) -> int:
    return min(16, max(4, width // 512))


def _norm_variant(dtype: str, heads: int, size: int, residual: bool) -> Variant:
    signature = {name: f"*{dtype}:16" for name in ("x", "weight", "normed")} | {"num_rows": "i32", "eps": "fp32"}
    signature |= {name: f"*{dtype}:16" for name in ("residual", "total") if residual}
    signature |= {f"{name}_{what}": "i32:16" for name in ("x", "residual") for what in ("token", "head")} | {
        "weight_head": "i32:16"
    }
    width = next_power_of_2(size)
    constexprs: dict[str, int | None] = {"HEADS": heads, "SIZE": size, "BLOCK_ROWS": max(1, ROWS_TILE // width), "WIDTH": width}
    constexprs |= {} if residual else {"residual": None, "total": None}
    return Variant(_rms_norm, signature, constexprs, {"num_warps": _warps(width)})


def _rope_variant(dtype: str, heads: int, kv_heads: int, head_dim: int, normed: bool) -> Variant:
    names = ("qkv", "cos", "sin", "q_out", "k_arena", "v_arena", *(("qk_norm",) if normed else ()))
    signature = {name: f"*{dtype}:16" for name in names} | {"slots": "*i64:16", "eps": "fp32"}
    signature |= {name: "i32:16" for name in ("qkv_row", "cos_row", "arena_slot", "arena_head")}
    constexprs: dict[str, int | None] = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "BLOCK_HEADS": HEADS_TILE}
    constexprs |= {"WIDTH": next_power_of_2(head_dim)} | ({} if normed else {"qk_norm": None})
    return Variant(_rope_write, signature, constexprs, {"num_warps": 4})


VARIANTS = [
    _norm_variant("bf16", 1, 3584, residual=True),
    _norm_variant("bf16", 1, 896, residual=False),
    _norm_variant("fp32", 1, 8192, residual=True),
    _norm_variant("bf16", 32, 128, residual=False),
    _rope_variant("bf16", 28, 4, 128, normed=False),
    _rope_variant("bf16", 16, 8, 128, normed=True),
    _rope_variant("fp32", 14, 2, 80, normed=True),
    Variant(
        _silu_mul,
        {"gate_up": "*bf16:16", "out": "*bf16:16", "size": "i32:16", "gate_up_row": "i32:16"},
        {"BLOCK": SILU_TILE},
        {"num_warps": 4},
    ),
]
