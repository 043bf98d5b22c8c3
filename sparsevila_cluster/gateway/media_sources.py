"""What a client names as media, as sources that a pipeline can read: uploads, inline bytes, URLs, files.

Knows: which of them are allowed, and how long their bytes must stay. Does not know: how media is decoded.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sparsevila_cluster.core.cluster_config import DoorConfig
from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import BadMedia, BadRequest, PermissionDenied, SparseVilaError, TooLarge
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.gateway.grpc.call_interceptor import Call
from sparsevila_cluster.gateway.grpc.status_codes import renamed
from sparsevila_cluster.gateway.spool import KINDS, Spool, SpoolPart, Upload
from sparsevila_cluster.gateway.url_fetcher import UrlFetcher
from sparsevila_cluster.media.media_source import read_data_url, short_name
from sparsevila_cluster.pb import video_qa_pb2 as pb

P = ParamSpec("P")
R = TypeVar("R")

MAX_CHUNK_BYTES = 1 << 20
# How long an upload may pause between two chunks.
CHUNK_WAIT_S = 60.0
FILE_THREADS = 2


class MediaSources:
    """Opens what clients name. `close` ends its threads; files that are being written are the spool's to delete."""

    def __init__(self, config: DoorConfig, limits: MediaLimits, spool: Spool, fetcher: UrlFetcher):
        self._config, self._limits, self._spool, self._fetcher = config, limits, spool, fetcher
        # Hashing and writing a chunk takes milliseconds, in which an event loop would tell no tokens.
        self._threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="spool")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def receive(self, chunks: AsyncIterator[Any], call: Call) -> Upload:
        """A file in chunks. One that does not arrive whole is deleted.

        Raises:
            BadRequest: an empty file, a chunk above MAX_CHUNK_BYTES, an unknown kind. TooLarge. QueueFull: over the quota.
            DeadlineExceeded: the client pauses for too long.
        """
        part, kind, first = self._spool.begin(call.guest.owner), "auto", True
        arriving = aiter(chunks)
        try:
            while True:
                within_s = min(CHUNK_WAIT_S, call.left_s(self._spool.ttl_s))
                chunk = await wait_within(anext(arriving, None), within_s, "the next chunk of the upload")
                if chunk is None:
                    break
                if first:
                    kind, first = chunk_kind(chunk.kind), False
                if len(chunk.data) > MAX_CHUNK_BYTES:
                    raise BadRequest(f"a chunk may hold at most {MAX_CHUNK_BYTES} bytes, got {len(chunk.data)}")
                await self._in_thread(part.write, chunk.data)
            if part.num_bytes == 0:
                raise BadRequest("the upload is empty; media need at least one byte")
            await call.confirm()
            return part.keep(kind)
        except BaseException:
            part.discard()
            raise

    @asynccontextmanager
    async def opened(self, named: Sequence[pb.MediaSource], call: Call) -> AsyncIterator[tuple[MediaSource, ...]]:
        """The sources for the length of an `async with` block; errors from inside it tell the client's names, not ours.

        Raises:
            BadRequest, BadMedia, TooLarge, QueueFull, DeadlineExceeded. NotFound: an upload. PermissionDenied: a file or URL.
        """
        if len(named) > self._limits.max_images:
            raise BadRequest(f"{len(named)} media in one request; the limit is {self._limits.max_images}")
        names: dict[str, str] = {}
        async with AsyncExitStack() as stack:
            try:
                yield tuple([await self._open(source, call, stack, names) for source in named])
            except SparseVilaError as error:
                raise renamed(error, names) from error

    async def _open(self, named: pb.MediaSource, call: Call, stack: AsyncExitStack, names: dict[str, str]) -> MediaSource:
        which, kind = named.WhichOneof("source"), chunk_kind(named.kind)
        if which == "upload_id":
            path, uploaded_as = stack.enter_context(self._spool.hold(call.guest.owner, named.upload_id))
            names[str(path)] = f"upload {named.upload_id!r}"
            return _source(str(path), kind if named.kind else uploaded_as)
        if which == "inline":
            return _source(await self._keep_inline(named.inline, call, stack, names), kind)
        if which == "url" and named.url[:5].lower() == "data:":
            return await self._keep_data_url(named.url, kind, call, stack, names)
        if which == "url":
            return _source(await self._keep_url(named.url, call, stack, names), kind)
        if which == "file":
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
        part = self._spool.begin(call.guest.owner)
        stack.callback(part.discard)
        return part

    async def _in_thread(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.wrap_future(self._threads.submit(work, *args, **kwargs))


def chunk_kind(kind: str) -> str:
    """ "video", "image" or "auto", which "" means, too. Raises BadRequest."""
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


def _source(data: str, kind: str) -> MediaSource:
    return MediaSource(data, kind)  # type: ignore[arg-type]
