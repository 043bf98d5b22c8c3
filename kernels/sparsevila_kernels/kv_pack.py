"""Rows of KV from anywhere in one arena to anywhere in another, for all layers in one launch; also as int8 on the way.

One index serves every use: many extents into contiguous packed KV (gather), what came over a wire into an arena (scatter),
rows of one arena closer together (compaction, with `overlapping`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _kv_triton
from ._launch import Backend, choose

TOP = 127
SMALLEST = torch.finfo(torch.float32).tiny  # below it 1 / scale is infinite


def kv_pack(
    src_k: Tensor,
    src_v: Tensor,
    dst_k: Tensor,
    dst_v: Tensor,
    src_rows: Tensor,
    dst_rows: Tensor,
    *,
    overlapping: bool = False,
    backend: Backend = "auto",
) -> None:
    """dst[l, dst_rows[l, i]] = src[l, src_rows[l, i]], keys and values, in place.

    src and dst [L, slots, Hkv, D] of one dtype, with any stride but 1 along D, values as keys; rows i64 [n] (of every layer) or
    [L, n]. Rows that are written twice end up with one of the contents. Where rows that are written are also read, in
    one arena, say `overlapping`: all are read first. Rows outside the arenas are the caller's fault and are not looked for.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check_pair(src_k, src_v, "src")
    _check_pair(dst_k, dst_v, "dst")
    if (src_k.shape[0], *src_k.shape[2:]) != (dst_k.shape[0], *dst_k.shape[2:]) or src_k.dtype != dst_k.dtype:
        raise ValueError(
            f"src is {src_k.dtype} {tuple(src_k.shape)}, dst {dst_k.dtype} {tuple(dst_k.shape)}: only slots may differ"
        )
    src_rows, dst_rows = _rows_of(src_k, src_rows, "src_rows"), _rows_of(dst_k, dst_rows, "dst_rows")
    if src_rows.shape != dst_rows.shape or src_k.device != dst_k.device:
        theirs = f"{tuple(dst_rows.shape)} on {dst_k.device}"
        raise ValueError(f"src_rows are {tuple(src_rows.shape)} on {src_k.device}, dst_rows {theirs}: must be the same")
    if choose(backend, src_k) == "torch":
        _copy_in_torch((src_k, dst_k), (src_v, dst_v), src_rows, dst_rows)
    elif overlapping:
        shape = (len(src_k), src_rows.shape[1], *src_k.shape[2:])
        held_k, held_v = torch.empty(shape, dtype=src_k.dtype, device=src_k.device), src_v.new_empty(shape)
        everything = torch.arange(shape[1], device=src_k.device).expand(shape[:2])
        _kv_triton.copy_rows(src_k, src_v, held_k, held_v, src_rows, everything)
        _kv_triton.copy_rows(held_k, held_v, dst_k, dst_v, everything, dst_rows)
    else:
        _kv_triton.copy_rows(src_k, src_v, dst_k, dst_v, src_rows, dst_rows)


