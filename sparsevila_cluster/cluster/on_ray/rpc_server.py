"""Answers the calls of other processes for one worker: two methods for all, over a table that derives from the worker's protocol.

call:    ("value", result) or ("failure", the error as data)
stream:  ("beat", None) on arrival and whenever there is nothing to send, ("value", item)*, ("end", None) or ("failure", ...)
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from sparsevila_cluster.cluster.worker_api import methods_of
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import Internal, SparseVilaError, WorkerLost, to_failure

log = logging.getLogger(__name__)

Envelope = tuple[str, Any]
END = object()


class RpcServer:
    """Answers for `worker`, which others know as `name`, what the protocol `api` has (see worker_api.py)."""

    def __init__(self, name: str, worker: object, api: Callable[..., object], beat_s: float = 1.0):
        self.name = name
        self.worker = worker
        kinds = methods_of(api)
        self._calls = frozenset(method for method, kind in kinds.items() if kind == "call")
        self._streams = frozenset(kinds) - self._calls
        self._beat_s = beat_s

    async def call(self, addressee: str | None, method: str, args: tuple[Any, ...]) -> Envelope:
        """The result of a method, sync or async."""
        try:
            result = self._method(addressee, method, self._calls)(*args)
            return "value", await result if inspect.isawaitable(result) else result
        except Exception as error:
            return "failure", self._failure_of(error, method)

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
            yield "failure", self._failure_of(error, method)
        finally:
            if pending is not None and not pending.done():
                pending.cancel()
                await asyncio.wait({pending}, timeout=GRACE_S)
            if items is not None and (pending is None or pending.done()):
                await items.aclose()

    def _method(self, addressee: str | None, method: str, table: frozenset[str]) -> Callable[..., Any]:
        if addressee not in (None, self.name):
            raise WorkerLost(f"worker {addressee} is gone")
        if method not in table:
            raise Internal(f"{type(self.worker).__name__} has no method {method!r} to call; legal: {', '.join(sorted(table))}")
        found: Callable[..., Any] = getattr(self.worker, method)
        return found

    def _failure_of(self, error: Exception, method: str) -> dict[str, Any]:
        if not isinstance(error, SparseVilaError):
            log.error("%s failed", method, exc_info=error, extra={"worker": self.name})
        return to_failure(error)


async def _only(result: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    yield await result


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items, END)
