"""How media reach the server: inside the request when small, otherwise uploaded in pieces first, and named by their upload id."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import os
import re
import stat
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from os import fspath
from typing import BinaryIO, TypeVar
from urllib.parse import unquote_to_bytes

from sparsevila_cluster.client.call_errors import RetryPolicy
from sparsevila_cluster.client.connection import Connection
from sparsevila_cluster.client.targets import Target
from sparsevila_cluster.core.call_options import Source, list_sources
from sparsevila_cluster.core.display import ReprMixin
from sparsevila_cluster.core.errors import BadMedia, SparseVilaError
from sparsevila_cluster.pb import video_qa_pb2 as pb

T = TypeVar("T")
Progress = Callable[[str, int, int], object]

PIECE_BYTES = 2**20
# Beside its media, a request holds a few numbers and ids.
MESSAGE_ROOM_BYTES = 64 * 1024
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True)
class LocalMedia:
    """Media that this side has: the path of a file, or bytes. `kind` is "video", "image" or "auto"."""

    data: str | bytes
    kind: str = "auto"

    @property
    def name(self) -> str:
        """Its file name, or its size where it has none."""
        return os.path.basename(self.data) if isinstance(self.data, str) else f"{len(self.data)} bytes"

    def size(self) -> int:
        """In bytes. Raises BadMedia: no file that can be read, or an empty one."""
        if isinstance(self.data, bytes):
            size = len(self.data)
        else:
            state = self._read(os.stat)
            if not stat.S_ISREG(state.st_mode):
                raise BadMedia(f"{self.data!r} is not a regular file")
            size = state.st_size
        if size == 0:
            raise BadMedia(f"{self.data if isinstance(self.data, str) else self.name!r} is empty")
        return size

    def open(self) -> BinaryIO:
        """Its bytes. Raises BadMedia."""
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else self._read(lambda path: open(path, "rb"))  # noqa: SIM115

    def _read(self, how: Callable[[str], T]) -> T:
        assert isinstance(self.data, str)
        try:
            return how(self.data)
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL byte
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise BadMedia(f"cannot read {self.data!r}: {reason}") from error


@dataclass(frozen=True, repr=False)
class Upload(ReprMixin):
    """Media that the server keeps for `expires_in_s`: give it to `prepare`, alone or among others.

    num_bytes: its size; digest: BLAKE2b-256 of the bytes, in hex; local: what was sent, to send it again should the server lose it.
    """

    upload_id: str
    num_bytes: int
    digest: str
    expires_in_s: float
    local: LocalMedia | None = field(default=None, repr=False, compare=False)


ClientSource = Source | Upload


class MediaPayload:
    """The sources of one preparation on their way to one server.

    Raises:
        BadRequest: something that is no source. BadMedia: a data URL that is none.
    """

    def __init__(self, connection: Connection, given: ClientSource | Sequence[ClientSource], progress: Progress | None):
        self._connection = connection
        self._progress = progress
        several = given if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else [given]
        self._sources = [one if isinstance(one, Upload) else _source(one) for one in several]

    def __len__(self) -> int:
        return len(self._sources)

    async def pack(self, attempts: RetryPolicy) -> list[pb.MediaSource]:
        """The sources as a request names them, after everything was uploaded that has to be, once.

        Raises:
            BadMedia: a file that cannot be read. What the server raises for an upload.
        """
        packed = []
        sizes = {i: await asyncio.to_thread(one.size) for i, one in enumerate(self._sources) if isinstance(one, LocalMedia)}
        room_bytes = await self._inline_bytes(attempts) if sizes else 0
        for i, source in enumerate(self._sources):
            if isinstance(source, LocalMedia):
                if sizes[i] <= room_bytes:
                    room_bytes -= sizes[i]
                    packed.append(pb.MediaSource(inline=await asyncio.to_thread(_all_of, source), kind=source.kind))
                    continue
                source = self._sources[i] = await upload(self._connection, source, attempts, self._progress)
            if isinstance(source, Upload):
                packed.append(pb.MediaSource(upload_id=source.upload_id))
            elif source.startswith("file://"):
                packed.append(pb.MediaSource(file=source.removeprefix("file://")))
            else:
                packed.append(pb.MediaSource(url=source))
        return packed

    async def upload_again(self, attempts: RetryPolicy) -> bool:
        """Upload once more what the server may have lost. False: nothing was uploaded from here.

        Raises:
            BadMedia: a file is not any more what was uploaded. What the server raises for an upload.
        """
        sent = False
        for i, source in enumerate(self._sources):
            if isinstance(source, Upload) and source.local is not None:
                again = await upload(self._connection, source.local, attempts, self._progress)
                if again.digest != source.digest:
                    raise BadMedia(f"{source.local.name!r} has changed since it was uploaded")
                self._sources[i], sent = again, True
        return sent

    async def _inline_bytes(self, attempts: RetryPolicy) -> int:
        what = "asking for the server's limits"
        info: pb.ServerInfo = await self._connection.call("GetServerInfo", pb.GetServerInfoRequest(), attempts.left_s(), what)
        return min(info.max_inline_bytes, max(0, info.max_message_bytes - MESSAGE_ROOM_BYTES))


async def upload(connection: Connection, local: LocalMedia, attempts: RetryPolicy, progress: Progress | None) -> Upload:
    """Send the bytes in pieces; once more from the start if the connection breaks, for an upload is nothing before it is whole."""
    async with aclosing(_steps(connection, local, attempts)) as steps:
        async for step in steps:
            if isinstance(step, Upload):
                return step
            if progress is not None:
                progress("upload", *step)
    raise AssertionError("an upload ends with its id or with an error")


async def _steps(
    connection: Connection, local: LocalMedia, attempts: RetryPolicy
) -> AsyncGenerator[tuple[int, int] | Upload, None]:
    """(bytes on their way, of how many), many times; then the upload."""
    target: Target | None = None
    while True:
        num_sent, total = 0, await asyncio.to_thread(local.size)
        target = connection.choose(after=target)
        try:
            sending = connection.send(target, "UploadMedia", _pieces(local), attempts.left_s(), f"uploading {local.name!r}")
            async with aclosing(sending) as messages:
                async for message in messages:
                    if isinstance(message, pb.MediaChunk):
                        num_sent += len(message.data)
                        yield num_sent, max(total, num_sent)
                    else:
                        yield Upload(message.upload_id, message.num_bytes, message.digest, message.expires_in_s, local)
            return
        except SparseVilaError as error:
            await connection.again(attempts, error)


async def _pieces(local: LocalMedia) -> AsyncGenerator[pb.MediaChunk, None]:
    is_first, name = True, local.name if isinstance(local.data, str) else ""
    with await asyncio.to_thread(local.open) as file:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield pb.MediaChunk(data=piece, file_name=name, kind=local.kind) if is_first else pb.MediaChunk(data=piece)
            is_first = False


def _all_of(local: LocalMedia) -> bytes:
    with local.open() as file:
        return file.read()


def to_local_media(source: Source) -> LocalMedia:
    """Media that this side has. Raises BadRequest: no source, or a URL. BadMedia: a data URL that is none."""
    found = _source(source)
    if isinstance(found, LocalMedia):
        return found
    raise BadMedia(f"only what is here can be uploaded: a path, bytes or a data URL, got {found!r}")


def _source(source: Source) -> LocalMedia | str:
    """What a user gave: something that is here, or the URL of something elsewhere."""
    (one,) = list_sources([source])
    if isinstance(one, bytes):
        return LocalMedia(one)
    text = fspath(one)
    if text[:5].lower() == "data:":
        return _data_url(text)
    return text if isinstance(one, str) and URL.match(text) else LocalMedia(text)


def _data_url(url: str) -> LocalMedia:
    head, comma, body = url[5:].partition(",")
    kind = head.partition("/")[0].strip().lower()
    if not comma or not head.lower().endswith("base64"):
        raise BadMedia(f"a data URL must look like 'data:video/mp4;base64,...', got {url[:60]!r}")
    raw = unquote_to_bytes(body)
    try:
        data = base64.b64decode(raw + b"=" * (-len(raw) % 4), validate=True)
    except binascii.Error as error:
        raise BadMedia(f"{url[:60]!r} is not base64: {error}") from error
    return LocalMedia(data, kind if kind in ("video", "image") else "auto")
