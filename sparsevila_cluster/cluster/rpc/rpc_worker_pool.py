"""A `WorkerPool` over connections to the workers themselves: `RpcServer.listen` is the other end.

Errors of methods come as values. A stream sends a beat when it has arrived and whenever its worker has nothing to send: silence
means that the worker is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sparsevila_cluster.cluster.rpc.endpoint import CALL, OPTIONS, SERVICE, STREAM, WorkerEndpoint
from sparsevila_cluster.cluster.rpc.wire_types import pack, unpack, wire_methods
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, Incompatible, Internal, WorkerLost, from_failure
from sparsevila_cluster.core.single_flight import SingleFlight

# (worker, seconds) -> where it answers. Raises WorkerLost, DeadlineExceeded, Internal.
Find = Callable[[str | None, float], Awaitable[WorkerEndpoint]]
GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAUTHENTICATED)
DEAD = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


class _Connection:
    """To one worker."""

    def __init__(self, endpoint: WorkerEndpoint):
        self.endpoint = endpoint
        self.channel = grpc.aio.insecure_channel(endpoint.target, OPTIONS)
        self.call = self.channel.unary_unary(f"/{SERVICE}/{CALL}")
        self.stream = self.channel.unary_stream(f"/{SERVICE}/{STREAM}")


class RpcWorkerPool:
    """The workers of one kind, which answer `api`, by name. Used within one event loop.

    find: tells where a worker answers; asked once for each, and again when it was lost. Without a name, the one that `find` chose
    is kept as long as it answers. silence_s: a stream that nothing comes from for this long has lost its worker.
    """

    def __init__(self, name: str, api: Callable[..., object], find: Find, silence_s: float = 5.0):
        self.name = name
        self._methods = wire_methods(api)
        self._find = find
        self._silence_s = silence_s
        self._connections: dict[str, _Connection] = {}
        self._finding: SingleFlight[_Connection] = SingleFlight()

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        """See `WorkerPool.call`."""
        who, until_s = self._name(worker), time.perf_counter() + within_s
        request = self._request(method, args)
        connection = await self._connection(worker, within_s)
        with self._errors(worker, connection, f"{method} of {who} took longer than {within_s:g} s"):
            left_s = until_s - time.perf_counter()
            kind, item = unpack(await connection.call(request, timeout=left_s, metadata=connection.endpoint.metadata))
            return self._result(who, method, kind, item)

    async def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        """See `WorkerPool.stream`. Raises WorkerLost also when nothing is heard of the worker for `silence_s`."""
        who, until_s = self._name(worker), time.perf_counter() + within_s
        request, too_long = self._request(method, args), f"{method} of {who} took longer than {within_s:g} s"
        try:
            connection = await self._connection(worker, min(within_s, self._silence_s))
        except DeadlineExceeded as error:
            if within_s <= self._silence_s:
                raise
            raise WorkerLost(f"{who} has not been heard of for {self._silence_s:g} s") from error
        left_s = until_s - time.perf_counter()
        call = connection.stream(request, timeout=left_s, metadata=connection.endpoint.metadata)
        try:
            while True:
                with self._errors(worker, connection, too_long):
                    left_s = until_s - time.perf_counter()
                    try:
                        async with asyncio.timeout(min(left_s, self._silence_s)):
                            data = await call.read()
                    except TimeoutError:
                        if left_s <= self._silence_s:
                            raise DeadlineExceeded(too_long) from None
                        raise WorkerLost(f"{who} has not been heard of for {self._silence_s:g} s") from None
                    if data is grpc.aio.EOF:
                        raise WorkerLost(f"{who} ended a stream of {method} without its end")
                    kind, item = unpack(data)
                    if kind == "end":
                        return
                    if kind == "beat":
                        continue
                    result = self._result(who, method, kind, item)
                yield result
        finally:
            call.cancel()

    async def close(self) -> None:
        """End every connection; calls under way fail."""
        connections, self._connections = self._connections, {}
        for connection in connections.values():
            await connection.channel.close()

    # ---- one call ----------------------------------------------------------------------------------------------------------

    def _name(self, worker: str | None) -> str:
        return f"worker {worker} of {self.name}" if worker else f"a worker of {self.name}"

    def _request(self, method: str, args: tuple[Any, ...]) -> bytes:
        try:
            return pack((method, args))
        except Internal as error:
            raise Internal(f"an argument of {method} {error}") from error

    def _result(self, who: str, method: str, kind: str, item: Any) -> Any:
        if kind == "failure":
            raise from_failure(item)
        known = self._methods.get(method)
        try:
            return item if known is None else known.result(item)
        except Incompatible as error:
            raise Incompatible(f"what {method} of {who} gave is not in the protocol: {error}") from error

    @contextmanager
    def _errors(self, worker: str | None, connection: _Connection, too_long: str) -> Iterator[None]:
        """gRPC's errors as ours. A connection that failed is not used again."""
        who = self._name(worker)
        try:
            yield
        except grpc.aio.AioRpcError as error:
            code = error.code()
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                if worker is None:  # its machine may be gone without a word, and another one in its place
                    self._forget(worker, connection)
                raise DeadlineExceeded(too_long) from error
            if code not in GONE:
                raise Internal(f"{who}: {code.name}: {error.details()}") from error
            self._forget(worker, connection)
            raise WorkerLost(f"{who} is gone ({code.name})") from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost(f"the connection to {who} was closed") from None  # by `close`: it is not the caller who was cancelled

    # ---- connections -------------------------------------------------------------------------------------------------------

    async def _connection(self, worker: str | None, within_s: float) -> _Connection:
        known = self._connections.get(worker or "")
        if known is not None:
            return known

        async def connect() -> _Connection:
            found = _Connection(await self._find(worker, within_s))
            await self._sweep()
            self._connections[worker or ""] = found
            return found

        finding = self._finding.get(worker or "", connect)
        connection, _ = await wait_within(finding, within_s, f"finding {self._name(worker)}")
        return connection

    def _forget(self, worker: str | None, connection: _Connection) -> None:
        if self._connections.get(worker or "") is connection:
            del self._connections[worker or ""]

    async def _sweep(self) -> None:
        """Drop the connections of workers that left without being called again."""
        dead = [name for name, one in self._connections.items() if one.channel.get_state() in DEAD]
        for name in dead:
            await self._connections.pop(name).channel.close()
