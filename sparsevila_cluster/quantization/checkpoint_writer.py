"""The quantized checkpoint put together: the source's shards under the source's own names, with new tensors in place of some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevila_cluster.models.checkpoint import Checkpoint, Shard, read_json
from sparsevila_cluster.models.loading.quantization_scheme import VISION_SECTION
from sparsevila_cluster.quantization.shard_writer import Entry, entry_in, write_file, write_whole
from sparsevila_cluster.quantization.work_dir import WorkDir, full_disk_is_told

INDEX = "model.safetensors.index.json"
# Weights in other forms would be those of the original, and code is not part of a quantized copy.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".py", ".index.json")
_OUTSIDE_TEXT = ("visual", "vision_tower", "multi_modal_projector")


@dataclass(frozen=True)
class Replacement:
    """Tensors for one that was there: names on disk -> (file that holds it, name in that file)."""

    tensors: dict[str, tuple[Shard, str]]


def plan_replacements(sources: Mapping[str, str], pieces: Iterable[Shard]) -> dict[str, Replacement]:
    """Name on disk of a source tensor -> what stands in its place. sources: names in memory -> on disk; pieces: files of finished
    tensors by their names in memory.
    """
    found: dict[str, dict[str, tuple[Shard, str]]] = {}
    for piece in pieces:
        for name in piece.shapes:
            base, _, leaf = name.rpartition(".")
            old = sources[name] if name in sources else sources[f"{base}.weight"]
            new = old if name in sources else f"{old.removesuffix('.weight')}.{leaf}"
            found.setdefault(old, {})[new] = (piece, name)
    return {old: Replacement(tensors) for old, tensors in found.items()}


def write_checkpoint(
    files: Checkpoint,
    scratch: WorkDir,
    replacements: Mapping[str, Replacement],
    quantization: Mapping[str, Any],
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Fill `scratch.whole`: shard by shard, then the index and other files, config.json last. Shards that an earlier run finished
    are left as they are.

    Raises:
        TooLarge, BadRequest: the disk is full, or refuses.
    """
    whole = scratch.whole
    with full_disk_is_told(whole):
        whole.mkdir(exist_ok=True)
        weight_map: dict[str, str] = {}
        total = 0
        for number, (file, shard) in enumerate(sorted(files.shards.items())):
            report("write", number, len(files.shards))
            entries = _entries(files, file, shard, replacements)
            if not (whole / file).is_file():
                write_file(whole / file, entries)
            weight_map.update(dict.fromkeys(entries, file))
            total += sum(entry.num_bytes for entry in entries.values())
        if (files.directory / INDEX).is_file():
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_whole(whole / INDEX, json.dumps(index, indent=2).encode())
        copy_other_files(files, whole)
        # Read anew: transformers writes into the nested values of what it is given.
        config = {**read_json(files.directory / "config.json"), "quantization_config": dict(quantization)}
        write_whole(whole / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    report("write", len(files.shards), len(files.shards))


def copy_other_files(files: Checkpoint, target: Path) -> None:
    """Tokenizer, processor, template and the like: all that is no weight, no code, not config.json and not there yet."""
    for path in sorted(files.directory.iterdir()):
        skip = path.name.startswith(".") or path.name.endswith(_NOT_COPIED) or path.name == "config.json"
        if path.is_file() and not skip and not (target / path.name).exists():
            with full_disk_is_told(target):
                shutil.copyfile(path, target / path.name)


def size_of(files: Checkpoint, replacements_bytes: Mapping[str, int]) -> int:
    """Bytes of the tensors of a checkpoint in which some, by their names on disk, take other room than before."""
    total = 0
    for name, file in files.file_of.items():
        shard = files.shards[file]
        total += replacements_bytes[name] if name in replacements_bytes else entry_in(shard, name).num_bytes
    return total


def quantization_config(files: Checkpoint, group_size: int, keep: Iterable[str], vision: bool) -> dict[str, Any]:
    """What config.json says: AutoAWQ's keys, and a section of ours for the tower."""
    tops = {name.split(".")[0] for name in files.file_of} | {".".join(name.split(".")[:2]) for name in files.file_of}
    # Both spellings: some readers look for a module's whole name from the start, some for a part of it.
    spared = [f"{lead}{name}" for name in _OUTSIDE_TEXT if {name, f"model.{name}"} & tops for lead in ("", "model.")]
    spared += list(keep)
    found: dict[str, Any] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": spared or None,
    }
    return {**found, "vision": VISION_SECTION} if vision else found


def _entries(files: Checkpoint, file: str, shard: Shard, replacements: Mapping[str, Replacement]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name in shard.shapes:
        if files.file_of.get(name) != file:
            continue
        if name in replacements:
            for new, (piece, held) in replacements[name].tensors.items():
                entries[new] = entry_in(piece, held)
        else:
            entries[name] = entry_in(shard, name)
    return entries
