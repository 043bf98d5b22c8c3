"""What stands around every gRPC method: malformed messages, the service's `Call`, streams sent while clients read, statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import KIB
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import BadRequest, Cancelled, QueueFull, SparseVilaError
from sparsevila_cluster.gateway.grpc.status_codes import status_of
from sparsevila_cluster.gateway.service import VideoQAService

SERVICE = "sparsevila.v1.VideoQA"
# What asks for no key: how soon each request must come, and how many streams of reflection there may be.
KEYLESS_REQUEST_S = 5.0
MAX_REFLECTIONS = 20


# Largest message of a method that neither brings media nor asks a question.
SMALL_MESSAGE_BYTES = 64 * KIB
WITH_MEDIA, WITH_QUESTION = ("UploadMedia", "PrepareMedia"), ("Ask", "Answer")


@dataclass(frozen=True)
class Malformed:
    """Stands for a message that cannot be read, or that nobody should: why, and its length where that is why."""

    why: str
    overlong_bytes: int = 0


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method, so that a call without a request, or with one that does not parse, ends the same way everywhere.

    A method of `SERVICE` gets a `Call` where gRPC gives a context. One that streams is an async generator, closed when the client
    leaves. Others (health, reflection) ask for no key: they get gRPC's context, and their requests come soon or not at all.
    """

    def __init__(self, service: VideoQAService, config: GatewayConfig):
        self._service, self._config = service, config
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}
        self._num_reflections = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler:
        """gRPC's hook."""
        name = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if name not in self._wrapped:
            ours = name.startswith(f"/{SERVICE}/")
            self._wrapped[name] = self._wrap(name.rpartition("/")[2], handler) if ours else self._wrap_keyless(handler)
        return self._wrapped[name]

    def _wrap(self, method: str, handler: Any) -> grpc.RpcMethodHandler:
        behaviour = _behaviour(handler)

        async def run(messages: Any, context: Any) -> Any:
            authorization = _authorization(context.invocation_metadata())
            try:
                async with self._service.call(method, authorization, context.time_remaining, context.peer()) as call:
                    in_vain = partial(self._service.read_in_vain, call)
                    if handler.request_streaming:
                        arrived = _received(messages, context, in_vain)
                    else:
                        within_s = min(self._config.request_timeout_s, self._config.max_deadline_s)
                        arrived = await _request(context, within_s, in_vain)
                    if not handler.response_streaming:
                        return await behaviour(arrived, call)
                    async with aclosing(behaviour(arrived, call)) as answers:
                        async for message in answers:
                            await _reaching(context.write(message))
            except SparseVilaError as error:
                await context.abort(*status_of(error))

        return _reading(run, handler, self._most_bytes(method))

    def _most_bytes(self, method: str) -> int:
        """Of a message that is worth parsing, which takes the event loop's time: large ones are for media."""
        if method in WITH_MEDIA:
            return self._config.max_message_bytes
        return self._service.max_turn_bytes if method in WITH_QUESTION else SMALL_MESSAGE_BYTES

    def _wrap_keyless(self, handler: Any) -> grpc.RpcMethodHandler:
        behaviour = _behaviour(handler)

        async def run(messages: Any, context: Any) -> Any:
            try:
                if not handler.request_streaming:
                    return await behaviour(await _request(context, KEYLESS_REQUEST_S), context)
                with self._reflection():
                    async with aclosing(behaviour(_soon(context), context)) as answers:
                        async for message in answers:
                            await wait_within(_reaching(context.write(message)), KEYLESS_REQUEST_S, "sending")
            except SparseVilaError as error:
                await context.abort(*status_of(error))

        return _reading(run, handler, SMALL_MESSAGE_BYTES)

    @contextmanager
    def _reflection(self) -> Iterator[None]:
        if self._num_reflections >= MAX_REFLECTIONS:
            raise QueueFull(f"{MAX_REFLECTIONS} streams of reflection are open; that is the limit")
        self._num_reflections += 1
        try:
            yield
        finally:
            self._num_reflections -= 1


def _authorization(metadata: Any) -> list[str | bytes]:
    return [value for name, value in metadata or () if name == "authorization"]


def _behaviour(handler: Any) -> Callable[..., Any]:
    behaviour: Callable[..., Any] = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    return behaviour


def _reading(run: Callable[..., Awaitable[Any]], handler: Any, most_bytes: int) -> grpc.RpcMethodHandler:
    """A handler that reads by itself: gRPC would wait for the first message of a call before it calls anybody, and for ever."""
    kind = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    return kind(
        run,
        request_deserializer=_lenient(handler.request_deserializer, most_bytes),
        response_serializer=handler.response_serializer,
    )


async def _request(context: Any, within_s: float, in_vain: Callable[[int], None] | None = None) -> Any:
    """The only message of a call. in_vain: told the length of one that is too long.

    Raises:
        BadRequest: none, or one that does not parse. DeadlineExceeded. Cancelled: it broke.
    """
    message = await wait_within(context.read(), within_s, "the request of this call")
    if message is grpc.aio.EOF:
        await _reaching(context.send_initial_metadata(()))  # a call that breaks ends in the same way
        raise BadRequest("the call brings no message")
    return _checked(message, in_vain)


async def _soon(context: Any) -> AsyncIterator[Any]:
    """The messages of a client's stream, each within KEYLESS_REQUEST_S. Raises BadRequest, DeadlineExceeded."""
    while (message := await wait_within(context.read(), KEYLESS_REQUEST_S, "the next request of this call")) is not grpc.aio.EOF:
        yield _checked(message)


def _lenient(deserialize: Callable[[bytes], Any], most_bytes: int) -> Callable[[bytes], Any]:
    """What does not parse, or is too long to be parsed, arrives as `Malformed`, and is answered with a code of ours."""

    def parse(data: bytes) -> Any:
        if len(data) > most_bytes:
            return Malformed(f"a message of this method must have at most {most_bytes} bytes, got {len(data)}", len(data))
        try:
            return deserialize(data)
        except DecodeError:
            return Malformed("the message is none of this method: its bytes do not parse")

    return parse


def _checked(message: Any, in_vain: Callable[[int], None] | None = None) -> Any:
    if isinstance(message, Malformed):
        if in_vain is not None and message.overlong_bytes:
            in_vain(message.overlong_bytes)
        raise BadRequest(message.why)
    return message


async def _received(messages: AsyncIterator[Any], context: Any, in_vain: Callable[[int], None]) -> AsyncIterator[Any]:
    """The messages of a client's stream. in_vain: see `_request`. Raises BadRequest: one does not parse. Cancelled: it broke."""
    async for message in messages:
        yield _checked(message, in_vain)
    # A stream that breaks ends as one that was sent whole; then this cannot be sent, or is cancelled meanwhile.
    await _reaching(context.send_initial_metadata(()))


async def _reaching(sending: Awaitable[None]) -> None:
    """Wait until something is sent, while the client reads slowly. Raises Cancelled: nobody reads any more."""
    try:
        await sending
    except grpc.aio.InternalError as error:
        raise Cancelled("the client went away") from error
