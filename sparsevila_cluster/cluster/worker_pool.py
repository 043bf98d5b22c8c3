"""How one part of the cluster calls the workers of another: calls and streams by worker's name, and typed stubs over them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from sparsevila_cluster.cluster.worker_api import MethodKind, methods_of
from sparsevila_cluster.core.errors import WorkerLost

Api = TypeVar("Api")
# Each takes the method's name and its arguments.
Call = Callable[..., Coroutine[Any, Any, Any]]
Stream = Callable[..., AsyncGenerator[Any, None]]


class WorkerPool(Protocol):
    """The workers of one kind. `worker` names one of them; None lets the pool choose."""

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        """What the method returns. Cancelling the call cancels it in the worker.

        Raises:
            WorkerLost: no such worker, or it died meanwhile. DeadlineExceeded: no answer within `within_s` seconds. Whatever the
            method raises, of the classes in errors.py; anything else arrives as Internal.
        """
        ...

    def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        """What the method yields, in order. Leaving the iteration early, or cancelling it, cancels it in the worker.

        `within_s` bounds the whole stream. Raises as `call` does, also between two items.
        """
        ...


def stub(api: Callable[..., Api], call: Call, stream: Stream | None = None) -> Api:
    """An object with the methods of the protocol `api`, which `call(method, *args)` and `stream(method, *args)` carry.

    stream: None for a protocol without streams and long-running methods.
    """
    return cast(Api, _Stub(methods_of(api), call, stream))


def pool_stub(api: Callable[..., Api], pool: WorkerPool, worker: str | None, within_s: float) -> Api:
    """`api` of one worker of a pool. Every method also raises what the pool's `call` and `stream` raise."""
    return stub(api, partial(pool.call, worker, within_s=within_s), partial(pool.stream, worker, within_s=within_s))


class _Stub:
    def __init__(self, methods: dict[str, MethodKind], call: Call, stream: Stream | None):
        self._methods = methods
        self._carriers: dict[MethodKind, Callable[..., Any]] = {"call": call}
        if stream is not None:
            self._carriers |= {"work": partial(_only_item, stream), "stream": stream}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self._methods:
            raise AttributeError(name)
        return partial(self._carriers[self._methods[name]], name)


async def _only_item(stream: Stream, method: str, *args: Any) -> Any:
    async with aclosing(stream(method, *args)) as items:
        async for item in items:
            return item
    raise WorkerLost(f"{method} ended without a result")
