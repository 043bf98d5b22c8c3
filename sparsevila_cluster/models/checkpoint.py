"""A checkpoint directory as bytes: its JSON files, its safetensors shards and the name that identifies both.

[ u64 header length | header JSON: name -> dtype, shape, [begin, end) | tensor bytes ]      one safetensors file
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import BadCheckpoint

# Keys of config.json that may differ between two copies of the same model.
_VOLATILE = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "architectures", "use_cache"})
_SAMPLES, _SAMPLE_BYTES = 64, 4096
# What a clone without Git LFS leaves in place of large files.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its raw header, and of each tensor in it the shape and the dtype as the file names it."""

    path: Path
    header: bytes
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A validated directory. Nothing but headers and JSON has been read."""

    directory: Path
    config: dict[str, Any]
    shards: dict[str, Shard]
    file_of: dict[str, str]

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Check that `directory` holds a config and a complete set of safetensors files.

        Raises:
            BadCheckpoint: the message names the file or tensor and the rule that it breaks.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise BadCheckpoint(f"{str(directory)!r} is not a directory; a checkpoint is a directory with config.json")
        if not (directory / "config.json").is_file():
            raise BadCheckpoint(f"{str(directory)!r} is no checkpoint: it has no config.json")
        config = read_json(directory / "config.json")
        file_of, shards = _open_shards(directory)
        return cls(directory, config, shards, file_of)

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in file `name`, or None if there is no such file. Raises BadCheckpoint if it is broken."""
        path = self.directory / name
        return read_json(path) if path.is_file() else None

    def read(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for the wanted tensors, file by file; other tensors are never read from disk."""
        from safetensors import SafetensorError, safe_open

        for name in sorted(names, key=self.file_of.__getitem__):
            file = self.file_of[name]
            try:
                # A handle maps its file, and on a CPU tensors are views of it: pages that were read once, for weights that the
                # decoder lays out anew, would stay with this process. So each tensor is copied and its file closed.
                with safe_open(self.directory / file, "pt", device=str(device)) as handle:
                    tensor = handle.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise BadCheckpoint(f"{file}: cannot be read: {one_line(error)}") from error
            yield name, tensor.clone() if device.type == "cpu" else tensor

    def fingerprint(self) -> str:
        """BLAKE2b-256 hex of config, quantization, shard headers and samples of the tensor bytes.

        The samples (64 evenly spaced blocks of 4 KiB per shard) tell two fine-tunes of one architecture apart without reading
        gigabytes. Two checkpoints that differ only between samples would collide; training changes every tensor, editing a
        few bytes by hand does not.
        """
        digest = hashlib.blake2b(digest_size=32)
        digest.update(canonical_json(_without_volatile(self.config)))
        for name in sorted(self.shards):
            shard = self.shards[name]
            digest.update(len(shard.header).to_bytes(8, "little") + shard.header)
            body = 8 + len(shard.header)
            size = shard.path.stat().st_size - body
            with shard.path.open("rb") as file:
                for i in range(_SAMPLES):
                    file.seek(body + max(0, size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises BadCheckpoint if it cannot be read, is no JSON, or is no object."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path.name}: cannot be read: {error.strerror or error}") from error
    if raw.startswith(_LFS_POINTER):
        raise BadCheckpoint(f"{path.name}: a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise BadCheckpoint(f"{path.name}: must hold a JSON object, got {type(data).__name__}")
    return data


def canonical_json(data: Any) -> bytes:
    """One byte string per value: sorted keys, no blanks."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def one_line(error: Exception) -> str:
    """What a library said, for the end of our own message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _without_volatile(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _without_volatile(value) for key, value in data.items() if key not in _VOLATILE}
    return [_without_volatile(value) for value in data] if isinstance(data, list) else data


def _open_shards(directory: Path) -> tuple[dict[str, str], dict[str, Shard]]:
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        if not (directory / "model.safetensors").is_file():
            found = sorted(p.name for p in directory.glob("*.safetensors")) or sorted(p.name for p in directory.glob("*.bin"))
            hint = f"; found {', '.join(found[:3])}" if found else ""
            raise BadCheckpoint(
                f"{str(directory)!r} has no model.safetensors and no model.safetensors.index.json{hint}; "
                "only safetensors weights are read"
            )
        shard = open_shard(directory / "model.safetensors")
        return dict.fromkeys(shard.shapes, "model.safetensors"), {"model.safetensors": shard}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BadCheckpoint(f"{index.name}: `weight_map` must map tensor names to file names")
    shards = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise BadCheckpoint(f"{index.name}: shard {file!r} must be a plain file name in the same directory")
        if not (directory / file).is_file():
            raise BadCheckpoint(f"missing shard {file!r}, which {index.name} names")
        shards[file] = open_shard(directory / file)
    for name, file in weight_map.items():
        if name not in shards[file].shapes:
            raise BadCheckpoint(f"tensor {name!r} is not in {file}, although {index.name} says so")
    return weight_map, shards


def open_shard(path: Path) -> Shard:
    """One safetensors file. Raises BadCheckpoint: it is cut off, or no such file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _LFS_POINTER[:8]:
            raise BadCheckpoint(f"{path.name}: a Git LFS pointer, not the file itself; `git lfs pull` fetches it")
        num = int.from_bytes(start, "little")
        if size < 8 or num > size - 8:
            raise BadCheckpoint(f"{path.name}: truncated: {size} bytes do not hold the safetensors header")
        header = file.read(num)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        dtypes = {name: str(entry["dtype"]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise BadCheckpoint(f"{path.name}: not a safetensors file: broken header") from error
    if end != size - 8 - num:
        raise BadCheckpoint(f"{path.name}: truncated: holds {size - 8 - num} tensor bytes, its header promises {end}")
    return Shard(path, header, shapes, dtypes)
