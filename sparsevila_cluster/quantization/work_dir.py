"""The directory beside the destination where a quantization grows, and from where it goes on after it was interrupted.

.DST.quantizing/   record.json | lock | vision.safetensors | layer-00000.safetensors ... | whole/  -> renamed to DST at the end
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest, TooLarge
from sparsevila_cluster.models.checkpoint import Shard, open_shard, read_json
from sparsevila_cluster.quantization.shard_writer import entry_of, write_file, write_whole

_DONE = "done"


@dataclass(frozen=True)
class WorkDir:
    """An open scratch directory, locked by this process. resumed: pieces of an earlier run were found."""

    directory: Path
    resumed: bool

    @property
    def whole(self) -> Path:
        """Where the checkpoint is put together."""
        return self.directory / "whole"

    def path_of(self, piece: str) -> Path:
        """Where a piece ("vision", "layer-00000") is kept."""
        return self.directory / f"{piece}.safetensors"

    def has(self, piece: str) -> bool:
        """Whether a piece is finished."""
        return self.path_of(piece).is_file()

    def save(self, piece: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished piece. Raises TooLarge: the disk is full."""
        with full_disk_is_told(self.directory):
            write_file(self.path_of(piece), {name: entry_of(tensor) for name, tensor in tensors.items()})

    def open(self, piece: str) -> Shard:
        """Read a finished piece. Raises BadCheckpoint: its file is damaged."""
        return open_shard(self.path_of(piece))

    def publish(self, target: Path) -> None:
        """Make `whole` the destination, in one step, and remove everything else."""
        _sync(self.whole)
        (self.directory / _DONE).touch()
        os.rename(self.whole, target)
        _sync(target.parent)
        shutil.rmtree(self.directory)


def check_target(target: Path) -> None:
    """Raises BadRequest: something is at the destination, or it has no place to be."""
    if target.exists() or target.is_symlink():
        left = _beside(target)
        if (left / _DONE).is_file() and not (left / "whole").exists():  # killed between the rename and the removal
            shutil.rmtree(left)
        raise BadRequest(f"{str(target)!r} exists; quantize writes a new directory")
    if not target.absolute().parent.is_dir():
        raise BadRequest(f"{str(target.absolute().parent)!r} is not a directory, so {target.name!r} cannot be made in it")


@contextmanager
def open_scratch(target: Path, record: Mapping[str, Any], restart: bool) -> Iterator[WorkDir]:
    """The scratch directory of `target`, made anew or as an earlier run with the same `record` left it. restart: whatever is there
    is thrown away.

    Raises:
        BadRequest: it holds work of another record, or another process works in it. The message names what differs.
    """
    directory = _beside(target)
    with full_disk_is_told(directory.parent):
        directory.mkdir(exist_ok=True)
        lock = (directory / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadRequest(f"another process quantizes to {str(target)!r} ({directory} is locked)") from None
        if restart:
            _empty(directory)
        path = directory / "record.json"
        if path.is_file():
            _compare(directory, _read(path), record)
        else:
            _empty(directory)
            with full_disk_is_told(directory):
                write_whole(path, json.dumps(dict(record), indent=1, sort_keys=True).encode())
        yield WorkDir(directory, any(directory.glob("*.safetensors")))


def check_room(target: Path, scratch: WorkDir, num_bytes: int) -> None:
    """Raises TooLarge: the file system of `target` has less room than `num_bytes`, counting what earlier runs have written."""
    there = sum(path.stat().st_size for path in scratch.directory.rglob("*") if path.is_file())
    free = shutil.disk_usage(scratch.directory).free
    if free + there < num_bytes:
        raise TooLarge(f"{str(target)!r} needs {num_bytes} bytes; {free} are free there")


@contextmanager
def full_disk_is_told(directory: Path) -> Iterator[None]:
    """Turns what a full or forbidden disk raises into errors of ours; what was finished before stays for the next run."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TooLarge(f"no room is left on the disk of {str(directory)!r}; with more room the same call goes on") from error
        raise BadRequest(f"cannot write in {str(directory)!r}: {error.strerror or error}") from error


def _beside(target: Path) -> Path:
    return target.absolute().parent / f".{target.name}.quantizing"


def _compare(directory: Path, found: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    known = json.loads(json.dumps(dict(wanted)))
    for name in sorted({*found, *known}):
        if found.get(name) != known.get(name):
            raise BadRequest(
                f"{str(directory)!r} holds unfinished work with {name} = {found.get(name)!r}, not {known.get(name)!r}; "
                "the same settings go on with it, --restart throws it away"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except BadCheckpoint:
        return {"record": "unreadable"}


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _sync(directory: Path) -> None:
    """Names of files reach the disk with their directory."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
