"""What each kernel computes, in plain PyTorch and written from the definition: what both of its paths are tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .awq_weight import AwqWeight
from .int8_matmul import Int8Weight


def attention_logits(q: Tensor, k: Tensor, scale: float | None, causal: bool) -> Tensor:
    """scale q k^T of one sequence, q [m, Hq, D] and k [n, Hkv, D] -> [Hq, m, n]; -inf where row i cannot see key j > i + n - m."""
    num_rows, num_keys = len(q), len(k)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("mhd,nhd->hmn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        row, key = torch.arange(num_rows, device=q.device)[:, None], torch.arange(num_keys, device=q.device)
        logits = logits.masked_fill(key > row + num_keys - num_rows, -math.inf)
    return logits


def colreduce(
    q: Tensor,
    k: Tensor,
    *,
    reduction: str = "sum",
    heads: str = "each",
    causal: bool = False,
    scale: float | None = None,
    cu_rows: Tensor | None = None,
    cu_keys: Tensor | None = None,
    lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Column reductions of the softmax weights -> [Hq, N] or [N] of `dtype`, in which everything is computed."""
    q, k = q.to(dtype), k.to(dtype)
    row_bounds = [0, len(q)] if cu_rows is None else cu_rows.tolist()
    key_bounds = [0, len(k)] if cu_keys is None else cu_keys.tolist()
    out = q.new_zeros(q.shape[1], len(k))
    for b in range(len(row_bounds) - 1):
        rows, keys = slice(*row_bounds[b : b + 2]), slice(*key_bounds[b : b + 2])
        logits = attention_logits(q[rows], k[keys], scale, causal)
        if 0 in logits.shape:
            continue
        if lse is None:
            weights = torch.softmax(logits, -1).nan_to_num(0.0)  # a row that sees nothing is 0 / 0
        else:
            weights = torch.exp(logits - lse[rows].to(dtype).T[:, :, None])
        reduced = {"sum": weights.sum(1), "mean": weights.mean(1), "max": weights.amax(1)}
        out[:, keys] = reduced[reduction]
    return out if heads == "each" else out.mean(0)


def decode_attention(
    q: Tensor,
    pools: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    spans: Tensor,
    *,
    cu_rows: Tensor | None = None,
    max_rows: int = 1,
    scale: float | None = None,
    max_keys: int | None = None,
    return_lse: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each sequence's last rows over its two spans of keys and values -> [T, Hq, D] (and [T, Hq]) of `dtype`."""
    bounds = range(len(spans) + 1) if cu_rows is None else cu_rows.tolist()
    out = q.new_zeros(q.shape, dtype=dtype)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=dtype)
    for b, both in enumerate(spans.tolist()):
        k, v = (torch.cat([pools[p][part][start : start + num] for p, start, num in both]).to(dtype) for part in (0, 1))
        rows = slice(bounds[b], bounds[b + 1])
        if not len(k) or rows.start == rows.stop:
            continue
        logits = attention_logits(q[rows].to(dtype), k, scale, causal=True)
        v = v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        out[rows] = torch.einsum("hmn,nhd->mhd", torch.softmax(logits, -1), v)
        lse[rows] = torch.logsumexp(logits, -1).T
    return (out, lse) if return_lse else out


def awq_matmul(x: Tensor, weight: AwqWeight, bias: Tensor | None = None, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """x W with W[k, n] = (code - zero) * scale, rounded to `dtype` and multiplied in it -> [M, N] of `dtype`."""
    group = torch.arange(weight.num_in, device=x.device) // weight.group_size
    steps = weight.unpacked().double() - weight.zeros.double()[group]
    product = x.to(dtype) @ (steps * weight.scales.double()[group]).to(dtype)
    return product if bias is None else product + bias.to(dtype)


def int8_matmul(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """x / smooth rounded per row to 127 steps each way, an integer product, then the scales -> [M, N] fp64.

    The rounded quotients are those of fp32: of a number halfway between two steps, more digits would choose the other.
    """
    wide = x.float() if weight.smooth is None else x.float() / weight.smooth
    scales = wide.abs().amax(-1, keepdim=True) / 127
    codes = (wide / scales).nan_to_num(0.0).round().clamp(-127, 127).double()
    # Integers below 2^53 are exact in fp64, and every device multiplies it.
    product = (codes @ weight.values.double().t()) * scales.double() * weight.scales.double()
    return product if bias is None else product + bias.double()


def kv_pack(src_k: Tensor, src_v: Tensor, dst_k: Tensor, dst_v: Tensor, src_rows: Tensor, dst_rows: Tensor) -> None:
    """dst[l, dst_rows[l, i]] = src[l, src_rows[l, i]], one row after the other, reading from how things were before."""
    before_k, before_v = src_k.clone(), src_v.clone()
    for layer in range(len(src_k)):
        takes, gives = (rows[layer] if rows.dim() == 2 else rows for rows in (src_rows, dst_rows))
        for take, give in zip(takes.tolist(), gives.tolist(), strict=True):
            dst_k[layer, give] = before_k[layer, take]
            dst_v[layer, give] = before_v[layer, take]


def kv_quantize(src_k: Tensor, src_v: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values i8 and scales f32 of rows, [L, 2, n, Hkv, D] and [L, 2, n, Hkv]: the nearest of 127 steps each way."""
    index = rows.expand(len(src_k), -1)
    wide = torch.stack([torch.stack([s[i] for s, i in zip(part, index, strict=True)]) for part in (src_k, src_v)], 1).float()
    scales = wide.abs().amax(-1) / 127
    steps = wide * torch.where(scales > 0, 1 / scales, 0)[..., None]
    return steps.round().to(torch.int8), scales


def kv_dequantize(values: Tensor, scales: Tensor, dst_k: Tensor, dst_v: Tensor, rows: Tensor) -> None:
    """dst[l, rows[l, i]] = values * scales, rounded to dst's dtype."""
    wide = values.float() * scales[..., None]
    for layer, index in enumerate(rows.expand(len(dst_k), -1)):
        for part, dst in enumerate((dst_k, dst_v)):
            dst[layer, index] = wide[layer, part].to(dst.dtype)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, dtype: torch.dtype = torch.float64
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight in `dtype`, of the sum with the residual as x's dtype holds it."""
    total = x if residual is None else x + residual
    wide = total.to(dtype)
    normed = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)
    return normed if residual is None else (normed, total.to(dtype))


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    k_arena: Tensor,
    v_arena: Tensor,
    slots: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Turns the pairs (d, d + D/2) of each query and key head by their angle; sin carries -1 on the first half. In place."""
    head_dim, num_kv_heads = k_arena.shape[2], k_arena.shape[1]
    heads = qkv.unflatten(-1, (-1, head_dim)).to(dtype)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    turned = heads[:, : num_heads + num_kv_heads]
    if qk_norm is not None:
        turned = rms_norm(turned, qk_norm, eps, dtype=dtype)
    half = head_dim // 2
    a, b = turned[..., :half], turned[..., half:]
    first, second, angle = cos.to(dtype)[..., :half], cos.to(dtype)[..., half:], sin.to(dtype)
    turned = torch.cat((a * first + b * angle[..., :half], b * second + a * angle[..., half:]), -1)
    for row, slot in enumerate(slots.tolist()):
        k_arena[slot] = turned[row, num_heads:].to(k_arena.dtype)
        v_arena[slot] = heads[row, num_heads + num_kv_heads :].to(v_arena.dtype)
    return turned[:, :num_heads]


def silu_mul(gate_up: Tensor, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """gate / (1 + e^-gate) * up in `dtype`."""
    gate, up = gate_up.to(dtype).chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up
