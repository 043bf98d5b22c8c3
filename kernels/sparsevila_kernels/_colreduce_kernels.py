"""The kernels behind colreduce: row norms, and softmax weights summed by column.

Two passes over the keys; the first falls away when the caller brings the log-sum-exp.

    1  row norms  (row tile, KV head, key split)  peak and sum of its rows over its keys; a small kernel joins the splits in order
    2  columns    (key block, KV head)            keeps its keys, walks over all rows that see them, owns its part of the result

Nobody adds to what somebody else wrote: the same call gives the same bits. A group's query heads are rows like others (packed:
row * G + head), so that a key is read once for all of them; q, which is small then, is copied into that order, because a division
per address costs a fifth of the second pass (SASS for sm_90: 249 of 1034 instructions of its loop). In the first pass rows, in the
second keys are the M side of the tensor cores' tile: what is summed lies in one thread's registers and its three neighbours'.
Blocks in which every row sees every key are walked without masks. What remains per weight is an FMA, an exp2 and an addition;
from some 60 packed rows on exp2 (16 per clock and multiprocessor) is the limit, below it the memory that holds the keys.
"""

from __future__ import annotations

from ._device import dot, locate
from ._launch import jit, tl


@jit
def _norm(peak, total):
    """log2(total 2^peak), what a row's base-2 logits are lowered by; +inf if it has seen nothing, so that its weights are 0."""
    return tl.where(total > 0.0, peak + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))


