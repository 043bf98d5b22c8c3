"""What stands between the matrix products of a decoder layer, each as one launch on a GPU.

The kernels compute in fp32 and round once. The torch paths round where the operators that they are made of round.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _small_triton
from ._launch import Backend, choose


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; with a residual, (that of x + residual, x + residual).

    x [T, D] and weight [D], or x [T, heads, D] and weight [D] or [heads, D]; residual like x. The sum is rounded to x's dtype
    before it is normed, as if it had been added on its own.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    if x.dim() not in (2, 3) or weight.shape not in (x.shape[-1:], x.shape[1:]) or weight.device != x.device:
        raise ValueError(f"x is {tuple(x.shape)} on {x.device}, weight {tuple(weight.shape)} on {weight.device}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}, not {x.dtype} {tuple(x.shape)}")
    if choose(backend, x) == "triton":
        normed, total = _small_triton.rms_norm(x, weight, eps, residual)
        return normed if total is None else (normed, total)
    total = x if residual is None else x + residual
    size = x.shape[-1]
    if x.is_cpu and x.dtype == torch.float32:
        # x / hypot(|x| / sqrt(D), sqrt(eps)): fewer launches than F.rms_norm, which torch decomposes here.
        length = torch.linalg.vector_norm(total, 2, -1, True).mul_(size**-0.5)
        normed = (total / length.hypot_(_root(eps))).mul_(weight)
    elif weight.dim() == 1:
        normed = F.rms_norm(total, (size,), weight, eps)
    else:
        normed = F.rms_norm(total, (size,), None, eps) * weight
    return normed if residual is None else (normed, total)


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
    backend: Backend = "auto",
) -> Tensor:
    """Norm and turn a step's queries and keys, write its keys and values: -> q [T, Hq, D]; rows `slots` of both arenas.

    qkv [T, (Hq + 2 Hkv) * D]; cos and sin [T, 1, D] for x * cos + roll(x, D / 2) * sin, the sign of the rotation being in sin;
    qk_norm [Hq + Hkv, D] or None; arenas [slots, Hkv, D] of one layer in qkv's dtype; slots i64 [T].

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    (num_rows, width), (_, num_kv_heads, head_dim) = qkv.shape, k_arena.shape
    num_heads = width // head_dim - 2 * num_kv_heads
    if width % head_dim or num_heads < 1 or head_dim % 2 or v_arena.shape != k_arena.shape or v_arena.stride() != k_arena.stride():
        raise ValueError(f"qkv is {tuple(qkv.shape)}, arenas {tuple(k_arena.shape)} and {tuple(v_arena.shape)}")
    if k_arena.dtype != qkv.dtype or v_arena.dtype != qkv.dtype or k_arena.device != qkv.device or k_arena.stride(2) != 1:
        raise ValueError(f"qkv is {qkv.dtype} on {qkv.device}, arenas {k_arena.dtype} and {v_arena.dtype} on {k_arena.device}")
    if cos.shape != (num_rows, 1, head_dim) or sin.shape != cos.shape or cos.dtype != sin.dtype:
        raise ValueError(f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}, not {(num_rows, 1, head_dim)}")
    if qk_norm is not None and qk_norm.shape != (num_heads + num_kv_heads, head_dim):
        raise ValueError(f"qk_norm is {tuple(qk_norm.shape)}, not {(num_heads + num_kv_heads, head_dim)}")
    if slots.shape != (num_rows,) or slots.dtype != torch.int64:
        raise ValueError(f"slots are {slots.dtype} {tuple(slots.shape)}, not int64 {(num_rows,)}")
    if choose(backend, qkv) == "triton":
        return _small_triton.rope_write(qkv, cos, sin, qk_norm, eps, k_arena, v_arena, slots)
    qk, v = qkv.view(num_rows, num_heads + 2 * num_kv_heads, head_dim).split_with_sizes((num_heads + num_kv_heads, num_kv_heads), 1)
    if qk_norm is not None:
        qk = cast(Tensor, rms_norm(qk, qk_norm, eps, backend="torch"))
    qk = torch.addcmul(qk * cos, qk.roll(head_dim // 2, -1), sin)
    q, k = qk.split_with_sizes((num_heads, num_kv_heads), 1)
    k_arena.index_copy_(0, slots, k.to(k_arena.dtype))
    v_arena.index_copy_(0, slots, v)
    return q.to(qkv.dtype)


def silu_mul(gate_up: Tensor, *, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up of gate_up [T, 2F], gates first -> [T, F].

    Raises:
        ValueError: gate_up is not [T, an even number].
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}, not [T, 2F]")
    if choose(backend, gate_up) == "triton":
        return _small_triton.silu_mul(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@lru_cache(maxsize=16)
def _root(eps: float) -> Tensor:
    return torch.tensor(eps**0.5)
