"""Media as a client names it, made readable for a pipeline: uploads, inline bytes, URLs, files below the root."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
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
    SparseVilaError,
    TooLarge,
    from_failure,
    to_failure,
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
            DeadlineExceeded: the client pauses for too long. Whatever the iteration raises.
        """
        part, kind, first = self._spool.begin(call.principal.owner), "auto", True
        arriving = aiter(chunks)
        try:
            while True:
                within_s = min(CHUNK_WAIT_S, call.left_s(self._spool.ttl_s))
                chunk = await wait_within(anext(arriving, None), within_s, "the next chunk of the upload")
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
    async def opened(self, call: Call, named: Sequence[MediaReference]) -> AsyncIterator[tuple[MediaSource, ...]]:
        """The sources for the length of an `async with` block; errors from inside it tell the client's names, not ours.

        Raises:
            BadRequest, BadMedia, TooLarge, QueueFull, DeadlineExceeded. NotFound: an upload. PermissionDenied: a file or URL.
        """
        if len(named) > self._limits.max_images:
            raise BadRequest(f"{len(named)} media in one request; the limit is {self._limits.max_images}")
        names: dict[str, str] = {}
        async with AsyncExitStack() as stack:
            try:
                yield tuple([await self._open(call, reference, stack, names) for reference in named])
            except SparseVilaError as error:
                raise renamed(error, names) from error

    async def _open(self, call: Call, named: MediaReference, stack: AsyncExitStack, names: dict[str, str]) -> MediaSource:
        kind = media_kind(named.kind)
        if named.upload_id is not None:
            path, uploaded_as = stack.enter_context(self._spool.hold(call.principal.owner, named.upload_id))
            names[str(path)] = f"upload {named.upload_id!r}"
            return _source(str(path), kind if named.kind else uploaded_as)
        if named.inline is not None:
            return _source(await self._keep_inline(named.inline, call, stack, names), kind)
        if named.url is not None and named.url[:5].lower() == "data:":
            return await self._keep_data_url(named.url, kind, call, stack, names)
        if named.url is not None:
            return _source(await self._keep_url(named.url, call, stack, names), kind)
        if named.file is not None:
            path = await self._in_thread(allowed_file, named.file, self._config.file_root)
            names[str(path)] = short_name(named.file)
            return _source(str(path), kind)
        raise BadRequest("a source must name one of upload_id, inline, url, file; got none")

    async def _keep_inline(self, data: bytes, call: Call, stack: AsyncExitStack, names: dict[str, str]) -> str:
        if len(data) > self._config.max_inline_bytes:
            most = f"max_inline_bytes = {self._config.max_inline_bytes}"
            raise TooLarge(f"{len(data)} bytes within a request are more than {most}; upload them")
        if not data:
            raise BadMedia("inline media is empty; media need at least one frame")
        part = self._part(call, stack)
        names[str(part.path)] = f"inline media of {len(data)} bytes"
        await self._in_thread(part.write, data)
        return str(part.path)

    async def _keep_data_url(self, url: str, kind: str, call: Call, stack: AsyncExitStack, names: dict[str, str]) -> MediaSource:
        """Bytes travel as files between workers, whatever they came in. What the URL says of its kind is what it is held to."""
        data, media_type = await self._in_thread(read_data_url, url, self._limits)
        declared = media_type.partition("/")[0]
        path = await self._keep_inline(data, call, stack, names)
        return _source(path, declared if kind == "auto" and declared in KINDS else kind)

    async def _keep_url(self, url: str, call: Call, stack: AsyncExitStack, names: dict[str, str]) -> str:
        part = self._part(call, stack)
        names[str(part.path)] = repr(url[:200])

        async def write(block: bytes) -> None:
            await self._in_thread(part.write, block)

        await self._fetcher.fetch(url, write, self._limits.max_bytes, call.left_s(self._spool.ttl_s))
        return str(part.path)

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


def renamed(error: SparseVilaError, names: dict[str, str]) -> SparseVilaError:
    """The same error, with every path of `names` (as it is, quoted, or shortened) called what the client calls it."""
    message = str(error)
    for path, name in names.items():
        for written in (short_name(path), repr(path), path):
            message = message.replace(written, name)
    if message == str(error):
        return error
    return from_failure({**to_failure(error), "message": message})


def _source(data: str, kind: str) -> MediaSource:
    return MediaSource(data, kind)  # type: ignore[arg-type]
