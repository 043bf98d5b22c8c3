"""How much each key is attended to: softmax(q k^T) reduced over its rows, never written out as a matrix.

Knows: grouped heads (query head h reads KV head h // G), causal offsets, sequences packed one behind the other, a log-sum-exp
that the caller may bring. Does not know: values, policies, or what the sums are for.

Two passes over the keys; the first falls away when the caller brings the log-sum-exp.

    1  row_lse   (row tile, KV head, key split)   peak and sum of its rows over its keys; a small kernel joins the splits in order
    2  columns   (key block, KV head)             keeps its keys, walks over all rows that see them, owns its part of the result

Nobody adds to what somebody else wrote: the same call gives the same bits. A group's query heads are rows like others (row-major:
row * G + head), so that a key is read once for all of them. In the first pass rows, in the second keys are the M side of the
tensor cores' tile: what is summed then lies in one thread's registers and its three neighbours'.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ._colreduce_torch import colreduce_in_torch
from ._device import dot, locate, natural
from ._launch import INTERPRETED, Backend, Variant, cdiv, check_heads, choose, jit, launch, next_power_of_2, tl

# Keys of one split in the first pass. A sequence of n keys has at most 128 splits, of 256 keys or more; this depends on n alone,
# so a sequence's bits do not depend on its neighbours. 2 KV heads x 128 splits fill an H200's 132 multiprocessors about twice.
MIN_SPLIT, MAX_SPLITS = 256, 128
JOINED = 32  # rows x heads whose splits one program joins
LOG2_E = 1.4426950408889634
# More packed rows per sequence than this fill the GPU by themselves: one split.
MAX_ROWS_TO_SPLIT = 1024


@jit(do_not_specialize=["num_rows", "num_keys", "num_sequences"])
def _row_lse(
    q, k, cu_rows, cu_keys, peaks, totals, num_rows, num_keys, num_sequences, num_heads, q_row, q_head, k_row, k_head, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr,
    SPLIT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    PAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """With SPLIT: base-2 peak and sum of a row over one split of its keys -> peaks, totals [splits, M, Hq]. Without: the natural
    log-sum-exp over all keys -> peaks [M, Hq]."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, first_key, m, n = 0, 0, num_rows, num_keys
    if cu_rows is not None:
        sequence, tile = locate(cu_rows, num_sequences, tile, GROUP, BLOCK_ROWS, PAD)
        if sequence >= num_sequences:
            return
        first_row, first_key = tl.load(cu_rows + sequence), tl.load(cu_keys + sequence)
        m, n = tl.load(cu_rows + sequence + 1) - first_row, tl.load(cu_keys + sequence + 1) - first_key
    packed = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    real = row < m
    lo, hi = 0, n
    if SPLIT:
        size = tl.maximum(LEAST, tl.cdiv(tl.cdiv(n, MOST), BLOCK_KEYS) * BLOCK_KEYS)
        lo, hi = split * size, tl.minimum(n, (split + 1) * size)
    if CAUSAL:
        last_row = tl.minimum(m, (tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + 1)
        hi = tl.minimum(hi, last_row + n - m)

    d, e = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16)
    q += (first_row + row).to(tl.int64)[:, None] * q_row + head.to(tl.int64)[:, None] * q_head
    a = tl.load(q + d[None, :], mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if REST:
        a_rest = tl.load(q + e[None, :], mask=real[:, None] & (e < HEAD_DIM)[None, :], other=0.0)
    k += kv_head.to(tl.int64) * k_head
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(lo, hi, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        at = k + (first_key + key).to(tl.int64)[None, :] * k_row
        b = tl.load(at + d[:, None], mask=(key < hi)[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        logits = dot(a, b, UPCAST)
        if REST:
            b_rest = tl.load(at + e[:, None], mask=(key < hi)[None, :] & (e < HEAD_DIM)[:, None], other=0.0)
            logits += dot(a_rest, b_rest, UPCAST)
        visible = (key < hi)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= row[:, None] + (n - m))
        logits = tl.where(visible, logits * scale_log2, float("-inf"))
        new = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet: exp2(-inf - 0) is 0, not NaN
        total = total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        peak = new
    out = (first_row + row).to(tl.int64) * num_heads + head
    if SPLIT:
        out += split.to(tl.int64) * num_rows * num_heads
        tl.store(peaks + out, peak, mask=real)
        tl.store(totals + out, total, mask=real)
    else:
        tl.store(peaks + out, natural(peak, total), mask=real)


@jit(do_not_specialize=["num", "num_splits"])
def _join_splits(peaks, totals, lse, num, num_splits, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """Peaks and sums [splits, num] -> natural log-sum-exps [num], always summed in the same order."""
    split, at = tl.arange(0, SPLITS), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = split.to(tl.int64)[:, None] * num + at[None, :]
    real = (split < num_splits)[:, None] & (at < num)[None, :]
    peak = tl.load(peaks + where, mask=real, other=float("-inf"))
    total = tl.load(totals + where, mask=real, other=0.0)
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    joined = tl.sum(total * tl.exp2(peak - base[None, :]), 0)
    tl.store(lse + at, natural(top, joined), mask=at < num)


@jit(do_not_specialize=["num_rows", "num_keys", "num_sequences"])
def _columns(
    q, k, lse, cu_rows, cu_keys, out, num_rows, num_keys, num_sequences,
    q_row, q_head, k_row, k_head, lse_row, lse_head, scale_log2,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    CAUSAL: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Weights of a block of keys, reduced over rows and TOGETHER heads of its group -> out [Hq / TOGETHER, N]."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first_row, first_key, m, n = 0, 0, num_rows, num_keys
    if cu_keys is not None:
        sequence, tile = locate(cu_keys, num_sequences, tile, 1, BLOCK_KEYS, PAD)
        if sequence >= num_sequences:
            return
        first_row, first_key = tl.load(cu_rows + sequence), tl.load(cu_keys + sequence)
        m, n = tl.load(cu_rows + sequence + 1) - first_row, tl.load(cu_keys + sequence + 1) - first_key
    key = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    first_seeing = 0
    if CAUSAL:  # the first row that sees the first key of this block
        first_seeing = tl.maximum(0, tile * BLOCK_KEYS - (n - m))

    d, e = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16)
    k += (first_key + key).to(tl.int64)[:, None] * k_row + kv_head.to(tl.int64) * k_head
    a = tl.load(k + d[None, :], mask=(key < n)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    if REST:
        a_rest = tl.load(k + e[None, :], mask=(key < n)[:, None] & (e < HEAD_DIM)[None, :], other=0.0)
    for part in range(GROUP // TOGETHER):
        reduced = tl.zeros([BLOCK_KEYS], tl.float32)
        for start in range(first_seeing * TOGETHER // BLOCK_ROWS * BLOCK_ROWS, m * TOGETHER, BLOCK_ROWS):
            packed = start + tl.arange(0, BLOCK_ROWS)
            row, head = packed // TOGETHER, kv_head * GROUP + part * TOGETHER + packed % TOGETHER
            real = row < m
            place = (first_row + row).to(tl.int64)
            at = q + place[None, :] * q_row + head.to(tl.int64)[None, :] * q_head
            b = tl.load(at + d[:, None], mask=real[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
            logits = dot(a, b, UPCAST)
            if REST:
                b_rest = tl.load(at + e[:, None], mask=real[None, :] & (e < HEAD_DIM)[:, None], other=0.0)
                logits += dot(a_rest, b_rest, UPCAST)
            # Rows that are none, and rows that see nothing (log-sum-exp -inf), weigh exp2(x - inf) = 0.
            norm = tl.load(lse + place * lse_row + head * lse_head, mask=real, other=float("inf")) * 1.4426950408889634
            norm = tl.where(norm == float("-inf"), float("inf"), norm)
            weight = tl.exp2(logits * scale_log2 - norm[None, :])
            if CAUSAL:
                weight = tl.where(key[:, None] <= row[None, :] + (n - m), weight, 0.0)
            if REDUCTION == "max":
                reduced = tl.maximum(reduced, tl.max(weight, 1))
            else:
                reduced += tl.sum(weight, 1)
        if REDUCTION == "mean":
            reduced = reduced / tl.maximum(m, 1)
        place = (kv_head * (GROUP // TOGETHER) + part).to(tl.int64) * num_keys + first_key + key
        tl.store(out + place, reduced, mask=key < n)


def colreduce(
    q: Tensor,
    k: Tensor,
    *,
    reduction: Literal["sum", "mean", "max"] = "sum",
    heads: Literal["each", "mean"] = "each",
    causal: bool = False,
    scale: float | None = None,
    cu_rows: Tensor | None = None,
    cu_keys: Tensor | None = None,
    lse: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The sum, mean or maximum of softmax(scale q k^T) over its rows: f32 [Hq, N], or [N] with the mean over query heads.

    q [M, Hq, D] and k [N, Hkv, D] of one dtype (bf16, fp16, fp32), any stride but 1 along D; Hkv divides Hq. `scale` is D^-0.5 by
    default. `cu_rows` and `cu_keys` i32 [B + 1], on the same device and ending at M and N, cut them into B sequences that know
    nothing of each other; any of them may be empty. `causal`: row i of m sees the keys up to i + (n - m); a row that sees none
    counts as 0. "mean" divides by the number m of rows of the sequence. `lse` f32 [M, Hq] is the natural log-sum-exp of each row
    over whatever keys it is to be normalised by (also others than k); with it k is read once instead of twice.

    Raises ValueError for shapes, dtypes, strides and words other than these. The result is deterministic, and a sequence's part
    of it depends on its neighbours only through the average number of rows, which chooses the tiles.
    """
    _check(q, k, reduction, heads, cu_rows, cu_keys, lse)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if choose(backend, q) == "torch":
        return colreduce_in_torch(q, k, reduction, heads, causal, scale, cu_rows, cu_keys, lse)
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    num_sequences = 1 if cu_rows is None else len(cu_rows) - 1
    group = num_heads // num_kv_heads
    together = group if heads == "mean" and reduction != "max" else 1
    shape = num_heads // together, num_keys
    # Where the bounds may leave keys out, or all rows away, nobody writes: 0 is right.
    make = torch.zeros if cu_keys is not None or not num_rows else torch.empty
    out = make(shape, dtype=torch.float32, device=q.device)
    if num_rows and num_keys:
        shared = _shared(head_dim, group, causal, num_sequences)
        tiles = _tiles(q.dtype, cdiv(num_rows, num_sequences), group, together)
        if lse is None:
            lse = _row_lses(q, k, cu_rows, cu_keys, num_sequences, scale, tiles[0], shared)
        launch(
            _columns, (cdiv(num_keys, tiles[1]["BLOCK_KEYS"]) + num_sequences - 1, num_kv_heads), q, k, lse, cu_rows, cu_keys, out,
            num_rows, num_keys, num_sequences, *q.stride()[:2], *k.stride()[:2], *lse.stride(), scale * LOG2_E,
            device=q.device, TOGETHER=together, REDUCTION=reduction, **tiles[1], **shared,
        )  # fmt: skip
    if heads == "each":
        return out
    return out.sum(0) / num_heads


def _row_lses(
    q: Tensor, k: Tensor, cu_rows: Tensor | None, cu_keys: Tensor | None, num_sequences: int, scale: float,
    tiles: dict[str, int], shared: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The first pass -> f32 [M, Hq], natural."""
    num_rows, num_heads, num_keys = *q.shape[:2], len(k)
    num_packed = num_rows * shared["GROUP"]
    split = cdiv(num_packed, num_sequences) <= MAX_ROWS_TO_SPLIT
    num_splits = min(MAX_SPLITS, cdiv(num_keys, MIN_SPLIT)) if split else 1
    peaks = q.new_empty((num_splits, num_rows, num_heads), dtype=torch.float32)
    totals = torch.empty_like(peaks) if split else peaks
    grid = cdiv(num_packed, tiles["BLOCK_ROWS"]) + num_sequences - 1, k.shape[1], num_splits
    launch(
        _row_lse, grid, q, k, cu_rows, cu_keys, peaks, totals,
        num_rows, num_keys, num_sequences, num_heads, *q.stride()[:2], *k.stride()[:2], scale * LOG2_E,
        device=q.device, SPLIT=split, LEAST=MIN_SPLIT, MOST=MAX_SPLITS, **tiles, **shared,
    )  # fmt: skip
    if not split:
        return peaks[0]
    lse = peaks.new_empty(num_rows, num_heads)
    grid = (cdiv(lse.numel(), JOINED),)
    launch(
        _join_splits, grid, peaks, totals, lse, lse.numel(), num_splits,
        device=q.device, BLOCK=JOINED, SPLITS=next_power_of_2(num_splits), num_warps=4,
    )  # fmt: skip
    return lse


def _tiles(dtype: torch.dtype, num_rows: int, group: int, together: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of both passes, for about `num_rows` rows per sequence."""
    if dtype == torch.float32:  # no tensor cores: exact products in registers
        tile = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 2}
        return tile, dict(tile)
    first, second = (min(limit, max(16, next_power_of_2(num_rows * times))) for limit, times in ((128, group), (64, together)))
    return (
        {"BLOCK_ROWS": first, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_ROWS": second, "BLOCK_KEYS": 128, "num_warps": 4, "num_stages": 3},
    )


def _shared(head_dim: int, group: int, causal: bool, num_sequences: int, upcast: bool = INTERPRETED) -> dict[str, Any]:
    """What both passes are specialised for. A head dimension is a power of two and one more that covers the rest: 80 = 64 + 16,
    not 128, which would be 60 % more multiplications."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(16, next_power_of_2(head_dim - main)) if head_dim > main else 0
    return {
        "GROUP": group, "HEAD_DIM": head_dim, "MAIN": main, "REST": rest, "CAUSAL": causal,
        "PAD": next_power_of_2(num_sequences), "UPCAST": upcast,
    }  # fmt: skip


def _check(
    q: Tensor, k: Tensor, reduction: str, heads: str, cu_rows: Tensor | None, cu_keys: Tensor | None, lse: Tensor | None
) -> None:
    if reduction not in ("sum", "mean", "max") or heads not in ("each", "mean"):
        raise ValueError(f"reduction {reduction!r}, heads {heads!r}: legal are 'sum', 'mean', 'max' and 'each', 'mean'")
    check_heads(q, k, "k")
    if (cu_rows is None) != (cu_keys is None):
        raise ValueError("cu_rows and cu_keys: give both or neither")
    if cu_rows is not None and cu_keys is not None:
        if cu_rows.dtype != torch.int32 or cu_keys.dtype != torch.int32 or cu_rows.shape != cu_keys.shape or cu_rows.dim() != 1:
            raise ValueError(f"cu_rows {tuple(cu_rows.shape)}, cu_keys {tuple(cu_keys.shape)}: both must be int32 [B + 1]")
        if len(cu_rows) < 2:
            raise ValueError("cu_rows: an int32 [B + 1] of at least one sequence is needed")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != q.shape[:2]):
        raise ValueError(f"lse {lse.dtype} {tuple(lse.shape)}: must be float32 {tuple(q.shape[:2])}")


def _variants() -> list[Variant]:
    """As the engines launch it: a question's rows against a long prefix, a vision tower's segments, and exact fp32."""
    numbers = {name: "i32" for name in ("num_rows", "num_keys", "num_sequences")}
    strides = {name: "i32:16" for name in ("q_row", "q_head", "k_row", "k_head", "lse_row")}
    variants = []
    for dtype, kind, head_dim, group, num_rows, causal, together, several in (
        (torch.bfloat16, "bf16", 128, 7, 32, True, 7, False),
        (torch.float16, "fp16", 128, 4, 8, True, 1, False),
        (torch.bfloat16, "bf16", 80, 1, 1024, False, 1, True),
        (torch.float32, "fp32", 128, 7, 32, True, 7, True),
    ):
        types = {"q": f"*{kind}:16", "k": f"*{kind}:16", **numbers, **strides, "scale_log2": "fp32"}
        bounds = {"cu_rows": "*i32:16", "cu_keys": "*i32:16"} if several else {}
        shared = {**_shared(head_dim, group, causal, 64 if several else 1, upcast=False)}
        absent = {} if several else {"cu_rows": None, "cu_keys": None}
        first, second = _tiles(dtype, num_rows, group, together)
        options = {name: first.pop(name) for name in ("num_warps", "num_stages")}
        split = {"SPLIT": num_rows * group <= MAX_ROWS_TO_SPLIT, "LEAST": MIN_SPLIT, "MOST": MAX_SPLITS}
        partial = {"peaks": "*fp32:16", "totals": "*fp32:16", "num_heads": "i32"}
        del types["lse_row"]
        variants.append(Variant(_row_lse, {**types, **bounds, **partial}, {**shared, **split, **first, **absent}, options))
        options = {name: second.pop(name) for name in ("num_warps", "num_stages")}
        types |= {"lse": "*fp32:16", "lse_row": "i32", "out": "*fp32:16"}
        constants = {**shared, **second, **absent, "TOGETHER": together, "REDUCTION": "sum", "lse_head": 1}
        variants.append(Variant(_columns, {**types, **bounds}, constants, options))
    joined = {"peaks": "*fp32:16", "totals": "*fp32:16", "lse": "*fp32:16", "num": "i32", "num_splits": "i32"}
    variants.append(Variant(_join_splits, joined, {"BLOCK": JOINED, "SPLITS": MAX_SPLITS}, {"num_warps": 4}))
    return variants


VARIANTS = _variants()
