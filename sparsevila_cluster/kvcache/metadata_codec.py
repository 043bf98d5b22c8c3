"""PrefixMetadata as the plain fields of a msgpack message, and back, with every field checked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.kvcache.prefix import PrefixMetadata

MAX_ROWS = 2**24
MAX_LAYERS = 2**10
MAX_WIDTH = 2**16  # heads, and values of one
MAX_SIDE = 2**14  # rows or columns of a grid
MAX_COUNT = 2**31  # positions, media, frames, tokens
MAX_TEXT = 4096
MAX_POSITION_ROWS = 4

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def encode_metadata(metadata: PrefixMetadata) -> dict[str, Any]:
    """Plain fields of metadata whose tensors are on the CPU. Their order is part of the wire format."""
    spec = metadata.spec
    return {
        "key": metadata.key,
        "tenant": metadata.tenant,
        "owner": metadata.owner,
        "spec": {
            "num_layers": spec.num_layers,
            "num_kv_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "dtype": DTYPE_NAMES[spec.dtype],
            "fingerprint": spec.fingerprint,
            "layout_version": spec.layout_version,
        },
        "length": metadata.length,
        "is_visual": _raw(metadata.is_visual),
        "positions": _raw(metadata.positions),
        "token_map": _raw(metadata.token_map),
        "next_pos": metadata.next_pos,
        "generation_floor": metadata.generation_floor,
        "grids": metadata.grids,
        "media": metadata.media,
        "frames": metadata.frames,
        "times_s": metadata.times_s,
        "kind": metadata.kind,
        "num_frames": metadata.num_frames,
        "duration_s": metadata.duration_s,
        "num_visual": metadata.num_visual,
    }


def decode_metadata(fields: dict[str, Any]) -> PrefixMetadata:
    """What `encode_metadata` encoded; other fields are ignored.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, RuntimeError: fields that are missing, of another type, or at odds.
    """
    spec, length = fields["spec"], read_int(fields["length"])
    metadata = PrefixMetadata(
        key=read_text(fields["key"]),
        tenant=read_text(fields["tenant"]),
        owner=read_text(fields["owner"]),
        spec=KVSpec(
            num_layers=read_int(spec["num_layers"]),
            num_kv_heads=read_int(spec["num_kv_heads"]),
            head_dim=read_int(spec["head_dim"]),
            dtype=_read_dtype(spec["dtype"]),
            fingerprint=read_text(spec["fingerprint"]),
            layout_version=read_int(spec["layout_version"]),
        ),
        is_visual=_tensor(fields["is_visual"], torch.bool, (length,)),
        positions=_tensor(fields["positions"], torch.int64, (-1, length)),
        token_map=_tensor(fields["token_map"], torch.int32, (length, 3)),
        next_pos=read_int(fields["next_pos"]),
        generation_floor=read_int(fields["generation_floor"]),
        grids=tuple((read_int(rows), read_int(cols)) for rows, cols in fields["grids"]),
        media=tuple(map(read_int, fields["media"])),
        frames=tuple(map(read_int, fields["frames"])),
        times_s=tuple(map(read_seconds, fields["times_s"])),
        kind=read_text(fields["kind"]),
        num_frames=read_int(fields["num_frames"]),
        duration_s=read_seconds(fields["duration_s"]),
        num_visual=read_int(fields["num_visual"]),
    )
    _check(metadata)
    return metadata


def _check(metadata: PrefixMetadata) -> None:
    spec, sides = metadata.spec, [side for grid in metadata.grids for side in grid]
    require(1 <= len(metadata.key) <= 256, "key")
    require(1 <= spec.num_layers <= MAX_LAYERS, "num_layers")
    require(1 <= min(spec.num_kv_heads, spec.head_dim) <= max(spec.num_kv_heads, spec.head_dim) <= MAX_WIDTH, "heads")
    require(1 <= metadata.length <= MAX_ROWS, "length")
    require(metadata.kind in ("video", "image"), "kind")
    require(all(1 <= side <= MAX_SIDE for side in sides), "grids")
    require(len(metadata.grids) == len(metadata.media) == len(metadata.frames) == len(metadata.times_s), "groups")
    counts = (metadata.num_frames, metadata.num_visual, metadata.next_pos, *metadata.media, *metadata.frames)
    require(all(0 <= count < MAX_COUNT for count in counts), "counts")
    require(int(metadata.is_visual.sum()) <= metadata.num_visual and abs(metadata.generation_floor) < MAX_COUNT, "counts")
    positions = metadata.positions
    require(1 <= len(positions) <= MAX_POSITION_ROWS and bool(((positions >= 0) & (positions < MAX_COUNT)).all()), "positions")
    _check_places(metadata)


def _check_places(metadata: PrefixMetadata) -> None:
    """Visual tokens stand in a cell of a grid: evidence is drawn there. Nothing else names a group."""
    group, *cell = metadata.token_map.unbind(1)
    visual = metadata.is_visual
    require(bool((metadata.token_map >= -1).all()) and bool((group < len(metadata.grids)).all()), "token_map")
    require(bool((metadata.token_map[visual] >= 0).all()), "token_map of visual tokens")
    if metadata.grids:
        sides = torch.tensor(metadata.grids, dtype=torch.int32)[group[visual].long()]
        require(bool((torch.stack(cell, 1)[visual] < sides).all()), "token_map outside of its grid")


def require(truth: bool, what: str) -> None:
    """Raises ValueError(what) unless `truth`."""
    if not truth:
        raise ValueError(what)


def read_text(value: Any) -> str:
    """Raises TypeError. ValueError: it is too long."""
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise ValueError(f"a text of {len(value)} characters; the limit is {MAX_TEXT}")
    return value


def _read_dtype(value: Any) -> torch.dtype:
    dtype = DTYPES.get(read_text(value))
    if dtype is None:
        raise ValueError(f"dtype {value[:40]!r}")
    return dtype


def read_int(value: Any) -> int:
    """Raises TypeError, also for a bool."""
    if type(value) is not int:
        raise TypeError(f"a whole number expected, not {type(value).__name__}")
    return value


def read_seconds(value: Any) -> float:
    """Raises TypeError. ValueError: below 0, or not finite."""
    if type(value) not in (int, float):
        raise TypeError(f"seconds expected, not {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{value} s")
    return float(value)


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _tensor(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(raw, bytes):
        raise TypeError(f"bytes expected, not {type(raw).__name__}")
    if dtype == torch.bool and raw.strip(b"\0\1"):
        raise ValueError("a truth value that is neither 0 nor 1")
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
