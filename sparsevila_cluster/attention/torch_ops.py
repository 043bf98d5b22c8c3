"""Attention in plain torch over KV that lies in spans: the prefix (or its packed part) and the conversation's tail."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsevila_cluster.attention.interface import Capture, Span

# Most softmax weights held at once while question rows attend: 64 Mi floats = 256 MiB.
MAX_WEIGHTS = 64 * 1024 * 1024


def attend_causal(q: Tensor, span: Span, scale: float) -> Tensor:
    """Rows attend to all that stands before them in `span`, and to themselves; the last n rows of `span` are their own.

    q [n, Hq, D] -> [n, Hq, D]. Heads that share a KV head read it where it lies, and no mask is as long as the span.
    """
    num_rows, num_heads, dim = q.shape
    num_kv_heads = span[0].shape[1]
    # KV heads as the batch: queries [Hkv, G, n, D], and a stride of 0 over their group for keys and values.
    q = q.view(num_rows, num_kv_heads, -1, dim).permute(1, 2, 0, 3)
    k, v = (x[0, :, None].expand(-1, q.shape[1], -1, -1) for x in span)
    attend = _causal_by_parts if q.device.type == "cpu" else _causal_at_once
    return attend(q, k, v, scale).permute(2, 0, 1, 3).reshape(num_rows, num_heads, dim)


def _causal_at_once(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The fused kernels of a GPU know that the last query row is the last key row."""
    from torch.nn.attention.bias import causal_lower_right  # brings in all of torch's compiler, for seconds

    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]), scale=scale)


def _causal_by_parts(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """That of a CPU knows only squares as causal: the rows' own keys in one call, those before them without a mask in another,
    joined by their log-sum-exps. In the other one a group's heads are rows of one product, 5-20 % faster over long spans.
    """
    num_kv_heads, _, num_rows, dim = q.shape
    past = k.shape[2] - num_rows
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    own, own_lse = flash(q, k[:, :, past:], v[:, :, past:], 0.0, True, scale=scale)
    if not past:
        return own
    rows = q.reshape(1, num_kv_heads, -1, dim)
    before, before_lse = flash(rows, k[None, :, 0, :past], v[None, :, 0, :past], scale=scale)
    weight = torch.sigmoid(before_lse.view(own_lse.shape) - own_lse).unsqueeze(-1).to(own.dtype)
    return own.lerp_(before.view(own.shape), weight)


def attend_spans(q: Tensor, spans: Sequence[tuple[Span, Span]], scale: float) -> Tensor:
    """One new row per sequence against its own two spans (body, tail), the row itself being the last of its tail.

    q [B, Hq, D] -> [B, Hq, D].
    """
    num, num_heads, dim = q.shape
    rows = q.view(num, 1, spans[0][0][0].shape[1], -1, dim).unbind(0)
    if q.device.type != "cpu":
        parts = [_attend_weights(row, body, tail, scale, None)[0] for row, (body, tail) in zip(rows, spans, strict=True)]
        return torch.cat(parts).reshape(num, num_heads, dim)
    # Two fused calls joined by their log-sum-exps: no copy of the prefix, 10-15 % faster than explicit weights from 4k keys on.
    # The join is done for all sequences at once: it costs launches, not arithmetic.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    bodies = [flash(row, k, v, scale=scale) for row, ((k, v), _) in zip(rows, spans, strict=True)]
    tails = [flash(row, k, v, scale=scale) for row, (_, (k, v)) in zip(rows, spans, strict=True)]
    (body, body_lse), (tail, tail_lse) = (_stack(parts) for parts in (bodies, tails))
    weight = torch.sigmoid(body_lse - tail_lse).unsqueeze(-1).to(q.dtype)
    return torch.lerp(tail, body, weight).reshape(num, num_heads, dim)


def _stack(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def attend_gathered(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """One new row per sequence, all in one call, against KV that was gathered and padded to one length.

    q [B, Hq, D]; k and v [B, S, Hkv, D]; visible bool [B, 1, 1, S], False for padding -> [B, Hq, D].
    """
    num, num_heads, dim = q.shape
    grouped = q.view(num, k.shape[2], -1, dim)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, scale=scale)
    return out.reshape(num, num_heads, dim)


def attend_question(q: Tensor, body: Span, tail: Span, scale: float, capture: Capture | None, layer: int = 0) -> Tensor:
    """Several new rows against both spans, causally; fills `capture`.

    q [n, Hq, D], the last n rows of `tail` being the new ones -> [n, Hq, D].
    """
    num_rows, num_heads, dim = q.shape
    num_kv_heads, num_tail = tail[0].shape[1:3]
    num_keys = body[0].shape[2] + num_tail
    chunk = max(1, MAX_WEIGHTS // (num_heads * num_keys))
    out = torch.empty_like(q)
    column = torch.arange(num_tail, device=q.device)
    row = torch.arange(num_tail - num_rows, num_tail, device=q.device)[:, None]
    for start in range(0, num_rows, chunk):
        stop = min(start + chunk, num_rows)
        rows = q[start:stop].view(stop - start, num_kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, dim)
        attended, weights = _attend_weights(rows, body, tail, scale, column > row[start:stop])
        out[start:stop] = attended.view(num_heads, stop - start, dim).transpose(0, 1)
        if capture is not None:
            captured = weights.view(num_heads, stop - start, num_keys)[:, slice(*capture.overlap(start, stop))]
            capture.add(layer, _visual_sum(captured, capture) / num_heads)
    return out


def _attend_weights(q: Tensor, body: Span, tail: Span, scale: float, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """q [1, Hkv, m, D] -> attended [1, Hkv, m, D], float32 weights [1, Hkv, m, S + t]; `hidden` [rows, t] repeats over m / rows."""
    to_body = torch.matmul(q, body[0].transpose(2, 3))
    to_tail = torch.matmul(q, tail[0].transpose(2, 3))
    if hidden is not None:
        to_tail.view(to_tail.shape[1], -1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    weights = torch.softmax(torch.cat([to_body, to_tail], -1).float() * scale, -1)
    cast, split = weights.to(q.dtype), body[0].shape[2]
    return torch.matmul(cast[..., :split], body[1]) + torch.matmul(cast[..., split:], tail[1]), weights


def _visual_sum(weights: Tensor, capture: Capture) -> Tensor:
    """Sum over heads and rows of weights [H, rows, keys] at the visual columns -> f32 [n]."""
    if not weights.shape[1]:
        return weights.new_zeros(len(capture.visual_index))
    visual = weights.index_select(-1, capture.visual_index)
    if capture.normalize == "visual":
        visual = visual / visual.sum(-1, keepdim=True).clamp_min(torch.finfo(visual.dtype).tiny)
    return visual.sum((0, 1))
