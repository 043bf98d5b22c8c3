"""Answers the calls of other processes for one worker: two methods for all, over a table that derives from the worker's protocol.

call:    ("value", result) or ("failure", the error as data)
stream:  ("beat", None) on arrival and whenever there is nothing to send, ("value", item)*, ("end", None) or ("failure", ...)

    made -> (`listen`: a gRPC server of its own) -> answers -> (`leave`: refuses, lets what runs end) -> closed
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sparsevila_cluster.cluster.rpc.endpoint import CALL, OPTIONS, SERVICE, STREAM, WorkerEndpoint
from sparsevila_cluster.cluster.rpc.wire_types import pack, unpack, wire_methods
from sparsevila_cluster.cluster.worker_api import methods_of
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import Incompatible, Internal, SparseVilaError, WorkerClosed, WorkerLost, to_failure

log = logging.getLogger(__name__)

Envelope = tuple[str, Any]
END = object()
TOKEN_BYTES = 32


class RpcServer:
    """Answers for `worker`, which others know as `name`, what the protocol `api` has (see worker_api.py)."""

    def __init__(self, name: str, worker: object, api: Callable[..., object], beat_s: float = 1.0, host: str = "127.0.0.1"):
        """host: of the interface that `listen` binds."""
        self.name = name
        self.worker = worker
        self._wire = wire_methods(api)
        kinds = methods_of(api)
        self._calls = frozenset(method for method, kind in kinds.items() if kind == "call")
        self._streams = frozenset(kinds) - self._calls
        self._beat_s = beat_s
        self._host = host
        self._listening = asyncio.Lock()
        self._server: grpc.aio.Server | None = None
        self._endpoint: WorkerEndpoint | None = None
        self._num_open = 0
        self._has_left = False

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

    # ---- connections of its own --------------------------------------------------------------------------------------------

    async def listen(self) -> WorkerEndpoint:
        """Where this process answers, from the first time on that somebody asks. Raises OSError, RuntimeError: no port."""
        async with self._listening:
            if self._endpoint is None:
                server = grpc.aio.server(options=OPTIONS)
                handlers = {
                    CALL: grpc.unary_unary_rpc_method_handler(self._on_call),
                    STREAM: grpc.unary_stream_rpc_method_handler(self._on_stream),
                }
                server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
                host = f"[{self._host}]" if ":" in self._host else self._host
                port = server.add_insecure_port(f"{host}:0")
                self._endpoint = WorkerEndpoint(self.name, self._host, port, secrets.token_hex(TOKEN_BYTES))
                await server.start()
                self._server = server
        return self._endpoint

    async def leave(self, within_s: float) -> None:
        """Refuse new calls, let those under way end for `within_s`, then cut them off. Idempotent."""
        self._has_left = True
        until_s = asyncio.get_running_loop().time() + within_s
        while self._num_open and asyncio.get_running_loop().time() < until_s:
            await asyncio.sleep(min(0.05, within_s))
        if self._server is not None:
            await self._server.stop(0)

    async def _on_call(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await self._check_token(context)
        with self._open():
            try:
                method, args = self._read(request)
            except SparseVilaError as error:
                return pack(("failure", to_failure(error)))
            return self._pack(await self.call(None, method, args), method)

    async def _on_stream(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        await self._check_token(context)
        with self._open():
            try:
                method, args = self._read(request)
            except SparseVilaError as error:
                yield pack(("failure", to_failure(error)))
                return
            envelopes = self.stream(None, method, args)
            try:
                async for envelope in envelopes:
                    yield self._pack(envelope, method)
            finally:
                await envelopes.aclose()

    async def _check_token(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        assert self._endpoint is not None
        if not self._endpoint.admits(tuple(context.invocation_metadata() or ())):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not the token of this process")

    @contextmanager
    def _open(self) -> Iterator[None]:
        self._num_open += 1
        try:
            yield
        finally:
            self._num_open -= 1

    def _read(self, request: bytes) -> tuple[str, tuple[Any, ...]]:
        """The method and its arguments. Raises WorkerClosed, Incompatible (no call that the protocol has), BadRequest."""
        if self._has_left:
            raise WorkerClosed(f"worker {self.name} is closed", self.name)
        asked = unpack(request)
        if not isinstance(asked, list) or len(asked) != 2 or not isinstance(asked[0], str):
            raise Incompatible(f"a call of worker {self.name} must be a method and its arguments")
        method, values = asked
        if method not in self._wire:
            return method, ()  # `call` and `stream` say what is legal
        return method, self._wire[method].read_arguments(values)

    def _pack(self, envelope: Envelope, method: str) -> bytes:
        try:
            return pack(envelope)
        except Internal as error:
            return pack(("failure", self._failure_of(Internal(f"the answer of {method} {error}"), method)))


async def _only(result: Awaitable[Any]) -> AsyncGenerator[Any, None]:
    yield await result


async def _next(items: AsyncIterator[Any]) -> Any:
    return await anext(items, END)
