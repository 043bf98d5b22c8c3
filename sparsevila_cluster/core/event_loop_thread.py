"""Coroutines for callers who block: an event loop in a thread of its own, and waits on it that end."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import CancelledError
from typing import Any, Generic, Protocol, Self, TypeVar

from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, Unavailable

log = logging.getLogger(__name__)

R = TypeVar("R")


class EventLoopThread:
    """An event loop in a daemon thread, for one object that blocks. `owner` is what errors call that object.

    Any thread may call it, also several at the same time.
    """

    def __init__(self, owner: str):
        self.owner = owner
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=owner, daemon=True)
        self._closing = threading.Lock()
        self._closed = False
        self.thread.start()

    def _run(self) -> None:
        # All of the loop's life is here: the thread that closes may have a running loop of its own, as in a notebook.
        self.loop.run_forever()
        self.loop.run_until_complete(_cancel_rest(self.loop))
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, R], limit_s: float) -> R:
        """Wait for a coroutine that has a deadline of its own, `limit_s`.

        Raises:
            Unavailable: closed, before or meanwhile. BadRequest: called by what runs in the loop. DeadlineExceeded: the coroutine
            did not end at its deadline. Whatever `work` raises.
        """
        if self._closed:
            work.close()
            raise Unavailable(f"this {self.owner} is closed")
        return self._wait(work, limit_s)

    def iterate(self, pieces: AsyncGenerator[R, None], limit_s: float) -> Iterator[R]:
        """What an async generator yields, each within `limit_s`. Leaving early ends the generator."""
        try:
            while (piece := self.run(_next(pieces), limit_s)) is not None:
                yield piece
        finally:
            # Closing has done so already; in its own thread, the event loop does so when it drops the generator.
            if not self._closed and threading.current_thread() is not self.thread:
                self.run(pieces.aclose(), limit_s)

    def close(self, last: Coroutine[Any, Any, None], limit_s: float) -> None:
        """Run `last`, then end what others still wait for, the loop and the thread. Idempotent.

        Raises:
            DeadlineExceeded: `last` took longer than `limit_s`. Whatever `last` raises. The thread is ended all the same.
        """
        with self._closing:
            if self._closed:
                last.close()
                return
            self._closed = True
        try:
            self._wait(last, limit_s)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(GRACE_S)
            if self.thread.is_alive():
                log.error("the event loop did not stop within %g s", GRACE_S)

    def _wait(self, work: Coroutine[Any, Any, R], limit_s: float) -> R:
        if threading.current_thread() is self.thread:
            work.close()
            raise BadRequest(f"a progress function must not call methods of the {self.owner} that calls it")
        try:
            future = asyncio.run_coroutine_threadsafe(work, self.loop)
        except RuntimeError as error:  # closed since the caller looked
            work.close()
            raise Unavailable(f"this {self.owner} is closed") from error
        try:
            return future.result(limit_s + GRACE_S)
        except CancelledError:
            raise Unavailable(f"this {self.owner} was closed") from None
        except TimeoutError as error:
            if future.done():
                raise
            future.cancel()
            raise DeadlineExceeded(f"no answer within {limit_s + GRACE_S:g} s") from error
        except BaseException:  # such as Ctrl-C: nobody waits any more
            future.cancel()
            raise


class _HasCallLimit(Protocol):
    def call_limit_s(self) -> float: ...


A = TypeVar("A", bound=_HasCallLimit)


class Blocking(ABC, Generic[A]):
    """Base of classes that offer an asynchronous object to callers who block. Use it as a context manager, or call `close`."""

    def __init__(self, wrapped: A, owner: str):
        self._async = wrapped
        self._thread = EventLoopThread(owner)

    @abstractmethod
    def close(self) -> None:
        """End what runs, and the event loop. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, R], limit_s: float | None = None) -> R:
        """Wait for a coroutine that has a deadline of its own, `limit_s` (None: `call_limit_s`)."""
        return self._thread.run(work, self._async.call_limit_s() if limit_s is None else limit_s)


async def _next(pieces: AsyncGenerator[R, None]) -> R | None:
    return await anext(pieces, None)


async def _cancel_rest(loop: asyncio.AbstractEventLoop) -> None:
    """End what other threads still wait for."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=GRACE_S)
    await loop.shutdown_asyncgens()
