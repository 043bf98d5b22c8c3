"""The calls of one client to its targets: each has a deadline, goes to one of them, and raises typed errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import grpc.aio

from sparsevila_cluster.client.call_errors import SYNTHETIC_STATUS, RetryPolicy, closed_error, is_cancelled, is_silence, to_error
from sparsevila_cluster.client.targets import Target, Targets
from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import BadRequest, SparseVilaError, Unavailable

log = logging.getLogger(__name__)

STATUS_WITHIN_S = 0.2


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
    """The channels of one event loop. The constructor only checks its arguments; the channels are made by the first call.

    Raises:
        BadRequest: a target that is no host and port, or no list of them; a PEM file that cannot be read.
    """

    def __init__(self, target: str, api_key: str | None, tls: Tls | None):
        self._targets = Targets(target)
        if api_key is not None and not (isinstance(api_key, str) and api_key.isprintable() and api_key.isascii() and api_key):
            raise BadRequest("api_key must be printable ASCII text")
        self.target = target
        self.closed = False
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._credentials = _credentials(tls)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._background: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Make the channels unless they are there. Raises Unavailable: closed. BadRequest: they belong to another event loop."""
        if self.closed:
            raise closed_error(self.target)
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._targets.open(self._credentials)
        elif self._loop is not loop:
            raise BadRequest("an AsyncClient belongs to the event loop that used it first; make another one, or use Client")

    def choose(self, subject: str = "", after: Target | None = None) -> Target:
        """The target of the next call; see `Targets.choose`. Raises as `open`."""
        self.open()
        return self._targets.choose(subject, after)

    def remember(self, subject: str, target: Target) -> None:
        """Calls about `subject` go to `target` from now on, while it is healthy."""
        self._targets.remember(subject, target)

    async def call(self, method: str, message: Any, within_s: float, what: str, subject: str = "") -> Any:
        """The reply to one message, asked for again while the server is away or full: for calls that may be made twice."""
        attempts, target = RetryPolicy(within_s, f"{self.target}: {what}"), None
        while True:
            target = self.choose(subject, target)
            try:
                return await self.call_once(target, method, message, attempts.left_s(), what)
            except SparseVilaError as error:
                await self.again(attempts, error)

    async def again(self, attempts: RetryPolicy, error: SparseVilaError) -> None:
        """Wait until a call that failed may be made again, or raise its error."""
        if self.closed:
            raise error
        try:
            await attempts.pause(error)
        except Unavailable:
            if type(error) is Unavailable and self._targets.nobody_answers:
                raise Unavailable(f"none of {self.target} answers; the last error: {error}") from None
            raise

    async def call_once(self, target: Target, method: str, message: Any, within_s: float, what: str) -> Any:
        """The reply to one message."""
        self.open()
        with self._translated(target, what):
            reply = await getattr(target.stub, method)(message, timeout=within_s, metadata=self._metadata)
        self._targets.note_answer(target)
        return reply

    async def send(
        self, target: Target, method: str, messages: AsyncGenerator[Any, None], within_s: float, what: str
    ) -> AsyncGenerator[Any, None]:
        """Send a stream of messages; yields each one when it is on its way, and the reply last."""
        self.open()
        call = getattr(target.stub, method)(timeout=within_s, metadata=self._metadata)
        try:
            async with aclosing(messages):
                async for message in messages:
                    with self._translated(target, what), suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                        await call.write(message)
                    if call.done():  # the server need not wait for all to say why it refuses
                        break
                    yield message
            with self._translated(target, what):
                try:
                    if not call.done():
                        await call.done_writing()
                    reply = await call
                except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
                    raise await _status_of(call) from None
            self._targets.note_answer(target)
            yield reply
        finally:
            call.cancel()

    async def stream(self, target: Target, method: str, message: Any, within_s: float, what: str) -> AsyncGenerator[Any, None]:
        """The replies to one message. Leaving early cancels the call."""
        self.open()
        replies = getattr(target.stub, method)(message, timeout=within_s, metadata=self._metadata)
        is_first = True
        try:
            while True:
                with self._translated(target, what):
                    reply = await replies.read()
                if is_first:  # what comes later of a server that takes no new calls says nothing about those
                    self._targets.note_answer(target)
                    is_first = False
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
        """End what runs, and the channels. Idempotent."""
        if self._background and self._loop is asyncio.get_running_loop():
            await asyncio.wait(tuple(self._background), timeout=2 * GRACE_S)
        self.closed = True
        await self._targets.close()

    @contextmanager
    def _translated(self, target: Target, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            if self.closed:
                raise closed_error(self.target) from None
            if is_silence(error):
                self._targets.note_failure(target)
            raise to_error(error, target.name, what) from None
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            # The call was cancelled and not this task: by closing the channel, or by the server.
            self._targets.note_failure(target)
            raise closed_error(self.target) if self.closed else Unavailable(f"{target.name}: {what}: cut off") from None
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
