"""What stands around every method of the service: keys, room, malformed messages, errors, deadlines, counting.

Knows: gRPC's handlers and contexts. Does not know: what a method does; it gets a `Call` where gRPC gives a context.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from sparsevila_cluster.core.cluster_config import DoorConfig
from sparsevila_cluster.core.errors import BadRequest, Cancelled, DeadlineExceeded, QueueFull
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.gateway.authenticator import Authenticator, Principal
from sparsevila_cluster.gateway.grpc.status_codes import as_known, status_of

SERVICE = "sparsevila.v1.VideoQA"


class Malformed:
    """Stands for a message whose bytes are not one."""


class Call:
    """One call in progress: who calls, how long they wait, and the way back to them."""

    def __init__(self, context: Any, guest: Principal, max_deadline_s: float):
        self.guest = guest
        self.arrived_s = time.perf_counter()
        self._context = context
        self._max_deadline_s = max_deadline_s

    def left_s(self, otherwise_s: float) -> float:
        """Seconds until the client's deadline, or `otherwise_s` after arrival without one. Raises DeadlineExceeded: none left."""
        waited_s = time.perf_counter() - self.arrived_s
        given_s = self._context.time_remaining()
        left_s = min(otherwise_s - waited_s if given_s is None else given_s, self._max_deadline_s - waited_s)
        if left_s <= 0:
            raise DeadlineExceeded("the call's deadline has passed")
        return left_s

    @property
    def is_late(self) -> bool:
        """Whether the client's deadline has passed."""
        left_s = self._context.time_remaining()
        return left_s is not None and left_s <= 0

    async def confirm(self) -> None:
        """Make sure that the client is still there: a stream that breaks ends as one that was sent whole. Raises Cancelled."""
        try:
            await self._context.send_initial_metadata(())  # cannot be sent, or is cancelled meanwhile
        except grpc.aio.InternalError as error:
            raise Cancelled("the client went away") from error

    async def write(self, message: Message) -> None:
        """Send one message of a stream; waits while the client reads slowly. Raises Cancelled: nobody reads any more."""
        try:
            await self._context.write(message)
        except grpc.aio.InternalError as error:
            raise Cancelled("the client went away") from error


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of `SERVICE`; other services (health, reflection) pass as they are."""

    def __init__(self, config: DoorConfig, guests: Authenticator, sink: MetricsSink):
        self._config, self._guests, self._sink = config, guests, sink
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self.num_calls = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        name = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or not name.startswith(f"/{SERVICE}/"):
            return handler
        if name not in self._wrapped:
            self._wrapped[name] = self._wrap(name.rpartition("/")[2], handler)
        return self._wrapped[name]

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler:
        behaviour = handler.unary_unary or handler.unary_stream or handler.stream_unary
        kinds = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
        }

        async def run(request: Any, context: Any) -> Any:
            arriving = _checked(request) if handler.request_streaming else request
            return await self._run(method, behaviour, arriving, context)

        kind, parse = kinds[handler.request_streaming, handler.response_streaming], _lenient(handler.request_deserializer)
        return kind(run, request_deserializer=parse, response_serializer=handler.response_serializer)

    async def _run(self, method: str, behaviour: Callable[..., Awaitable[Any]], request: Any, context: Any) -> Any:
        code, call = "OK", None
        self.num_calls += 1
        try:
            if self.num_calls > self._config.max_streams:
                raise QueueFull(f"{self.num_calls - 1} calls are in progress; the limit is max_streams={self._config.max_streams}")
            call = Call(context, self._guests.admit(context.invocation_metadata() or ()), self._config.max_deadline_s)
            if isinstance(request, Malformed):
                raise _malformed()
            return await behaviour(request, call)
        except asyncio.CancelledError:
            code = "DEADLINE_EXCEEDED" if call is not None and call.is_late else "CANCELLED"
            raise
        except Exception as error:
            status, details, trailers = status_of(as_known(error, method))
            code = status.name
            await context.abort(status, details, trailers)
        finally:
            self.num_calls -= 1
            self._sink.count("requests_total", method=method, code=code)


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """What does not parse arrives as `Malformed`, and is answered with a code of ours instead of gRPC's UNKNOWN."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Malformed()

    return parse


async def _checked(messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for message in messages:
        if isinstance(message, Malformed):
            raise _malformed()
        yield message


def _malformed() -> BadRequest:
    return BadRequest(f"the message is no message of {SERVICE}: its bytes do not parse")