@jit
def _see_keys(
    peak, total, a, a_rest, k, k_row, start, hi, row, shift, scale_log2,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys more for peak and total of a tile of rows."""
    d, e, index = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16), tl.arange(0, BLOCK_KEYS)
    held = index < hi - start
    at = k + tl.cast(start, tl.int64) * k_row + index[None, :] * k_row
    b = tl.load(at + d[:, None], mask=held[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
    logits = dot(a, b, UPCAST)
    if REST:
        b_rest = tl.load(at + e[:, None], mask=held[None, :] & (e < HEAD_DIM)[:, None], other=0.0)
        logits += dot(a_rest, b_rest, UPCAST)
    if MASKED:
        visible = held[None, :]
        if CAUSAL:
            visible = visible & ((start + index)[None, :] <= (row + shift)[:, None])
        logits = tl.where(visible, logits, float("-inf"))
    new = tl.maximum(peak, tl.max(logits, 1) * scale_log2)
    base = new
    if MASKED:  # a row that has seen nothing yet: exp2(-inf - 0) is 0, not NaN
        base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp2(peak - base) + tl.sum(tl.exp2(logits * scale_log2 - base[:, None]), 1)


@jit(do_not_specialize=["num_rows", "num_keys", "num_sequences"])
def row_norms(
    q, k, cu_rows, cu_keys, peaks, totals, num_rows, num_keys, num_sequences, q_packed, q_head, k_row, k_head, scale_log2,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """q [Hkv, M * GROUP, D]. With SPLIT: base-2 peak and sum of a row over one split of its keys -> peaks, totals [splits, ..].
    Without: its norm over all keys -> peaks [..]. A row of the result is [Hq / TOGETHER, M * TOGETHER], as `columns` reads it.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row, first_key, m, n = 0, 0, num_rows, num_keys
    if cu_rows is not None:
        sequence, tile = locate(cu_rows, num_sequences, tile, GROUP, BLOCK_ROWS, PAD)
        if sequence >= num_sequences:
            return
        first_row, first_key = tl.load(cu_rows + sequence), tl.load(cu_keys + sequence)
        m, n = tl.load(cu_rows + sequence + 1) - first_row, tl.load(cu_keys + sequence + 1) - first_key
    packed = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row, real = packed // GROUP, packed < m * GROUP
    lo, hi = 0, n
    if SPLIT:
        size = tl.maximum(LEAST, tl.cdiv(tl.cdiv(n, MOST), BLOCK_KEYS) * BLOCK_KEYS)
        lo, hi = split * size, tl.minimum(n, (split + 1) * size)
    seen_by_all = hi
    if CAUSAL:
        last_row = tl.minimum(m, (tile * BLOCK_ROWS + BLOCK_ROWS - 1) // GROUP + 1)
        seen_by_all = tl.minimum(hi, tile * BLOCK_ROWS // GROUP + 1 + n - m)
        hi = tl.minimum(hi, last_row + n - m)
    unmasked = lo + tl.maximum(seen_by_all - lo, 0) // BLOCK_KEYS * BLOCK_KEYS

    d, e = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16)
    at = q + kv_head.to(tl.int64) * q_head + (first_row * GROUP + packed).to(tl.int64)[:, None] * q_packed
    a = tl.load(at + d[None, :], mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    a_rest = a
    if REST:
        a_rest = tl.load(at + e[None, :], mask=real[:, None] & (e < HEAD_DIM)[None, :], other=0.0)
    k += kv_head.to(tl.int64) * k_head
    if cu_keys is not None:
        k += first_key.to(tl.int64) * k_row
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(lo, unmasked, BLOCK_KEYS):
        peak, total = _see_keys(
            peak, total, a, a_rest, k, k_row, start, hi, row, n - m, scale_log2,
            HEAD_DIM, MAIN, REST, CAUSAL, False, BLOCK_KEYS, UPCAST,
        )  # fmt: skip
    for start in range(unmasked, hi, BLOCK_KEYS):
        peak, total = _see_keys(
            peak, total, a, a_rest, k, k_row, start, hi, row, n - m, scale_log2,
            HEAD_DIM, MAIN, REST, CAUSAL, True, BLOCK_KEYS, UPCAST,
        )  # fmt: skip
    head = kv_head * GROUP + packed % GROUP
    out = (head // TOGETHER).to(tl.int64) * num_rows * TOGETHER + (first_row + row) * TOGETHER + head % TOGETHER
    if SPLIT:
        out += split.to(tl.int64) * num_rows * tl.num_programs(1) * GROUP
        tl.store(peaks + out, peak, mask=real)
        tl.store(totals + out, total, mask=real)
    else:
        tl.store(peaks + out, _norm(peak, total), mask=real)


@jit(do_not_specialize=["num", "num_splits"])
def join_splits(peaks, totals, norms, num, num_splits, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """Peaks and sums [splits, num] -> norms [num], always summed in the same order."""
    split, at = tl.arange(0, MOST), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = split.to(tl.int64)[:, None] * num + at[None, :]
    real = (split < num_splits)[:, None] & (at < num)[None, :]
    peak = tl.load(peaks + where, mask=real, other=float("-inf"))
    total = tl.load(totals + where, mask=real, other=0.0)
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(norms + at, _norm(base, tl.sum(total * tl.exp2(peak - base[None, :]), 0)), mask=at < num)


@jit
def _see_rows(
    reduced, a, a_rest, q, q_packed, norms, start, num_packed, key, shift, scale_log2,
    TOGETHER: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
    REDUCTION: tl.constexpr, BLOCK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of rows more for what a block of keys has been given."""
    d, e, index = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16), tl.arange(0, BLOCK_ROWS)
    real = index < num_packed - start
    at = q + tl.cast(start, tl.int64) * q_packed + index[None, :] * q_packed
    b = tl.load(at + d[:, None], mask=real[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
    logits = dot(a, b, UPCAST)
    if REST:
        b_rest = tl.load(at + e[:, None], mask=real[None, :] & (e < HEAD_DIM)[:, None], other=0.0)
        logits += dot(a_rest, b_rest, UPCAST)
    # Rows that are none, like those that see nothing, weigh exp2(x - inf) = 0.
    norm = tl.load(norms + start + index, mask=real, other=float("inf"))
    weight = tl.exp2(logits * scale_log2 - norm[None, :])
    if MASKED:
        weight = tl.where(key[:, None] <= ((start + index) // TOGETHER + shift)[None, :], weight, 0.0)
    if REDUCTION == "max":
        return tl.maximum(reduced, tl.max(weight, 1))
    return reduced + tl.sum(weight, 1)


@jit(do_not_specialize=["num_rows", "num_keys", "num_sequences"])
def columns(
    q, k, norms, cu_rows, cu_keys, out, num_rows, num_keys, num_sequences, q_packed, q_head, k_row, k_head, scale_log2,
    GROUP: tl.constexpr, TOGETHER: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    CAUSAL: tl.constexpr, REDUCTION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, PAD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Weights of a block of keys, reduced over rows -> out [Hq / TOGETHER, N]. TOGETHER heads of a group, one or all, are rows of
    one head: q [Hq / TOGETHER, M * TOGETHER, D], norms [Hq / TOGETHER, M * TOGETHER].
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    first_row, first_key, m, n = 0, 0, num_rows, num_keys
    if cu_keys is not None:
        sequence, tile = locate(cu_keys, num_sequences, tile, 1, BLOCK_KEYS, PAD)
        if sequence >= num_sequences:
            return
        first_row, first_key = tl.load(cu_rows + sequence), tl.load(cu_keys + sequence)
        m, n = tl.load(cu_rows + sequence + 1) - first_row, tl.load(cu_keys + sequence + 1) - first_key
    key, num_packed = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS), m * TOGETHER
    begin, unmasked = 0, 0
    if CAUSAL:  # from the first row that sees the block's first key; without masks from the first that sees its last
        last_key = tl.minimum(n, (tile + 1) * BLOCK_KEYS) - 1
        begin = tl.maximum(0, tile * BLOCK_KEYS - (n - m)) * TOGETHER // BLOCK_ROWS * BLOCK_ROWS
        unmasked = tl.cdiv(tl.maximum(0, last_key - (n - m)) * TOGETHER, BLOCK_ROWS) * BLOCK_ROWS

    d, e = tl.arange(0, MAIN), MAIN + tl.arange(0, REST if REST else 16)
    at = k + kv_head.to(tl.int64) * k_head + (first_key + key).to(tl.int64)[:, None] * k_row
    a = tl.load(at + d[None, :], mask=(key < n)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    a_rest = a
    if REST:
        a_rest = tl.load(at + e[None, :], mask=(key < n)[:, None] & (e < HEAD_DIM)[None, :], other=0.0)
    for part in range(GROUP // TOGETHER):
        head = (kv_head * (GROUP // TOGETHER) + part).to(tl.int64)
        own_q, own_norms = q + head * q_head, norms + head * num_rows * TOGETHER
        if cu_rows is not None:
            own_q += (first_row * TOGETHER).to(tl.int64) * q_packed
            own_norms += first_row * TOGETHER
        reduced = tl.zeros([BLOCK_KEYS], tl.float32)
        if CAUSAL:
            for start in range(begin, tl.minimum(unmasked, num_packed), BLOCK_ROWS):
                reduced = _see_rows(
                    reduced, a, a_rest, own_q, q_packed, own_norms, start, num_packed, key, n - m, scale_log2,
                    TOGETHER, HEAD_DIM, MAIN, REST, True, REDUCTION, BLOCK_ROWS, UPCAST,
                )  # fmt: skip
        for start in range(unmasked, num_packed, BLOCK_ROWS):
            reduced = _see_rows(
                reduced, a, a_rest, own_q, q_packed, own_norms, start, num_packed, key, n - m, scale_log2,
                TOGETHER, HEAD_DIM, MAIN, REST, False, REDUCTION, BLOCK_ROWS, UPCAST,
            )  # fmt: skip
        if REDUCTION == "mean":
            reduced = reduced / tl.maximum(m, 1)
        tl.store(out + head * num_keys + first_key + key, reduced, mask=key < n)
