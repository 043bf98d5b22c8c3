"""A few new rows of many sequences against keys and values that lie in arenas, all in one launch.

    split  0         1         2         3           one program each: (sequence and tile of its rows, KV head, split)
           [--------][--------][--------][----]      size = max(256, ceil(n / 64) rounded up to 64) keys of the sequence's own n
    span   [----------- 0 -----------][-- 1 --]      a split may lie in both

Each split leaves its softmax-weighted sum and log-sum-exp in a workspace; a second kernel joins a row's splits in order. How a
sequence is cut depends on its own length alone, and nothing is added atomically: a row's bits do not depend on who else is in
the batch. The grid depends on shapes alone and the spans are read on the device: the launch can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._decode_torch import decode_in_torch
from ._device import dot, natural
from ._launch import INTERPRETED, Backend, Variant, cdiv, check_heads, choose, jit, launch, next_power_of_2, tl

Pools = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

MIN_SPLIT, MAX_SPLITS, SPLIT_STEP = 256, 64, 64
# The partial results of one launch; more rows than fit are taken in several launches.
MAX_WORKSPACE_BYTES = 256 * 1024 * 1024
LOG2_E = 1.4426950408889634
LEAST_PAD = 16  # bounds that a program of the second kernel reads at once: one kernel for all small numbers of sequences


@jit
def _split_size(num_keys, LEAST: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr):
    return tl.maximum(LEAST, tl.cdiv(tl.cdiv(num_keys, MOST), STEP) * STEP)


@jit(do_not_specialize=["first", "num_window", "num_tiles", "splits"])
def _attend_split(
    q, k0, v0, k1, v1, spans, cu_rows, partial, partial_lse, first, num_window, num_tiles, splits, num_heads, q_row, q_head,
    k0_slot, k0_head, v0_slot, v0_head, k1_slot, k1_head, v1_slot, v1_head, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of rows x heads over one split of the keys -> partial f32 [window, Hq, splits, D], partial_lse [.., splits] base 2.

    Rows [first, first + num_window) of all are this launch's.
    """
    sequence, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    kv_head, split = tl.program_id(1), tl.program_id(2)
    spans += sequence * 6
    pool_a, start_a, num_a = tl.load(spans), tl.load(spans + 1), tl.load(spans + 2)
    pool_b, start_b, num_b = tl.load(spans + 3), tl.load(spans + 4), tl.load(spans + 5)
    num_keys = num_a + num_b
    first_row, num_rows = sequence, 1
    if cu_rows is not None:
        first_row = tl.load(cu_rows + sequence)
        num_rows = tl.load(cu_rows + sequence + 1) - first_row
    size = _split_size(num_keys, LEAST, MOST, STEP)
    lo, hi = split * size, tl.minimum(num_keys, (split + 1) * size)
    packed = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    place = first_row + row - first
    real = (row < num_rows) & (place >= 0) & (place < num_window)
    if lo >= hi or tl.max(real.to(tl.int32), 0) == 0:
        return  # the joining kernel knows that this split holds nothing

    # Which arena each span lies in.
    k_a, v_a, k_a_slot, v_a_slot = k0 + kv_head.to(tl.int64) * k0_head, v0 + kv_head.to(tl.int64) * v0_head, k0_slot, v0_slot
    k_b, v_b, k_b_slot, v_b_slot = k_a, v_a, k0_slot, v0_slot
    k_1, v_1 = k1 + kv_head.to(tl.int64) * k1_head, v1 + kv_head.to(tl.int64) * v1_head
    if pool_a == 1:
        k_a, v_a, k_a_slot, v_a_slot = k_1, v_1, k1_slot, v1_slot
    if pool_b == 1:
        k_b, v_b, k_b_slot, v_b_slot = k_1, v_1, k1_slot, v1_slot

    d = tl.arange(0, WIDTH)
    inside = d < HEAD_DIM
    at = (first_row + row).to(tl.int64) * q_row + head.to(tl.int64) * q_head
    queries = tl.load(q + at[:, None] + d[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    last = num_keys - num_rows + row  # the last key that a row sees
    hi = tl.minimum(hi, num_keys - num_rows + tl.minimum(num_rows, (tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + 1))
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, WIDTH], tl.float32)
    # Blocks of keys lie in one span each, so that a block's address is one scalar and its rows are read 16 bytes at a time:
    # an address chosen per key costs that (measured: 2 wide loads of 16, and spills).
    stop_a, start_in_b = tl.minimum(hi, num_a), tl.maximum(lo, num_a)
    num_blocks_a = tl.cdiv(tl.maximum(stop_a - lo, 0), BLOCK_KEYS)
    num_blocks = num_blocks_a + tl.cdiv(tl.maximum(hi - start_in_b, 0), BLOCK_KEYS)
    index = tl.arange(0, BLOCK_KEYS)
    for block in range(0, num_blocks):
        is_a = block < num_blocks_a
        start = tl.where(is_a, lo + block * BLOCK_KEYS, start_in_b + (block - num_blocks_a) * BLOCK_KEYS)
        stop = tl.where(is_a, stop_a, hi)
        slot = (tl.where(is_a, start_a, start_b - num_a) + start).to(tl.int64)
        k_slot, v_slot = tl.where(is_a, k_a_slot, k_b_slot), tl.where(is_a, v_a_slot, v_b_slot)
        k_at, v_at = tl.where(is_a, k_a, k_b) + slot * k_slot, tl.where(is_a, v_a, v_b) + slot * v_slot
        key, held = start + index, index < stop - start
        k_at += index[None, :] * k_slot + d[:, None]
        keys = tl.load(k_at, mask=held[None, :] & inside[:, None], other=0.0)
        visible = held[None, :] & (key[None, :] <= last[:, None])
        logits = tl.where(visible, dot(queries, keys, UPCAST) * scale_log2, float("-inf"))
        new = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # nothing seen yet: exp2(-inf - 0) is 0, not NaN
        weight, fade = tl.exp2(logits - base[:, None]), tl.exp2(peak - base)
        v_at += index[:, None] * v_slot + d[None, :]
        values = tl.load(v_at, mask=held[:, None] & inside[None, :], other=0.0)
        mixed = mixed * fade[:, None] + dot(weight.to(values.dtype) if not UPCAST else weight, values, UPCAST)
        total = total * fade + tl.sum(weight, 1)
        peak = new
    seen = total > 0.0
    share = tl.where(seen, total, 1.0)
    out = (place.to(tl.int64) * num_heads + head) * splits + split
    tl.store(partial + out[:, None] * HEAD_DIM + d[None, :], mixed / share[:, None], mask=real[:, None] & inside[None, :])
    tl.store(partial_lse + out, tl.where(seen, peak + tl.log2(share), float("-inf")), mask=real)


@jit(do_not_specialize=["first", "num_sequences", "splits"])
def _join_splits(
    partial, partial_lse, spans, cu_rows, out, lse, first, num_sequences, splits, num_heads, out_row, out_head,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PAD: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row of one head: its splits, weighted by 2^log-sum-exp, -> out [T, Hq, D] and the natural lse [T, Hq]."""
    place, head = tl.program_id(0), tl.program_id(1)
    row = first + place
    sequence = row
    if cu_rows is not None:  # the last sequence that begins at or before this row
        index = tl.arange(0, PAD)
        begins = tl.load(cu_rows + 1 + index, mask=index < num_sequences, other=2147483647)
        sequence = tl.sum((begins <= row).to(tl.int32), 0)
    if sequence >= num_sequences:
        return
    num_keys = tl.load(spans + sequence * 6 + 2) + tl.load(spans + sequence * 6 + 5)
    num_splits = tl.cdiv(num_keys, _split_size(num_keys, LEAST, MOST, STEP))
    split, d = tl.arange(0, MOST), tl.arange(0, WIDTH)
    held = split < num_splits
    # 64 bits up to the row's first split, 32 within it: with 64 throughout, ptxas 12.8 spills on sm_90.
    begin = (place.to(tl.int64) * num_heads + head) * splits
    partial, partial_lse = partial + begin * HEAD_DIM, partial_lse + begin
    logs = tl.load(partial_lse + split, mask=held, other=float("-inf"))
    top = tl.max(logs, 0)
    weight = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    parts = tl.load(partial + split[:, None] * HEAD_DIM + d[None, :], mask=held[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    joined = tl.sum(parts * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row.to(tl.int64) * out_row + head * out_head + d, joined.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    if lse is not None:
        tl.store(lse + row.to(tl.int64) * num_heads + head, natural(top, total))


def decode_attention(
    q: Tensor,
    pools: Pools,
    spans: Tensor,
    *,
    cu_rows: Tensor | None = None,
    max_rows: int = 1,
    scale: float | None = None,
    max_keys: int | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last rows of B sequences to all their keys -> [T, Hq, D] of q's dtype, and with `return_lse` f32 [T, Hq].

    q [T, Hq, D]. pools ((k, v), (k, v)): arenas [slots, Hkv, D] of q's dtype, stride 1 along D. spans i32 [B, 2, 3] on q's device:
    per sequence two times (pool, start, length); its keys are those of the first span, then those of the second. Lengths may be
    0; a row without any key gives 0 and the log-sum-exp -inf. Without `cu_rows` each sequence has one row (T = B), which sees all
    its keys. With it, i32 [B + 1], rows cu_rows[b]:cu_rows[b + 1] (at most `max_rows`) are the last of the second span and see
    the keys up to and including their own. The log-sum-exp is natural, of the scaled logits; `scale` is D^-0.5 by default.

    `max_keys` is a promise that no sequence is longer; it makes the grid smaller and changes no bit. With `max_rows` 1 a row's bits
    do not depend on the other sequences. Triton's path reads no device value on the host. Raises ValueError for shapes and dtypes
    other than these; values on the device are not checked.
    """
    _check(q, pools, spans, cu_rows, max_rows)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose(backend, q) == "torch":
        attended, norms = decode_in_torch(q, pools, spans, cu_rows, scale, return_lse)
        return attended if norms is None else (attended, norms)
    num_rows, num_heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(num_rows, num_heads, dtype=torch.float32) if return_lse else None
    num_splits = MAX_SPLITS if max_keys is None else max(1, min(MAX_SPLITS, cdiv(max_keys, MIN_SPLIT)))
    window = max(1, MAX_WORKSPACE_BYTES // (num_heads * num_splits * (head_dim + 1) * 4))
    for first in range(0, num_rows, window):
        _launch_window(q, pools, spans, cu_rows, max_rows, scale, out, lse, first, min(window, num_rows - first), num_splits)
    return out if lse is None else (out, lse)


def _launch_window(
    q: Tensor, pools: Pools, spans: Tensor, cu_rows: Tensor | None, max_rows: int, scale: float, out: Tensor, lse: Tensor | None,
    first: int, num_window: int, num_splits: int,
) -> None:  # fmt: skip
    """Both kernels for rows [first, first + num_window)."""
    (_, num_heads, head_dim), ((k0, v0), (k1, v1)) = q.shape, pools
    num_sequences, group = len(spans), num_heads // k0.shape[1]
    partial = q.new_empty(num_window, num_heads, num_splits, head_dim, dtype=torch.float32)
    partial_lse = partial.new_empty(num_window, num_heads, num_splits)
    tiles = _tiles(q.dtype, head_dim, max_rows * group)
    num_tiles = cdiv(max_rows * group, tiles["BLOCK_ROWS"])
    shared = {"HEAD_DIM": head_dim, "WIDTH": _width(head_dim), **CUT}
    strides = (stride for x in (k0, v0, k1, v1) for stride in x.stride()[:2])
    launch(
        _attend_split, (num_sequences * num_tiles, k0.shape[1], num_splits),
        q, k0, v0, k1, v1, spans, cu_rows, partial, partial_lse,
        first, num_window, num_tiles, num_splits, num_heads, *q.stride()[:2], *strides, scale * LOG2_E,
        device=q.device, GROUP=group, UPCAST=INTERPRETED, **tiles, **shared,
    )  # fmt: skip
    launch(
        _join_splits, (num_window, num_heads), partial, partial_lse, spans, cu_rows, out, lse,
        first, num_sequences, num_splits, num_heads, *out.stride()[:2],
        device=q.device, PAD=1 if cu_rows is None else max(LEAST_PAD, next_power_of_2(num_sequences)), num_warps=4, **shared,
    )  # fmt: skip


CUT = {"LEAST": MIN_SPLIT, "MOST": MAX_SPLITS, "STEP": SPLIT_STEP}


def _width(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


def _tiles(dtype: torch.dtype, head_dim: int, num_packed: int) -> dict[str, Any]:
    """Tile sizes and launch options for `num_packed` rows x heads of a KV head.

    A decode row: 16 x 64, read off the code for sm_90 and head dimension 128, not measured: 144 registers and 72 kB of shared
    memory, so three blocks per multiprocessor, each with 64 kB of keys and values on the way: 192 kB, where 5 TB/s at 1 us need
    40. Its 366 instructions per warp and 32 kB are 0.6 us of the 2.7 us that memory takes for the three.
    """
    if dtype == torch.float32:  # no tensor cores; larger tiles spill
        return {"BLOCK_ROWS": 16, "BLOCK_KEYS": 16, "num_warps": 4, "num_stages": 2}
    many, keys = (64, 64) if head_dim <= 128 else (32, 32)
    few = num_packed <= 16
    return {"BLOCK_ROWS": 16 if few else many, "BLOCK_KEYS": keys, "num_warps": 4 if few else 8, "num_stages": 3}


def _check(q: Tensor, pools: Pools, spans: Tensor, cu_rows: Tensor | None, max_rows: int) -> None:
    for p, (k, v) in enumerate(pools):
        check_heads(q, k, f"k of pool {p}")
        if k.shape != v.shape or k.shape[1:] != pools[0][0].shape[1:]:
            raise ValueError(f"pool {p}: k {tuple(k.shape)}, v {tuple(v.shape)}: need one shape, and one [Hkv, D] in both pools")
        if v.dtype != k.dtype or v.device != k.device or v.stride(-1) != 1:
            raise ValueError(f"v of pool {p}: {v.dtype} on {v.device}, strides {v.stride()}: need k's dtype and device, stride 1")
    if spans.dtype != torch.int32 or spans.dim() != 3 or spans.shape[1:] != (2, 3) or not spans.is_contiguous():
        raise ValueError(f"spans {spans.dtype} {tuple(spans.shape)}: must be contiguous int32 [B, 2, 3]")
    if max_rows < 1:
        raise ValueError(f"max_rows {max_rows}: must be at least 1")
    if cu_rows is None and (len(q) != len(spans) or max_rows != 1):
        raise ValueError(f"q of {len(q)} rows, {len(spans)} sequences, max_rows {max_rows}: without cu_rows each has one row")
    if cu_rows is not None and (cu_rows.dtype != torch.int32 or cu_rows.shape != (len(spans) + 1,)):
        raise ValueError(f"cu_rows {cu_rows.dtype} {tuple(cu_rows.shape)}: must be int32 [{len(spans) + 1}]")


def _variants() -> list[Variant]:
    """As the engines launch it: a decode step, a question's rows, and exact fp32."""
    arenas = [f"{part}{pool}" for pool in (0, 1) for part in "kv"]
    strides = [f"{name}_{axis}" for name in arenas for axis in ("slot", "head")] + ["q_row", "q_head"]
    variants = []
    for dtype, kind, head_dim, group, max_rows in (
        (torch.bfloat16, "bf16", 128, 7, 1),
        (torch.float16, "fp16", 80, 1, 1),
        (torch.bfloat16, "bf16", 128, 7, 64),
        (torch.float32, "fp32", 128, 7, 1),
    ):
        tiles = _tiles(dtype, head_dim, max_rows * group)
        options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
        types = {name: f"*{kind}:16" for name in ("q", *arenas)} | {name: "i32:16" for name in strides}
        types |= {"spans": "*i32:16", "partial": "*fp32:16", "partial_lse": "*fp32:16", "scale_log2": "fp32"}
        types |= {name: "i32" for name in ("first", "num_window", "num_tiles", "splits", "num_heads")}
        shared = {"HEAD_DIM": head_dim, "WIDTH": _width(head_dim), **CUT}
        bounds: dict[str, Any] = {"cu_rows": None} if max_rows == 1 else {}
        types |= {} if max_rows == 1 else {"cu_rows": "*i32:16"}
        variants.append(Variant(_attend_split, types, {**shared, **tiles, **bounds, "GROUP": group, "UPCAST": False}, options))
        joined = {name: "*fp32:16" for name in ("partial", "partial_lse", "lse")} | {"spans": "*i32:16", "out": f"*{kind}:16"}
        joined |= {name: "i32" for name in ("first", "num_sequences", "splits", "num_heads")}
        joined |= {name: "i32:16" for name in ("out_row", "out_head")}
        joined |= {} if max_rows == 1 else {"cu_rows": "*i32:16"}
        constants = {**shared, **bounds, "PAD": 16}
        variants.append(Variant(_join_splits, joined, constants, {"num_warps": 4}))
    return variants


VARIANTS = _variants()
