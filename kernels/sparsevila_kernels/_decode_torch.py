"""decode_attention on PyTorch operators: the CPU's fused kernel per span, and plain products where that does not run.

Reads the spans on the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# One part of a sequence's keys that all its rows see, or the rows' own keys: (keys, values, whether the rows see them causally).
Part = tuple[Tensor, Tensor, bool]


def decode_in_torch(
    q: Tensor,
    pools: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    spans: Tensor,
    cu_rows: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `decode_attention.decode_attention`, of which all arguments were checked -> (out, lse or None).

    Raises ValueError if a sequence has more rows than its second span has keys.
    """
    both_of_all = spans.tolist()
    if cu_rows is None and q.device.type == "cpu" and all(first[2] and second[2] for first, second in both_of_all):
        return _decode_step(q, pools, both_of_all, scale, return_lse)
    bounds = range(len(spans) + 1) if cu_rows is None else cu_rows.tolist()
    attend = _attend_fused if q.device.type == "cpu" else _attend_plainly
    places = []
    for b, both in enumerate(both_of_all):
        num_rows = bounds[b + 1] - bounds[b]
        if not num_rows:
            continue
        parts = _parts(pools, both, num_rows)
        if parts is None:
            raise ValueError(f"sequence {b}: {num_rows} rows are more than the {both[1][2]} keys of its second span")
        rows = q[bounds[b] : bounds[b + 1]]
        if parts:
            places.append((b, [attend(rows, k, v, scale, causal) for k, v, causal in parts]))
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    for b, found in places:
        joined = found[0]
        for other in found[1:]:
            joined = _join(*joined, *other)
        out[bounds[b] : bounds[b + 1]], lse[bounds[b] : bounds[b + 1]] = joined
    return out, lse if return_lse else None


def _decode_step(
    q: Tensor, pools: tuple, both_of_all: list[list[list[int]]], scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One row of each sequence, none of whose spans is empty: the case of every step, in as few operators as it takes. For the
    model of the tests they cost more than the arithmetic. The spans are joined for all sequences at once.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, found = q.view(len(q), 1, pools[0][0].shape[1], -1, q.shape[-1]), []
    for row, both in zip(rows.unbind(0), both_of_all, strict=True):
        for pool, start, num in both:
            k, v = (_head_major(x, start, num) for x in pools[pool])
            found.append(flash(row, k, v, scale=scale))
    first, second = (torch.cat([out for out, _ in found[i::2]]).view(q.shape) for i in (0, 1))
    first_lse, second_lse = (torch.cat([lse for _, lse in found[i::2]]).view(q.shape[:2]) for i in (0, 1))
    weight = torch.sigmoid(second_lse - first_lse).unsqueeze(-1)
    out = torch.lerp(first.float(), second.float(), weight).to(q.dtype)
    return out, torch.logaddexp(first_lse, second_lse) if return_lse else None


def _head_major(arena: Tensor, start: int, num: int) -> Tensor:
    """Slots [start, start + num) of [slots, Hkv, D] as [1, Hkv, num, D], in one operator."""
    (slot, head, _), (_, num_heads, dim) = arena.stride(), arena.shape
    return arena.as_strided((1, num_heads, num, dim), (0, head, slot, 1), arena.storage_offset() + start * slot)


def _parts(pools: tuple, both: list[list[int]], num_rows: int) -> list[Part] | None:
    """The keys of one sequence in pieces that are attended to at once; None if the rows are not all in the second span."""
    (pool_a, start_a, num_a), (pool_b, start_b, num_b) = both
    own = num_rows if num_rows > 1 else 0  # one row sees all keys
    if own > num_b:
        return None
    pieces = ((pool_a, start_a, num_a, False), (pool_b, start_b, num_b - own, False), (pool_b, start_b + num_b - own, own, True))
    return [
        (pools[pool][0][start : start + num], pools[pool][1][start : start + num], causal)
        for pool, start, num, causal in pieces
        if num
    ]


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q [m, Hq, D], k and v [n, Hkv, D] -> out [m, Hq, D] and natural lse [m, Hq]; causal needs n == m."""
    num_rows, num_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    # KV heads as the batch; their queries are heads that share keys of stride 0, or, without a mask, rows of one product.
    rows = q.view(num_rows, num_kv_heads, -1, dim).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None] for x in (k, v))
    if causal:
        k, v = (x.expand(-1, rows.shape[1], -1, -1) for x in (k, v))
        out, lse = flash(rows, k, v, 0.0, True, scale=scale)
    else:
        out, lse = flash(rows.reshape(num_kv_heads, 1, -1, dim), k, v, scale=scale)
    out, lse = out.reshape(num_heads, num_rows, dim), lse.reshape(num_heads, num_rows)
    return out.transpose(0, 1), lse.transpose(0, 1)


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """The same in fp32 products."""
    num_rows, num_heads, dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    rows = q.float().view(num_rows, num_kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, dim)
    logits = torch.bmm(rows, k.float().permute(1, 2, 0)).mul_(scale)
    if causal:
        hidden = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q.device).triu_(1)
        logits.view(num_kv_heads, -1, num_rows, num_keys).masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(logits, -1)
    out = torch.bmm(logits.sub_(lse.unsqueeze(-1)).exp_(), v.float().transpose(0, 1))
    return out.view(num_heads, num_rows, dim).transpose(0, 1), lse.view(num_heads, num_rows).transpose(0, 1)


def _join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys -> over both; in fp32, also where the parts are narrower."""
    weight = torch.sigmoid(other_lse - lse).unsqueeze(-1)
    return torch.lerp(out.float(), other.float(), weight), torch.logaddexp(lse, other_lse)
