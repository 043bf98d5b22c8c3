"""Cases of `colreduce` and `decode_attention`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.device_clock import DTYPES
from benchmarks.lib.flop_counts import Work
from benchmarks.lib.ops.op_case import KEEPS, PACK, Case, Sizes, Subject, random, ways

TAIL = 64
"""Keys of a conversation's own text in a decode step."""


def cases(sizes: Sizes) -> Iterator[Case]:
    """Retrieval with and without the log-sum-exp of each row, salience, then decode steps dense and packed."""
    many = sizes.rows[len(sizes.rows) // 2]
    for keys in sizes.keys:
        for rows in sizes.rows:
            for lse in (False, True):
                if lse and rows != many:
                    continue
                shape = f"retrieval, {rows} rows x {keys} keys" + ", lse given" * lse
                main = (rows, keys, lse) == (many, sizes.keys[0], False)
                told = {"rows": rows, "keys": keys}
                yield Case("colreduce", shape, sizes.dtype, Retrieval(sizes, rows, keys, lse), main, told)
    shape = f"salience, {sizes.frame_groups} x {sizes.patches} patches"
    told = {"rows": sizes.patches, "keys": sizes.patches, "batch": sizes.frame_groups}
    yield Case("colreduce", shape, sizes.dtype, Salience(sizes), sizes=told)
    middle = sizes.tokens[min(1, len(sizes.tokens) - 1)]
    kept = sorted({max(1, round(num * share)) for num in sizes.tokens for share in (*KEEPS, KEEPS[-1] * PACK)})
    for num in kept:
        for batch in sizes.batches:
            if batch > sizes.small_batch and num != middle and not sizes.all_batches:
                continue
            main = (num, batch) == (middle, sizes.small_batch)
            told = {"batch": batch, "keys": num + TAIL}
            shape = f"batch {batch}, {num + TAIL} keys"
            yield Case("decode_attention", shape, sizes.dtype, Step(sizes, [num + TAIL] * batch), main, told)
    batch = sizes.batches[-1]
    if batch > 1:
        lengths = [max(1, middle * (i + 1) // batch) + TAIL for i in range(batch)]
        told = {"batch": batch, "keys": max(lengths)}
        shape = f"batch {batch}, {min(lengths)}-{max(lengths)} keys"
        yield Case("decode_attention", shape, sizes.dtype, Step(sizes, lengths), sizes=told)


class Retrieval:
    """The rows of a question over all keys of a media prefix."""

    def __init__(self, sizes: Sizes, rows: int, keys: int, lse: bool):
        self.sizes, self.rows, self.keys, self.lse = sizes, rows, keys, lse

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        s, dtype = self.sizes, DTYPES[self.sizes.dtype]
        q = random((self.rows, s.num_heads, s.head_dim), dtype, device, 1)
        k = random((self.keys, s.num_kv_heads, s.head_dim), dtype, device, 2)
        given: dict[str, Any] = {"lse": _log_sum_exp(q, k)} if self.lse else {}
        flop = 2.0 * self.rows * self.keys * s.num_heads * s.head_dim
        work = Work(flop, q.nbytes + k.nbytes + 4.0 * s.num_heads * self.keys)
        small = self.rows * self.keys * s.num_heads <= s.scores
        subject = Subject(work, ways("colreduce", backends, lambda run: partial(run, q, k, **given), small))
        if small:
            subject.add_peer("softmax written out", lambda: lambda: _written_out(q[None], k[None])[0])
        subject.add_peer("flash-colreduce", lambda: _flash_colreduce(q[None], k[None]))
        return subject


class Salience:
    """The column means of one full-attention layer of the vision tower, over the frame groups of one pass."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        s, dtype = self.sizes, DTYPES[self.sizes.dtype]
        shape = (s.frame_groups * s.patches, s.vision_heads, s.vision_head_dim)
        q, k = random(shape, dtype, device, 1), random(shape, dtype, device, 2)
        cu = torch.arange(s.frame_groups + 1, dtype=torch.int32, device=device) * s.patches
        how = {"reduction": "mean", "heads": "mean", "cu_rows": cu, "cu_keys": cu}
        flop = 2.0 * len(q) * s.patches * s.vision_heads * s.vision_head_dim
        work = Work(flop, q.nbytes + k.nbytes + 4.0 * len(q))
        small = len(q) * s.patches * s.vision_heads <= s.scores
        subject = Subject(work, ways("colreduce", backends, lambda run: partial(run, q, k, **how), small))
        split = [t.view(s.frame_groups, s.patches, *shape[1:]) for t in (q, k)]
        if small:
            subject.add_peer("softmax written out", lambda: lambda: _written_out(*split).mean(1).flatten() / s.patches)
        subject.add_peer("flash-colreduce", lambda: _flash_colreduce(*split), judged=False)
        return subject


class Step:
    """One row per conversation over its own KV in the arenas: a body in one, the tail in the other."""

    def __init__(self, sizes: Sizes, lengths: list[int]):
        self.sizes, self.lengths = sizes, lengths

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        s, dtype = self.sizes, DTYPES[self.sizes.dtype]
        batch, bodies = len(self.lengths), [length - TAIL for length in self.lengths]
        row = (s.num_kv_heads, s.head_dim)
        sized = ((1, sum(bodies)), (3, batch * TAIL))
        pools = tuple(tuple(random((num, *row), dtype, device, seed + i) for i in range(2)) for seed, num in sized)
        starts = [sum(bodies[:i]) for i in range(batch)]
        table = [[[0, starts[i], bodies[i]], [1, i * TAIL, TAIL]] for i in range(batch)]
        spans = torch.tensor(table, dtype=torch.int32, device=device)
        q = random((batch, s.num_heads, s.head_dim), dtype, device, 5)
        total = sum(self.lengths)
        kv_bytes = 2.0 * total * s.num_kv_heads * s.head_dim * dtype.itemsize
        work = Work(4.0 * total * s.num_heads * s.head_dim, kv_bytes + 2 * q.nbytes)
        subject = Subject(work, ways("decode_attention", backends, lambda run: partial(run, q, pools, spans)))
        slots = _slots(starts, bodies, sum(bodies), device)
        joined = [torch.cat([a, b]) for a, b in zip(*pools, strict=True)]
        keys, values = (t.index_select(0, slots.flatten()).view(batch, -1, *row).transpose(1, 2) for t in joined)
        mask = None
        if min(self.lengths) != max(self.lengths):
            mask = (torch.arange(slots.shape[1], device=device) < torch.tensor(self.lengths, device=device)[:, None])[:, None, None]

        def gathered() -> Tensor:
            k, v = (t.index_select(0, slots.flatten()).view(batch, -1, *row).transpose(1, 2) for t in joined)
            return _sdpa_by_head(q, k, v, mask)

        # The KV already copied into one padded piece per batch, which the peers are not charged for; then with that copy.
        subject.add_peer("SDPA enable_gqa, KV in one piece", lambda: lambda: _sdpa_by_head(q, keys, values, mask))
        subject.add_peer("SDPA groups as rows, KV in one piece", lambda: lambda: _sdpa_by_group(q, keys, values, mask))
        subject.add_peer("index_select + SDPA", lambda: gathered)
        return subject


def _log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """Of each row over these keys: q [M, Hq, D], k [N, Hkv, D] -> f32 [M, Hq]."""
    rows = q.view(len(q), k.shape[1], -1, q.shape[2]).permute(1, 0, 2, 3).flatten(1, 2).float()
    parts = [torch.logsumexp(rows[h] @ k[:, h].float().t() * q.shape[2] ** -0.5, -1) for h in range(k.shape[1])]
    return torch.stack(parts).view(k.shape[1], len(q), -1).transpose(0, 1).flatten(1).contiguous()


def _written_out(q: Tensor, k: Tensor) -> Tensor:
    """The softmax weights in memory, then their sum: q [B, M, Hq, D], k [B, N, Hkv, D] -> f32 [B, Hq, N]."""
    batch, num_rows, num_heads, dim = q.shape
    rows = q.view(batch, num_rows, k.shape[2], -1, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
    weights = torch.softmax(torch.matmul(rows, k.permute(0, 2, 3, 1)) * dim**-0.5, -1, dtype=torch.float32)
    return weights.view(batch, num_heads, num_rows, -1).sum(2)


def _flash_colreduce(q: Tensor, k: Tensor) -> Any:
    """It wants as many key heads as query heads: who has fewer copies them, every time."""
    try:
        from flash_colreduce import flash_colreduce as run  # type: ignore[import-not-found]
    except ImportError:
        from flash_colsum import flash_colsum as run  # type: ignore[import-not-found]
    groups = q.shape[2] // k.shape[2]
    return lambda: run(q.transpose(1, 2), k.repeat_interleave(groups, 2).transpose(1, 2)).squeeze(0)


def _slots(starts: list[int], bodies: list[int], num_bodies: int, device: torch.device) -> Tensor:
    """Slots of body and tail of each sequence, i64 [B, longest], padded with slot 0."""
    rows = []
    for i, (start, length) in enumerate(zip(starts, bodies, strict=True)):
        tail = num_bodies + i * TAIL
        rows.append([*range(start, start + length), *range(tail, tail + TAIL), *[0] * (max(bodies) - length)])
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _sdpa_by_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, Hq, D], k and v [B, Hkv, S, D] -> [B, Hq, D]."""
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, enable_gqa=True)[:, :, 0]


def _sdpa_by_group(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The query heads of one KV head as rows of one product: without causality they may."""
    grouped = q.view(len(q), k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=1 / math.sqrt(q.shape[2])).flatten(1, 2)
