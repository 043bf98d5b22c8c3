"""Media as a client names it, made readable for a pipeline: uploads, inline bytes, URLs, files below the root."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import (
    BadMedia,
    BadRequest,
    PermissionDenied,
    QueueFull,
    TooLarge,
)
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.gateway.call import Call
from sparsevila_cluster.gateway.spool import KINDS, Spool, SpoolPart, StoredUpload
from sparsevila_cluster.gateway.url_fetcher import UrlFetcher
from sparsevila_cluster.media.media_source import read_data_url, short_name

P = ParamSpec("P")
R = TypeVar("R")

MAX_CHUNK_BYTES = 1 << 20
# How long an upload may pause between two chunks.
CHUNK_WAIT_S = 60.0
FILE_THREADS = 2


@dataclass(frozen=True)
class MediaChunk:
    """A piece of an upload, at most MAX_CHUNK_BYTES. kind: "video", "image" or "auto", of the first piece only."""

    data: bytes
    kind: str = ""


@dataclass(frozen=True)
class MediaReference:
    """Media as a client names it, in one of four ways. kind: "video", "image" or "auto"; "" = as uploaded, else "auto"."""

    upload_id: str | None = None
    inline: bytes | None = None
    url: str | None = None
    file: str | None = None
    kind: str = ""


@dataclass
class OpenedMedia:
    """What a pipeline reads. full: the spool had no room for all of it, so that it is only good for looking up what is resident."""

    sources: tuple[MediaSource, ...] = ()
    full: QueueFull | None = None


class UploadPace:
    """How long one client was waited for, and how long it may be for the bytes it brought. Our own work is not on its clock."""

    def __init__(self, min_bytes_per_s: int, grace_s: float):
        self._min_bytes_per_s, self._grace_s = min_bytes_per_s, grace_s
        self._waited_s = 0.0

    async def wait_for(self, chunk: Awaitable[R], num_bytes: int, within_s: float) -> R:
        """`chunk`, where `num_bytes` came before it. Raises DeadlineExceeded: within_s is over, or it is too slow."""
        most_s = math.inf
        if self._min_bytes_per_s:
            most_s = self._grace_s + num_bytes / self._min_bytes_per_s - self._waited_s
        what = "the next chunk of the upload"
        if most_s < within_s:
            rate = f"min_upload_bytes_per_s = {self._min_bytes_per_s} after upload_grace_s = {self._grace_s:g}"
            what = f"{what} after {num_bytes} bytes in {self._waited_s:.1f} s, at {rate},"
        begun_s = time.perf_counter()
        try:
            return await wait_within(chunk, max(0.0, min(within_s, most_s)), what)
        finally:
            self._waited_s += time.perf_counter() - begun_s


class MediaSources:
    """Opens what clients name. `close` ends its threads; files that are being written are the spool's to delete."""

    def __init__(self, config: GatewayConfig, limits: MediaLimits, spool: Spool, fetcher: UrlFetcher):
        self._config, self._limits, self._spool, self._fetcher = config, limits, spool, fetcher
        # Hashing and writing a chunk takes milliseconds, in which an event loop would tell no tokens.
        self._threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="spool")

    def close(self) -> None:
        """Waits for what its threads have begun."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def receive(self, call: Call, chunks: AsyncIterator[MediaChunk]) -> StoredUpload:
        """A file in chunks, whose iteration ends only behind the whole file. One that does not arrive whole is deleted.

        Raises:
            BadRequest: an empty file, a chunk above MAX_CHUNK_BYTES, an unknown kind. TooLarge. QueueFull: over the quota.
            DeadlineExceeded: the client pauses for too long, or sends fewer than `min_upload_bytes_per_s`. Whatever the iteration
            raises.
        """
        part, kind, first = self._spool.begin(call.principal.owner), "auto", True
        arriving, pace = aiter(chunks), UploadPace(self._config.min_upload_bytes_per_s, self._config.upload_grace_s)
        try:
            while True:
                within_s = min(CHUNK_WAIT_S, call.left_s(self._spool.ttl_s))
                chunk = await pace.wait_for(anext(arriving, None), part.num_bytes, within_s)
                if chunk is None:
                    break
                if first:
                    kind, first = media_kind(chunk.kind), False
                if len(chunk.data) > MAX_CHUNK_BYTES:
                    raise BadRequest(f"a chunk may hold at most {MAX_CHUNK_BYTES} bytes, got {len(chunk.data)}")
                await self._in_thread(part.write, chunk.data)
            if part.num_bytes == 0:
                raise BadRequest("the upload is empty; media need at least one byte")
            return part.keep(kind)
        except BaseException:
            part.discard()
            raise

    @asynccontextmanager
    async def opened(self, call: Call, named: Sequence[MediaReference]) -> AsyncIterator[OpenedMedia]:
        """The sources for the length of an `async with` block; errors about them tell the client's names, not ours.

        Raises:
            BadRequest, BadMedia, TooLarge, QueueFull, DeadlineExceeded. NotFound: an upload. PermissionDenied: a file or URL.
        """
        if len(named) > self._limits.max_images:
            raise BadRequest(f"{len(named)} media in one request; the limit is {self._limits.max_images}")
        async with AsyncExitStack() as stack:
            opened = OpenedMedia()
            for reference in named:
                opened.sources += (await self._open(call, reference, stack, opened),)
            yield opened

    async def _open(self, call: Call, named: MediaReference, stack: AsyncExitStack, opened: OpenedMedia) -> MediaSource:
        kind = media_kind(named.kind)
        if named.upload_id is not None:
            path, uploaded_as = stack.enter_context(self._spool.hold(call.principal.owner, named.upload_id))
            return _source(str(path), kind if named.kind else uploaded_as, f"upload {named.upload_id!r}")
        if named.inline is not None:
            return await self._keep_inline(named.inline, kind, call, stack, opened)
        if named.url is not None and named.url[:5].lower() == "data:":
            return await self._keep_data_url(named.url, kind, call, stack, opened)
        if named.url is not None:
            return _source(await self._keep_url(named.url, call, stack, opened), kind, repr(named.url[:200]))
        if named.file is not None:
            path = await self._in_thread(allowed_file, named.file, self._config.file_root)
            return _source(str(path), kind, short_name(named.file))
        raise BadRequest("a source must name one of upload_id, inline, url, file; got none")

    async def _keep_inline(self, data: bytes, kind: str, call: Call, stack: AsyncExitStack, opened: OpenedMedia) -> MediaSource:
        if len(data) > self._config.max_inline_bytes:
            most = f"max_inline_bytes = {self._config.max_inline_bytes}"
            raise TooLarge(f"{len(data)} bytes within a request are more than {most}; upload them")
        if not data:
            raise BadMedia("inline media is empty; media need at least one frame")
        name = f"inline media of {len(data)} bytes"
        try:
            part = self._part(call, stack)
            await self._in_thread(part.write, data)
        except QueueFull as error:
            opened.full = error
            return _source(data, kind, name)
        return _source(str(part.path), kind, name)

    async def _keep_data_url(self, url: str, kind: str, call: Call, stack: AsyncExitStack, opened: OpenedMedia) -> MediaSource:
        """Bytes travel as files between workers, whatever they came in. What the URL says of its kind is what it is held to."""
        data, media_type = await self._in_thread(read_data_url, url, self._limits)
        declared = media_type.partition("/")[0]
        return await self._keep_inline(data, declared if kind == "auto" and declared in KINDS else kind, call, stack, opened)

    async def _keep_url(self, url: str, call: Call, stack: AsyncExitStack, opened: OpenedMedia) -> str | bytes:
        """The path of a file; the bytes themselves, `max_inline_bytes` at most, where there is no room for one."""
        part: SpoolPart | None = None
        num_written, kept = 0, bytearray()

        async def write(block: bytes) -> None:
            nonlocal num_written, kept
            if opened.full is None and part is not None:
                try:
                    await self._in_thread(part.write, block)
                    num_written += len(block)
                    return
                except QueueFull as error:
                    if num_written > self._config.max_inline_bytes:
                        raise
                    opened.full = error
                    if num_written:
                        kept += (await self._in_thread(part.path.read_bytes))[:num_written]
            assert opened.full is not None
            if len(kept) + len(block) > self._config.max_inline_bytes:
                raise opened.full
            kept += block

        try:
            part = self._part(call, stack)
        except QueueFull as error:
            opened.full = error
        await self._fetcher.fetch(url, write, self._limits.max_bytes, call.left_s(self._spool.ttl_s))
        return str(part.path) if part is not None and num_written and not kept else bytes(kept)

    def _part(self, call: Call, stack: AsyncExitStack) -> SpoolPart:
        part = self._spool.begin(call.principal.owner)
        stack.callback(part.discard)
        return part

    async def _in_thread(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))


def media_kind(kind: str) -> str:
    """One of KINDS; "" means "auto". Raises BadRequest."""
    if kind not in ("", *KINDS):
        raise BadRequest(f"kind must be 'video', 'image' or 'auto', got {kind[:40]!r}")
    return kind or "auto"


def allowed_file(named: str, root: str | None) -> Path:
    """The file below `root` that is named by a path from there or a whole one, links followed.

    Raises:
        PermissionDenied: it is elsewhere, or no root is set. BadRequest: no path.
    """
    if root is None:
        raise PermissionDenied("this server reads no files of its own: file_root is not set; upload the media")
    try:
        top = Path(os.path.realpath(root))
        path = Path(os.path.realpath(top / named))
    except ValueError as error:
        raise BadRequest(f"{named[:200]!r} is no path: {error}") from error
    if path == top or not path.is_relative_to(top):
        raise PermissionDenied(f"{named[:200]!r} is not below the server's file root")
    return path


def _source(data: str | bytes, kind: str, name: str) -> MediaSource:
    return MediaSource(data, kind, name)  # type: ignore[arg-type]
