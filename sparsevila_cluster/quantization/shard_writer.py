"""safetensors files written tensor by tensor: nothing but one tensor is in memory at a time.

[ u64 header length | header JSON: name -> dtype, shape, [begin, end) | tensor bytes ]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sparsevila_cluster.models.checkpoint import Shard

_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to be: `write` puts its bytes into the file."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    write: Callable[[BinaryIO], None]


def entry_of(tensor: Tensor) -> Entry:
    """A tensor in memory."""
    flat = tensor.contiguous().cpu().reshape(-1)
    return Entry(
        _NAMES[tensor.dtype],
        tuple(tensor.shape),
        flat.nbytes,
        lambda file: _put(file, flat.view(torch.uint8).numpy().data if flat.numel() else b""),
    )


def entry_in(shard: Shard, name: str) -> Entry:
    """A tensor of another file, copied byte by byte."""
    begin, end = json.loads(shard.header)[name]["data_offsets"]
    start = 8 + len(shard.header) + begin

    def copy(file: BinaryIO) -> None:
        with shard.path.open("rb") as source:
            source.seek(start)
            left = end - begin
            while left:
                block = source.read(min(left, _BLOCK_BYTES))
                if not block:
                    raise OSError(f"{shard.path.name} ended early")
                _put(file, block)
                left -= len(block)

    return Entry(shard.dtypes[name], shard.shapes[name], end - begin, copy)


def write_file(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write a safetensors file; at `path` it appears whole or not at all. Raises OSError."""
    # As the safetensors library does: wider elements first, so that every tensor is aligned.
    names = sorted(entries, key=lambda name: (-_BYTES.get(entries[name].dtype, 1), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        entry = entries[name]
        assert entry.num_bytes == prod(entry.shape) * _BYTES.get(entry.dtype, entry.num_bytes), name
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, at + entry.num_bytes]}
        at += entry.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def body(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            entries[name].write(file)

    write_whole(path, body)


def write_whole(path: Path, body: Callable[[BinaryIO], None] | bytes) -> None:
    """Write a file so that it is at `path` whole and on the disk, or not there. Raises OSError."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        if isinstance(body, bytes):
            file.write(body)
        else:
            body(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def tensor_bytes(shards: Sequence[Shard]) -> int:
    """Bytes of all tensors in some files."""
    return sum(shard.path.stat().st_size - 8 - len(shard.header) for shard in shards)


def _put(file: BinaryIO, data: bytes | memoryview) -> None:
    file.write(data)
