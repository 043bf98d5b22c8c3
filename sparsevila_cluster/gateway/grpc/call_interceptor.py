"""What stands around every gRPC method: malformed messages, the service's `Call`, streams sent while clients read, statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sparsevila_cluster.core.errors import BadRequest, Cancelled, SparseVilaError
from sparsevila_cluster.gateway.grpc.status_codes import status_of
from sparsevila_cluster.gateway.service import VideoQAService

SERVICE = "sparsevila.v1.VideoQA"


class Malformed:
    """Stands for a message whose bytes are not one."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the methods of `SERVICE`; other services (health, reflection) pass as they are.

    A method gets a `Call` where gRPC gives a context. One that streams is an async generator, closed when the client leaves.
    """

    def __init__(self, service: VideoQAService):
        self._service = service
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        """gRPC's hook."""
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
            authorization = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
            try:
                async with self._service.call(method, authorization, context.time_remaining, context.peer()) as call:
                    arrived = _received(request, context) if handler.request_streaming else _checked(request)
                    if not handler.response_streaming:
                        return await behaviour(arrived, call)
                    async with aclosing(behaviour(arrived, call)) as messages:
                        async for message in messages:
                            await _reaching(context.write(message))
            except SparseVilaError as error:
                await context.abort(*status_of(error))

        kind, parse = kinds[handler.request_streaming, handler.response_streaming], _lenient(handler.request_deserializer)
        return kind(run, request_deserializer=parse, response_serializer=handler.response_serializer)


def _lenient(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """What does not parse arrives as `Malformed`, and is answered with a code of ours instead of gRPC's UNKNOWN."""

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data)
        except DecodeError:
            return Malformed()

    return parse


def _checked(message: Any) -> Any:
    if isinstance(message, Malformed):
        raise BadRequest(f"the message is no message of {SERVICE}: its bytes do not parse")
    return message


async def _received(messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    """The messages of a client's stream. Raises BadRequest: one does not parse. Cancelled: it broke."""
    async for message in messages:
        yield _checked(message)
    # A stream that breaks ends as one that was sent whole; then this cannot be sent, or is cancelled meanwhile.
    await _reaching(context.send_initial_metadata(()))


async def _reaching(sending: Awaitable[None]) -> None:
    """Wait until something is sent, while the client reads slowly. Raises Cancelled: nobody reads any more."""
    try:
        await sending
    except grpc.aio.InternalError as error:
        raise Cancelled("the client went away") from error
