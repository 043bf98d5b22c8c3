"""The clerk at whom others ask a worker: two methods for all, and a table of what may be asked.

Knows: envelopes, beats, and that errors leave as values. Does not know: Ray, or what the methods do.

    call:    ("value", result) or ("failure", the error as data)
    stream:  ("beat", None) on arrival and whenever nothing is said for a while, ("value", item)*, ("end", None) or ("failure", ...)
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterable
from typing import Any

from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import Internal, SparseVilaError, WorkerLost, to_failure

log = logging.getLogger(__name__)

Envelope = tuple[str, Any]
END = object()


class RpcServer:
    """Answers for `worker`, which others know as `name`. `calls` and `streams` are the methods that may be asked for."""

    def __init__(self, name: str, worker: Any, calls: Iterable[str], streams: Iterable[str] = (), beat_s: float = 1.0):
        self.name = name
        self.worker = worker
        self._calls, self._streams = frozenset(calls), frozenset(streams)
        self._beat_s = beat_s

    async def call(self, addressee: str | None, method: str, args: tuple[Any, ...]) -> Envelope:
        """The result of a method, sync or async."""
        try:
            result = self._method(addressee, method, self._calls)(*args)
            return "value", await result if inspect.isawaitable(result) else result
        except Exception as error:
            return "failure", self._told(error, method)

    async def stream(self, addressee: str | None, method: str, args: tuple[Any, ...]) -> AsyncGenerator[Envelope, None]:
        """What a method yields, or the one result of a coroutine. Leaving early closes the one and cancels the other."""
        items: AsyncGenerator[Any, None] | None = None
        pending: asyncio.Task[Any] | None = None
        try:
            called = self._method(addressee, method, self._streams)(*args)
            items = _only(called) if inspect.isawaitable(called) else called
            yield "beat", None
            while True:
                pending = asyncio.create_task(_next(items))
                while not (await asyncio.wait({pending}, timeout=self._beat_s))[0]:
                    yield "beat", None
                item = pending.result()
                if item is END:
                    break
                yield "value", item
            yield "end", None
        except Exception as error:
            yield "failure", self._told(error, method)
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.wait({pending}, timeout=GRACE_S)
            if items is not None and (pending is None or pending.done()):
                await items.aclose()

    def _method(self, addressee: str | None, method: str, table: frozenset[str]) -> Any:
        if addressee not in (None, self.name):
            raise WorkerLost(f"worker {addressee} is gone")
        if method not in table:
            raise Internal(f"{type(self.worker).__name__} answers no {method!r}; legal: {', '.join(sorted(table))}")
        return getattr(self.worker, method)

    def _told(self, error: Exception, method: str) -> dict[str, Any]:
        if not isinstance(error, SparseVilaError):
            log.error("%s failed", method, exc_info=error, extra={"worker": self.name})
        return to_failure(error)


async def _only(result: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    yield await result


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items, END)
