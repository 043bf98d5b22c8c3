"""gRPC's server for asyncio, with a way of its own to accept calls.

What gRPC does (1.85.3) asks for one call of a method at a time, through five turns of the event loop: a busy one accepts ten calls
a second, and what waits for 30 s is cut off as CANCELLED. And it decodes the path of a call to an unknown method there, so that one
path that is no UTF-8 ends the server: one header, without a key. Here several calls are asked for at a time, and no path is looked
at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio
from grpc._cython import cygrpc

# Calls of one method that are asked for at a time.
ACCEPT_AT_ONCE = 8


class AioServer(grpc.aio._server.Server):
    """`grpc.aio.server` with these arguments, for methods that are registered, as generated code does it."""

    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, int]]):
        self._loop = asyncio.get_running_loop()
        self._server = _CoreServer(self._loop, None, (), tuple(interceptors), tuple(options), None)
        self._server.prepare(tuple(interceptors))


class _CoreServer(cygrpc.AioServer):
    """The two hooks by which gRPC's loop asks for the next call never return: calls are answered here."""

    def prepare(self, interceptors: tuple[grpc.aio.ServerInterceptor, ...]) -> None:
        self._loop_of_calls = asyncio.get_running_loop()
        self._interceptors_of_calls = interceptors
        self._handlers: dict[str, grpc.RpcMethodHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, method_handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self._handlers |= method_handlers
        super().add_registered_method_handlers(method_handlers)

    async def _request_call(self) -> None:
        await self._accept(super()._request_call, "", ())

    async def _request_registered_call(self, method: bytes) -> None:
        async def request() -> Any:
            return await cygrpc.AioServer._request_registered_call(self, method)

        name = method.decode()
        for _ in range(ACCEPT_AT_ONCE - 1):
            self._spawn(self._accept_until_stopped(request, name))
        await self._accept(request, name, self._interceptors_of_calls)

    async def _accept_until_stopped(self, request: Callable[[], Awaitable[Any]], name: str) -> None:
        try:
            await self._accept(request, name, self._interceptors_of_calls)
        except cygrpc._RequestCallError:
            return

    async def _accept(self, request: Callable[[], Awaitable[Any]], name: str, interceptors: tuple[Any, ...]) -> None:
        """Answer calls of one method, "" of those that are unknown, until the server stops. Raises what `request` then raises."""
        handlers = {name: self._handlers[name]} if name else {}
        while True:
            state = await request()
            answer = cygrpc._handle_rpc(name, cygrpc._MethodResolver([], handlers), interceptors, state, self._loop_of_calls, False)
            self._spawn(cygrpc._schedule_rpc_coro(answer, state, self._loop_of_calls, name))

    def _spawn(self, work: Any) -> None:
        task = self._loop_of_calls.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
