"""One channel to a server: made when first used; every call on it has a deadline and raises typed errors."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import grpc.aio

from sparsevila_cluster.client.call_errors import SYNTHETIC_STATUS, RetryPolicy, closed_error, is_cancelled, to_error
from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import BadRequest, SparseVilaError, Unavailable
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub

log = logging.getLogger(__name__)

MAX_RECEIVE_BYTES = 64 * 2**20
STATUS_WITHIN_S = 0.2
# Clients do not share connections: one that is closed, or blocked, is nobody else's. A lost server is looked for often.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", -1),  # the server has a limit of its own
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class Tls:
    """An encrypted connection. Paths of PEM files.

    ca: authorities that may have signed the server's certificate, None = those of the system; certificate and key: this client's
    own, for servers that ask for one.
    """

    ca: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise BadRequest("a TLS certificate and its key go together")


def tls_of(given: Tls | bool | str | PathLike[str] | None) -> Tls | None:
    """What users say about TLS: nothing or False, True for the system's authorities, the path of others, or all of it."""
    if given is None or given is False:
        return None
    return given if isinstance(given, Tls) else Tls() if given is True else Tls(ca=given)


class Connection:
    """A channel of one event loop. The constructor only checks its arguments; the channel is made by the first call.

    Raises:
        BadRequest: a target that is no host and port; a PEM file that cannot be read.
    """

    def __init__(self, target: str, api_key: str | None, tls: Tls | None):
        if not isinstance(target, str) or not re.fullmatch(r"\S+:\d{1,5}|unix:\S+", target) or "://" in target:
            raise BadRequest(f"target must be host:port, got {target!r}")
        if api_key is not None and not (isinstance(api_key, str) and api_key.isprintable() and api_key.isascii() and api_key):
            raise BadRequest("api_key must be printable ASCII text")
        self.target = target
        self.closed = False
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._credentials = _credentials(tls)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._background: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Make the channel unless it is there. Raises Unavailable: closed. BadRequest: it belongs to another event loop."""
        if self.closed:
            raise closed_error(self.target)
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self.target, CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._credentials, CHANNEL_OPTIONS)
            self._stub = VideoQAStub(self._channel)  # type: ignore[no-untyped-call]
        elif self._loop is not loop:
            raise BadRequest("an AsyncClient belongs to the event loop that used it first; make another one, or use Client")

    async def call(self, method: str, message: Any, within_s: float, what: str) -> Any:
        """The reply to one message, asked for again while the server is away or full: for calls that may be made twice."""
        attempts = RetryPolicy(within_s, f"{self.target}: {what}")
        while True:
            try:
                return await self.call_once(method, message, attempts.left_s(), what)
            except SparseVilaError as error:
                await self.again(attempts, error)

    async def again(self, attempts: RetryPolicy, error: SparseVilaError) -> None:
        """Wait until a call that failed may be made again, or raise its error."""
        if self.closed:
            raise error
        await attempts.pause(error)

    async def call_once(self, method: str, message: Any, within_s: float, what: str) -> Any:
        """The reply to one message."""
        self.open()
        with self._translated(what):
            return await getattr(self._stub, method)(message, timeout=within_s, metadata=self._metadata)

    async def send(self, method: str, messages: AsyncGenerator[Any, None], within_s: float, what: str) -> AsyncGenerator[Any, None]:
        """Send a stream of messages; yields each one when it is on its way, and the reply last."""
        self.open()
        call = getattr(self._stub, method)(timeout=within_s, metadata=self._metadata)
        try:
            async with aclosing(messages):
                async for message in messages:
                    with self._translated(what), suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                        await call.write(message)
                    if call.done():  # the server need not wait for all to say why it refuses
                        break
                    yield message
            with self._translated(what):
                try:
                    if not call.done():
                        await call.done_writing()
                    reply = await call
                except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    raise await _status_of(call) from None
            yield reply
        finally:
            call.cancel()

    async def stream(self, method: str, message: Any, within_s: float, what: str) -> AsyncGenerator[Any, None]:
        """The replies to one message. Leaving early cancels the call."""
        self.open()
        replies = getattr(self._stub, method)(message, timeout=within_s, metadata=self._metadata)
        try:
            while True:
                with self._translated(what):
                    reply = await replies.read()
                if reply is grpc.aio.EOF:
                    return
                yield reply
        finally:
            replies.cancel()

    def run_in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work`, at most GRACE_S, without waiting for it; `close` does. Its errors are only logged."""
        if self.closed:
            work.close()
            return
        task = asyncio.ensure_future(_quietly(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """End what runs, and the channel. Idempotent."""
        if self._background and self._loop is asyncio.get_running_loop():
            await asyncio.wait(tuple(self._background), timeout=2 * GRACE_S)
        self.closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await wait_within(channel.close(), GRACE_S, f"{self.target}: closing")

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if self.closed:
                raise closed_error(self.target) from None
            raise to_error(error, self.target, what) from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            # The call was cancelled and not this task: by closing the channel, or by the server.
            raise closed_error(self.target) if self.closed else Unavailable(f"{self.target}: {what}: cut off") from None
        except grpc.aio.UsageError:  # the channel was closed in this moment
            raise closed_error(self.target) from None


def _credentials(tls: Tls | None) -> grpc.ChannelCredentials | None:
    if tls is None:
        return None
    ca, certificate, key = (None if path is None else _read(path) for path in (tls.ca, tls.certificate, tls.key))
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _read(path: str | PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadRequest(f"TLS: cannot read {str(path)!r}: {error.strerror}") from error


async def _status_of(call: grpc.aio.StreamUnaryCall) -> grpc.aio.AioRpcError:
    """How a call failed. gRPC makes a status up for a write that came too late, mostly only until the server's own has arrived.

    If that came first, it is lost, and the call counts as cut: made again, it is refused again.
    """
    until_s = time.monotonic() + STATUS_WITHIN_S
    while await call.details() == SYNTHETIC_STATUS and time.monotonic() < until_s:
        await asyncio.sleep(0.005)
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


async def _quietly(work: Coroutine[Any, Any, Any]) -> None:
    try:
        await wait_within(work, GRACE_S, "work in the background")
    except SparseVilaError as error:
        log.info("%s", error)
