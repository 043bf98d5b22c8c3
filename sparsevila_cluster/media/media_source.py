"""From what the user named (a path, raw bytes or a data URL) to one open file, its kind and its hash.

The same open file serves hashing and decoding, in whichever process, so that a hash belongs to its frames.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote_to_bytes

from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded, TooLarge
from sparsevila_cluster.media.file_kinds import Kind, decide_kind

if TYPE_CHECKING:  # the decoding process starts faster without them
    from sparsevila_cluster.core.config import MediaLimits
    from sparsevila_cluster.core.requests import MediaSource

# Part of every media hash. Change it whenever the same bytes and parameters would give other frames.
SAMPLING_VERSION = b"sparsevila media 2"
BLOCK_BYTES = 1 << 20
_URL = re.compile(r"[a-z][a-z0-9+.\-]*://", re.IGNORECASE)
_BASE64 = re.compile(rb"[A-Za-z0-9+/]*={0,2}")


class DecodeDeadline:
    """A moment on the monotonic clock after which `check()` raises. `left_s`: what is left of `timeout_s`, if not all."""

    def __init__(self, name: str, timeout_s: float, left_s: float | None = None):
        self.name, self.timeout_s = name, timeout_s
        self.at_s = time.monotonic() + (timeout_s if left_s is None else left_s)

    def left_s(self) -> float:
        """Seconds until then; negative afterwards."""
        return self.at_s - time.monotonic()

    def check(self) -> None:
        """Raises DeadlineExceeded: time is up."""
        if self.left_s() <= 0:
            raise DeadlineExceeded(f"{self.name}: decoding took longer than decode_timeout_s = {self.timeout_s:g} s")


@dataclass(frozen=True, eq=False)
class Blob:
    """Bytes to decode. `file` has a descriptor and stands at 0; `name` is short enough for a message; `kind` is decided."""

    file: BinaryIO
    name: str
    kind: Kind
    _stamp: tuple[int, int]

    def check_unchanged(self) -> None:
        """Raises BadMedia: the file was written to since it was opened, so that its hash may not be that of its frames."""
        if _stamp(self.file) != self._stamp:
            raise BadMedia(f"{self.name} changed while it was read")


@contextmanager
def open_source(source: MediaSource, limits: MediaLimits) -> Iterator[Blob]:
    """Open the bytes of `source` for the length of a `with` block.

    Raises:
        BadMedia: not readable, empty, no regular file, a URL, a broken data URL, or another kind than declared.
        TooLarge: more bytes than `limits.max_bytes`.
    """
    if source.kind not in ("video", "image", "auto"):
        raise BadMedia(f"kind must be 'video', 'image' or 'auto', got {source.kind!r}")
    data, declared = source.data, None
    if isinstance(data, str) and data[:5].lower() == "data:":
        data, declared = read_data_url(data, limits)
    if isinstance(data, (bytes, bytearray, memoryview)):
        name = source.name or f"{len(data)} bytes"
        if len(data) > limits.max_bytes:
            raise _too_many_bytes(name, len(data), limits)
        file, size = _in_memory(data), len(data)
    elif isinstance(data, (str, os.PathLike)):
        name = source.name or short_name(os.fspath(data))
        file, size = _open_path(data, name, limits)
    else:
        raise BadMedia(f"media must be a path, bytes or a data URL, got {type(data).__name__}")
    with file:
        if size == 0:
            raise BadMedia(f"{name} is empty; media need at least one frame")
        stamp = _stamp(file)
        yield Blob(file, name, decide_kind(file, name, source.kind, declared), stamp)


def hash_blob(blob: Blob, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline) -> str:
    """BLAKE2b-256 (64 hex digits) of the sampling version, kind, fps, frame cap and all bytes; leaves `file` at 0.

    The parameters come first and have a fixed length, so no two inputs run together. Those of an image are zero:
    sampling does not touch it, and the same picture keeps one name whatever the caller's defaults are.
    """
    is_video = blob.kind == "video"
    fixed = struct.pack("<Bdq", is_video, float(fps) if is_video else 0.0, max_frames if is_video else 0)
    digest = hashlib.blake2b(SAMPLING_VERSION + b"\0" + fixed, digest_size=32)
    size = 0
    try:
        blob.file.seek(0)
        while block := blob.file.read(BLOCK_BYTES):
            deadline.check()
            size += len(block)
            if size > limits.max_bytes:  # the file grew after its size was checked
                raise _too_many_bytes(blob.name, size, limits)
            digest.update(block)
        blob.file.seek(0)
    except OSError as error:
        raise BadMedia(f"cannot read {blob.name}: {error.strerror or error}") from error
    return digest.hexdigest()


def _in_memory(data: bytes | bytearray | memoryview) -> BinaryIO:
    """A file without a name that holds `data`."""
    if hasattr(os, "memfd_create"):
        file: BinaryIO = os.fdopen(os.memfd_create("media"), "w+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115 (closed by open_source)
    file.write(data)
    file.seek(0)
    return file


def _stamp(file: BinaryIO) -> tuple[int, int]:
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns


def _open_path(path: str | os.PathLike[str], name: str, limits: MediaLimits) -> tuple[BinaryIO, int]:
    if _URL.match(os.fspath(path)):
        raise BadMedia(f"URLs are not read by the engine; pass a path, bytes or a data URL, got {name}")
    try:
        # Asked before opening: opening a pipe would wait for a writer, and a device never ends.
        if not stat.S_ISREG(os.stat(path).st_mode):
            what = "a directory" if os.path.isdir(path) else "not a regular file"
            raise BadMedia(f"{name} is {what}; media must be a regular file")
        file = open(path, "rb")  # noqa: SIM115 (closed by open_source)
    except OSError as error:
        raise BadMedia(f"cannot read {name}: {error.strerror or error}") from error
    except BadMedia:
        raise
    except ValueError as error:  # an embedded null byte, or a name that the file system cannot encode
        raise BadMedia(f"{name} is no path: {error}") from error
    size = os.fstat(file.fileno()).st_size
    if size > limits.max_bytes:
        file.close()
        raise _too_many_bytes(name, size, limits)
    return file, size


def read_data_url(url: str, limits: MediaLimits) -> tuple[bytes, str]:
    """The bytes of a base64 data URL and its lower-case media type. Raises BadMedia, TooLarge."""
    head, comma, body = url[5:].partition(",")
    media_type, *parameters = (part.strip().lower() for part in head.split(";"))
    if not comma or "base64" not in parameters[-1:]:
        raise BadMedia(f"a data URL must look like 'data:video/mp4;base64,...', got {short_name(url)}")
    if media_type.partition("/")[0] not in ("video", "image") and media_type != "application/octet-stream":
        raise BadMedia(f"the media type of a data URL must be video/* or image/*, got {media_type or 'none'!r}")
    if len(body) > 4 * limits.max_bytes + 4:  # every byte percent-encoded is the longest legal spelling
        raise _too_many_bytes("the data URL", len(body) * 3 // 4, limits)
    raw = unquote_to_bytes(body)
    if len(raw) // 4 * 3 > limits.max_bytes + 2:
        raise _too_many_bytes("the data URL", len(raw) // 4 * 3, limits)
    try:
        if not _BASE64.fullmatch(raw):
            raise binascii.Error("characters outside of the base64 alphabet")
        missing = 0 if raw.endswith(b"=") else -len(raw) % 4  # many writers leave the padding out
        return base64.b64decode(raw + b"=" * missing, validate=True), media_type
    except binascii.Error as error:
        raise BadMedia(f"{short_name(url)} is not base64: {str(error)[0].lower()}{str(error)[1:]}") from error


def _too_many_bytes(name: str, size: int, limits: MediaLimits) -> TooLarge:
    return TooLarge(f"{name}: {size} bytes are more than max_bytes = {limits.max_bytes}")


def short_name(text: str) -> str:
    """A path or URL as messages quote it."""
    return repr(text if len(text) <= 200 else f"{text[:60]}...")