def kv_quantize(
    src_k: Tensor, src_v: Tensor, rows: Tensor, *, out: tuple[Tensor, Tensor] | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Rows as int8 with one scale for each row, layer, head: the largest magnitude / 127. The error is at most scale / 2.

    src [L, slots, Hkv, D], rows i64 [n] or [L, n] -> values i8 [L, 2, n, Hkv, D] (keys, then values), scales f32 [L, 2, n, Hkv].
    `out` gives both to write into, contiguous: parts of one buffer for the wire.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check_pair(src_k, src_v, "src")
    rows = _rows_of(src_k, rows, "rows")
    shape = (len(src_k), 2, rows.shape[1], *src_k.shape[2:])
    if out is None:
        out = (
            torch.empty(shape, dtype=torch.int8, device=src_k.device),
            torch.empty(shape[:-1], dtype=torch.float32, device=src_k.device),
        )
    values, scales = out
    _check_int8(values, scales, shape)
    if choose(backend, src_k) == "triton":
        _kv_triton.quantize_rows(src_k, src_v, rows, values, scales)
        return values, scales
    for layer in range(len(src_k)):
        for part, source in enumerate((src_k, src_v)):
            wide = source[layer].index_select(0, rows[layer]).float()
            torch.div(wide.abs().amax(-1), TOP, out=scales[layer, part])
            scale = scales[layer, part]
            inverse = torch.where(scale >= SMALLEST, 1 / scale, 0)
            values[layer, part] = wide.mul_(inverse[..., None]).round_().clamp_(-TOP, TOP)
    return values, scales


def kv_dequantize(values: Tensor, scales: Tensor, dst_k: Tensor, dst_v: Tensor, rows: Tensor, *, backend: Backend = "auto") -> None:
    """What `kv_quantize` made, back into rows of an arena [L, slots, Hkv, D] of any floating dtype, in place.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    _check_pair(dst_k, dst_v, "dst")
    rows = _rows_of(dst_k, rows, "rows")
    _check_int8(values, scales, (len(dst_k), 2, rows.shape[1], *dst_k.shape[2:]))
    if choose(backend, dst_k) == "triton":
        _kv_triton.dequantize_rows(values, scales, dst_k, dst_v, rows)
        return
    for layer in range(len(dst_k)):
        for part, target in enumerate((dst_k, dst_v)):
            wide = values[layer, part].float().mul_(scales[layer, part, ..., None])
            target[layer].index_copy_(0, rows[layer], wide.to(target.dtype))


def _copy_in_torch(keys: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], rows: Tensor, places: Tensor) -> None:
    """On a CPU, places that lie in a row are written directly: half the copies of index_copy_."""
    run = _run_of(places) if rows.is_cpu and rows.numel() else None
    if run is not None:
        low, high = (int(end) for end in rows.aminmax())
        # Layers of one arena lie alike, and the first speaks for all.
        layers = slice(0, 1 if keys[0].stride(0) == keys[1].stride(0) else None)
        overlap = any(_overlap(target[layers, run], source[layers, low : high + 1]) for source, target in (keys, values))
        if not overlap and keys[1][0, run].is_contiguous():
            for layer, index in enumerate(rows - low):
                for source, target in (keys, values):
                    torch.index_select(source[layer, low : high + 1], 0, index, out=target[layer, run])
            return
    for layer, (index, place) in enumerate(zip(rows, places, strict=True)):
        for source, target in (keys, values):
            target[layer].index_copy_(0, place, source[layer].index_select(0, index))


def _run_of(places: Tensor) -> slice | None:
    """The slots of places [L, n] if they are the same consecutive ones in every layer."""
    first, last = int(places[0, 0]), int(places[0, -1])
    some = places[:1] if places.stride(0) == 0 else places
    if last - first != places.shape[1] - 1 or not bool((some == torch.arange(first, last + 1)).all()):
        return None
    return slice(first, last + 1)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors may share memory."""
    reach_a, reach_b = (t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in (a, b))
    return a.data_ptr() < b.data_ptr() + reach_b and b.data_ptr() < a.data_ptr() + reach_a


def _check_pair(k: Tensor, v: Tensor, name: str) -> None:
    if k.dim() != 4 or k.shape != v.shape or k.stride() != v.stride() or k.dtype != v.dtype or k.device != v.device:
        mine, theirs = ((t.dtype, tuple(t.shape), t.stride(), str(t.device)) for t in (k, v))
        raise ValueError(f"{name}_k is {mine}, {name}_v {theirs}: both must be [L, slots, Hkv, D] and lie alike")
    if k.stride(3) != 1:
        raise ValueError(f"{name} has stride {k.stride(3)} along D, not 1")


def _rows_of(arena: Tensor, rows: Tensor, name: str) -> Tensor:
    """As [L, n], without a copy."""
    if rows.dtype != torch.int64 or rows.dim() not in (1, 2) or rows.device != arena.device:
        raise ValueError(f"{name} are {rows.dtype} {tuple(rows.shape)} on {rows.device}, not int64 [n] or [L, n] on {arena.device}")
    if rows.dim() == 2 and len(rows) != len(arena):
        raise ValueError(f"{name} are {tuple(rows.shape)}, of {len(arena)} layers")
    return rows.expand(len(arena), -1)


def _check_int8(values: Tensor, scales: Tensor, shape: tuple[int, ...]) -> None:
    for name, tensor, dtype, wanted in (("values", values, torch.int8, shape), ("scales", scales, torch.float32, shape[:-1])):
        if tensor.dtype != dtype or tensor.shape != wanted or not tensor.is_contiguous():
            raise ValueError(f"{name} are {tensor.dtype} {tuple(tensor.shape)}, not contiguous {dtype} {wanted}")
