"""Bytes that clients sent, as files: uploads until they expire, everything else as long as a preparation needs it.

All state that others need is in the folder (owner, id and kind in the names, age in the times), so that several routers may share
one.

    <folder>/<digest of the owner>/<upload id>.<kind>     a whole upload
    <folder>/<digest of the owner>/<id>.part              one that still arrives, or bytes of one preparation
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadConfig, Internal, NotFound, QueueFull, SparseVilaError, TooLarge, Unavailable
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.private_folder import check_private, own_folder

KINDS = ("auto", "video", "image")
SWEEP_S = 30.0
# How long a count of what other routers keep in a shared folder is good for, in seconds.
COUNT_TTL_S = 1.0
# When a client may try again that found the disk full.
FULL_DISK_RETRY_S = 10.0
# Folders of spools without a configured one.
PREFIX = "sparsevila-spool-"
_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class StoredUpload:
    """A whole file. digest: BLAKE2b-256 of the bytes, in hex."""

    upload_id: str
    num_bytes: int
    digest: str
    expires_in_s: float


class Spool:
    """Threads may share it. What it has written is deleted when it is closed; a folder of its own, too."""

    def __init__(
        self, config: GatewayConfig, max_bytes: int, sink: MetricsSink, share_of: Callable[[int], int] = lambda budget: budget
    ):
        """max_bytes: of one file. share_of: how much of the quota one owner may use.

        Raises BadConfig: the configured folder cannot be used, or is not this user's alone.
        """
        self._share_of = share_of
        self._quota_bytes, self._ttl_s, self._max_bytes, self._sink = config.spool_bytes, config.upload_ttl_s, max_bytes, sink
        self._shared = config.spool_dir is not None
        try:
            if config.spool_dir is not None:
                Path(config.spool_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
                check_private(Path(config.spool_dir))
            self._lock_fd: int | None = None
            if config.spool_dir is not None:
                self._folder = Path(config.spool_dir).resolve()
            else:
                self._folder, self._lock_fd = own_folder(PREFIX)
            if not os.access(self._folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "not writable")
        except OSError as error:
            raise BadConfig(f"spool_dir: cannot use {config.spool_dir!r}: {error.strerror or error}") from error
        self._lock = threading.RLock()
        self._sizes: dict[Path, int] = {}
        self._held: Counter[Path] = Counter()
        self._others: tuple[float, Counter[Path]] = (-COUNT_TTL_S, Counter())
        self._closed = False

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept by this spool."""
        with self._lock:
            return sum(self._sizes.values())

    def num_bytes_of(self, owner: str) -> int:
        """Bytes that are kept for one owner, also by other spools in the same folder."""
        with self._lock:
            return self._used()[self._owner_folder(owner)]

    def begin(self, owner: str) -> SpoolPart:
        """A new file for this owner. Raises Unavailable: closed. QueueFull: a full disk. Internal: the disk."""
        with self._lock:
            if self._closed:
                raise Unavailable("the spool is closed")
            path = self._owner_folder(owner) / f"{uuid.uuid4().hex}.part"
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                part = SpoolPart(self, path)
            except OSError as error:
                raise _disk_error(error) from error
            self._sizes[path] = 0
            self._held[path] += 1
        return part

    @contextmanager
    def hold(self, owner: str, upload_id: str) -> Iterator[tuple[Path, str]]:
        """(path, kind) of a whole upload, which stays for the length of a `with` block. Using it renews its life.

        Raises:
            NotFound: unknown, expired, or somebody else's.
        """
        with self._lock:
            path = self._find(owner, upload_id)
            self._held[path] += 1
        try:
            yield path, path.suffix[1:]
        finally:
            with self._lock:
                self._release(path)

    def sweep(self) -> None:
        """Delete what has expired and is not in use, also what a router that is gone left in a shared folder.

        What is in use here is touched, so that no other router of the folder takes it for expired; to be called every `sweep_s`.
        """
        with self._lock:
            for path in {*self._sizes, *(self._files() if self._shared else ())}:
                if path in self._held:
                    _touch(path)
                elif self._is_old(path):  # or deleted by another router
                    self._delete(path)

    def close(self) -> None:
        """Delete everything that this spool wrote. Idempotent."""
        with self._lock:
            self._closed = True
            for path in list(self._sizes):
                self._delete(path)
            if self._lock_fd is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                os.close(self._lock_fd)
                self._lock_fd = None

    def make_room(self, path: Path, more_bytes: int) -> None:
        """Account for bytes that are about to be written. Raises TooLarge: of one file. QueueFull: over the quota. Unavailable."""
        with self._lock:
            if self._closed or path not in self._sizes:
                raise Unavailable("the spool is closed")
            size, share = self._sizes[path] + more_bytes, self._share_of(self._quota_bytes)
            share_name = "spool_bytes" if share == self._quota_bytes else "max_share of spool_bytes"
            if size > min(self._max_bytes, share):
                name, limit = min(("max_bytes", self._max_bytes), (share_name, share), key=lambda pair: pair[1])
                raise TooLarge(f"the file has more than {name} = {limit} bytes")
            if self._excess(path.parent, share, more_bytes)[0] > 0:
                self.sweep()
                excess, of_owner = self._excess(path.parent, share, more_bytes)
                if excess > 0:
                    name, limit = (share_name, share) if of_owner else ("spool_bytes", self._quota_bytes)
                    used = limit - more_bytes + excess
                    whose = "the uploads of one owner use" if of_owner and share < self._quota_bytes else "uploads use"
                    ours = (one for one in self._sizes if one != path and (not of_owner or one.parent == path.parent))
                    raise QueueFull(
                        f"{whose} {used} bytes, {more_bytes} more do not fit into {name} = {limit}",
                        retry_after_s=self._until_gone_s(ours, excess),
                    )
            self._sizes[path] = size
            self._report_bytes()

    def keep(self, path: Path, kind: str) -> str:
        """Make a finished part a whole upload; returns its id."""
        with self._lock:
            if self._closed or path not in self._sizes:
                raise Unavailable("the spool is closed")
            upload_id = path.stem
            whole = path.with_name(f"{upload_id}.{kind}")
            os.replace(path, whole)
            self._sizes[whole] = self._sizes.pop(path)
            self._held.pop(path, None)
        return upload_id

    def forget(self, path: Path) -> None:
        """Delete a part. Idempotent."""
        with self._lock:
            self._held.pop(path, None)
            self._delete(path)

    @property
    def sweep_s(self) -> float:
        """How often to sweep, in seconds."""
        return min(SWEEP_S, self._ttl_s / 3)

    @property
    def ttl_s(self) -> float:
        """How long an upload that nobody uses is kept, in seconds."""
        return self._ttl_s

    def _find(self, owner: str, upload_id: str) -> Path:
        if _ID.fullmatch(upload_id):
            for kind in KINDS:
                path = self._owner_folder(owner) / f"{upload_id}.{kind}"
                if path.is_file() and (self._held[path] or not self._is_old(path)):
                    _touch(path)
                    return path
        raise NotFound(f"no upload {upload_id[:40]!r}: it is unknown, or expired after upload_ttl_s = {self._ttl_s:g} s")

    def _release(self, path: Path) -> None:
        self._held[path] -= 1
        if self._held[path] <= 0:
            del self._held[path]

    def _owner_folder(self, owner: str) -> Path:
        return self._folder / hashlib.blake2b(owner.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def _is_old(self, path: Path) -> bool:
        return _age_s(path) > self._ttl_s

    def _delete(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        self._sizes.pop(path, None)
        self._report_bytes()

    def _used(self) -> Counter[Path]:
        """Bytes in each owner's folder, of this spool and of all others."""
        if self._shared and time.monotonic() - self._others[0] > COUNT_TTL_S:
            self._others = time.monotonic(), _sum_up((path, _size(path)) for path in self._files() if path not in self._sizes)
        return _sum_up(self._sizes.items()) + self._others[1]

    def _excess(self, folder: Path, share: int, more_bytes: int) -> tuple[int, bool]:
        """(bytes that are too many with `more_bytes` in the folder of an owner, whether they are of the owner's share)."""
        used = self._used()
        of_owner, of_all = used[folder] + more_bytes - share, used.total() + more_bytes - self._quota_bytes
        return max(of_owner, of_all), of_owner >= of_all

    def _until_gone_s(self, paths: Iterable[Path], num_bytes: int) -> float:
        """Seconds until so much of these files may be gone: what a preparation needs at any time, uploads when they expire."""
        left = [(1.0 if path.suffix == ".part" else max(1.0, self._ttl_s - _age_s(path)), self._sizes[path]) for path in paths]
        for left_s, size in sorted(left):
            num_bytes -= size
            if num_bytes <= 0:
                return left_s
        return self._ttl_s

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("*/*") if _ID.fullmatch(path.stem) and path.suffix[1:] in (*KINDS, "part")]

    def _report_bytes(self) -> None:
        self._sink.set("spool_bytes", sum(self._sizes.values()))


class SpoolPart:
    """A file that still arrives. Its methods may be called from any thread, one at a time or not."""

    def __init__(self, spool: Spool, path: Path):
        self.path = path
        self._spool = spool
        self._file = open(path, "xb", buffering=0, opener=_open_private)  # noqa: SIM115 (closed by keep and discard)
        self._digest = hashlib.blake2b(digest_size=32)
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, 0 once it is closed."""
        return self._file.tell() if not self._file.closed else 0

    def write(self, data: bytes) -> None:
        """Append. Raises TooLarge, QueueFull (the quota, a full disk), Unavailable (closed meanwhile), Internal (the disk)."""
        with self._lock:
            if self._file.closed:
                raise Unavailable("the upload was given up")
            self._spool.make_room(self.path, len(data))
            self._digest.update(data)
            view = memoryview(data)
            try:
                while view:
                    view = view[self._file.write(view) :]
            except OSError as error:
                raise _disk_error(error) from error

    def keep(self, kind: str) -> StoredUpload:
        """The whole file as an upload. Raises Unavailable: closed meanwhile."""
        with self._lock:
            if self._file.closed:
                raise Unavailable("the upload was given up")
            num_bytes = self._file.tell()
            self._file.close()
            upload_id = self._spool.keep(self.path, kind)
        return StoredUpload(upload_id, num_bytes, self._digest.hexdigest(), self._spool.ttl_s)

    def discard(self) -> None:
        """Delete it, unless it was kept. Idempotent."""
        with self._lock:
            self._file.close()
        self._spool.forget(self.path)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


def _disk_error(error: OSError) -> SparseVilaError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QueueFull("the disk of the spool is full", retry_after_s=FULL_DISK_RETRY_S)
    return Internal(f"cannot keep the file: {error.strerror or error}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _touch(path: Path) -> None:
    """It is used now. When it was written stays: whoever reads it meanwhile looks at that, to see whether it is still the same."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _age_s(path: Path) -> float:
    """Seconds since it was last written or used; infinite for what is gone."""
    try:
        found = path.stat()
        return time.time() - max(found.st_mtime, found.st_atime)
    except OSError:
        return math.inf


def _sum_up(sizes: Iterable[tuple[Path, int]]) -> Counter[Path]:
    """Bytes in each folder."""
    used: Counter[Path] = Counter()
    for path, size in sizes:
        used[path.parent] += size
    return used
