"""colreduce on PyTorch operators: what serves a CPU, and any device without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

# Most logits at a time: 64 MiB of f32. One row of one KV head's group is the least that is taken.
MAX_LOGITS = 16 * 1024 * 1024
# Most keys cast to fp32 at a time, in elements: 32 MiB.
MAX_CAST = 8 * 1024 * 1024


def colreduce_in_torch(
    q: Tensor,
    k: Tensor,
    reduction: str,
    heads: str,
    causal: bool,
    scale: float,
    cu_rows: Tensor | None,
    cu_keys: Tensor | None,
    lse: Tensor | None,
) -> Tensor:
    """As `colreduce.colreduce`, of which all arguments were checked. Reads the bounds on the host."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    rows = [0, len(q)] if cu_rows is None else cu_rows.tolist()
    keys = [0, len(k)] if cu_keys is None else cu_keys.tolist()
    out = q.new_zeros(num_kv_heads, num_heads // num_kv_heads, len(k), dtype=torch.float32)
    for b in range(len(rows) - 1):
        own_lse = None if lse is None else lse[rows[b] : rows[b + 1]]
        into = out[..., keys[b] : keys[b + 1]]
        _reduce_sequence(q[rows[b] : rows[b + 1]], k[keys[b] : keys[b + 1]], reduction, causal, scale, own_lse, into)
    out = out.view(num_heads, len(k))
    return out if heads == "each" else out.mean(0)


def _reduce_sequence(q: Tensor, k: Tensor, reduction: str, causal: bool, scale: float, lse: Tensor | None, out: Tensor) -> None:
    """One sequence, q [m, Hq, D], k [n, Hkv, D], lse [m, Hq], into out [Hkv, G, n], which holds zeros."""
    num_rows, num_heads, dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    if not num_rows or not num_keys:
        return
    offset = num_keys - num_rows if causal else num_keys
    first = max(0, -offset)  # rows before it see nothing
    chunk = max(1, MAX_LOGITS // (group * num_keys))  # rows at a time if one KV head were taken
    num_taken = max(1, min(num_kv_heads, chunk // num_rows))  # KV heads at a time
    chunk = chunk if num_taken == 1 else num_rows
    for head in range(0, num_kv_heads, num_taken):
        taken = slice(head, min(head + num_taken, num_kv_heads))
        for start in range(first, num_rows, chunk):
            stop = min(start + chunk, num_rows)
            num_seen = min(num_keys, stop + offset)
            # KV heads as the batch, rows x group as the rows of one product.
            part = q[start:stop].unflatten(1, (num_kv_heads, group))[:, taken].transpose(0, 1)
            logits = _products(part.reshape(len(part), -1, dim), k[:num_seen, taken]).mul_(scale)
            logits = logits.view(len(part), stop - start, group, num_seen)
            if causal and stop - start > 1:
                row, key = torch.arange(start, stop, device=q.device), torch.arange(num_seen, device=q.device)
                logits.masked_fill_((key > row[:, None] + offset)[:, None], float("-inf"))
            if lse is None:
                weights = torch.softmax(logits, -1)
            else:
                norm = lse[start:stop].unflatten(1, (num_kv_heads, group))[:, taken].transpose(0, 1)
                norm = norm.masked_fill(norm == float("-inf"), float("inf"))  # such a row sees nothing: it weighs 0
                weights = logits.sub_(norm.unsqueeze(-1)).exp_()
            into = out[taken, :, :num_seen]
            if reduction == "max":
                torch.maximum(into, weights.amax(1), out=into)
            else:
                into += weights.sum(1)
    if reduction == "mean":
        out /= num_rows


def _products(q: Tensor, k: Tensor) -> Tensor:
    """f32 q k^T of q [Hkv, rows, D] and k [n, Hkv, D]. What is not fp32 is cast, some keys at a time: their product in a narrow
    dtype would be rounded to it, an error of several percent in the weights of large logits.
    """
    if q.dtype == torch.float32:
        return torch.bmm(q, k.permute(1, 2, 0))
    out, q = q.new_empty(len(q), q.shape[1], len(k), dtype=torch.float32), q.float()
    step = max(1, MAX_CAST // (k.shape[1] * k.shape[2]))
    for start in range(0, len(k), step):
        keys = slice(start, min(start + step, len(k)))
        torch.bmm(q, k[keys].float().permute(1, 2, 0), out=out[:, :, keys])
    return out
