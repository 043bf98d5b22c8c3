"""The methods of the service, each over one method of a `Pipeline`.

Knows: what a client may do, and how what it does is undone when it leaves. Does not know: engines, workers, keys or sockets.
The guard around these methods (guard.py) turns errors into statuses; here they are only raised.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from sparsevila_cluster.core.cluster_config import DoorConfig
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import BadMedia, Internal, NotFound
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import Answer, MediaHandle, Turn, TurnEvent
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.gateway.authenticator import Principal, check_id
from sparsevila_cluster.gateway.grpc.call_interceptor import Call, CallInterceptor
from sparsevila_cluster.gateway.grpc.translate import to_event, to_media, to_prepare, to_reply, to_turn
from sparsevila_cluster.gateway.media_sources import MediaSources
from sparsevila_cluster.gateway.progress_queue import ProgressQueue
from sparsevila_cluster.gateway.spool import Spool
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAServicer

if TYPE_CHECKING:
    from sparsevila_cluster.core.protocols import Pipeline

# Media that was made here and not asked about yet, so that a first question counts as cold.
MAX_FRESH = 4096
# Deadline of calls that start no work, where a client names none.
SHORT_CALL_S = 30.0

R = TypeVar("R")


class GrpcServicer(VideoQAServicer):
    """The service over one pipeline. Methods get a `Call` in place of a context, see guard.py."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: DoorConfig,
        engine: EngineConfig,
        spool: Spool,
        sources: MediaSources,
        guard: CallInterceptor,
        sink: MetricsSink,
    ):
        self._pipeline, self._config, self._engine = pipeline, config, engine
        self._spool, self._sources, self._guard, self._sink = spool, sources, guard, sink
        self._fresh: OrderedDict[str, None] = OrderedDict()

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def UploadMedia(self, request_iterator: AsyncIterator[Any], context: Call) -> pb.MediaUpload:
        upload = await self._sources.receive(request_iterator, context)
        return pb.MediaUpload(
            upload_id=upload.upload_id, num_bytes=upload.num_bytes, digest=upload.digest, expires_in_s=upload.expires_in_s
        )

    async def PrepareMedia(self, request: pb.PrepareMediaRequest, context: Call) -> None:
        async with self._sources.opened(request.sources, context) as sources:
            wanted = to_prepare(request, sources, context.left_s(self._engine.prepare_timeout_s), context.guest.tenant)
            reports = ProgressQueue()
            preparing = asyncio.ensure_future(self._pipeline.prepare(wanted, reports.put))
            preparing.add_done_callback(lambda _: reports.close())
            try:
                async for stage, done, total in reports:
                    await context.write(pb.MediaStatus(state=pb.MediaStatus.WORKING, stage=stage, done=done, total=total))
                handle = await preparing
            finally:
                await _end(preparing)  # what it reads stays until then
        self._note_fresh(handle)
        await context.write(pb.MediaStatus(state=pb.MediaStatus.READY, media=to_media(handle)))

    async def GetMedia(self, request: pb.GetMediaRequest, context: Call) -> pb.Media:
        media_id = check_id("media_id", request.media_id, required=True)
        return to_media(await _soon(self._pipeline.media(media_id, context.guest.tenant), context, "looking for media"))

    async def DeleteMedia(self, request: pb.DeleteMediaRequest, context: Call) -> pb.DeleteMediaReply:
        media_id = check_id("media_id", request.media_id, required=True)
        deleting = self._pipeline.delete_media(media_id, context.guest.tenant)
        return pb.DeleteMediaReply(deleted=await _soon(deleting, context, "deleting media"))

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def Ask(self, request: pb.AskRequest, context: Call) -> None:
        num_tokens = len(request.said_token_ids)
        turn = self._turn(request, context)
        turn_id = context.guest.outside(turn.turn_id)
        async with aclosing(self._events(turn, request, context)) as events:
            async for event in events:
                num_tokens += len(event.token_ids)
                await context.write(to_event(event, turn_id=turn_id, num_tokens=num_tokens))

    async def Answer(self, request: pb.AskRequest, context: Call) -> pb.AnswerReply:
        turn = self._turn(request, context)
        async with aclosing(self._events(turn, request, context)) as events:
            arrived = [event async for event in events]
        turn_id = context.guest.outside(turn.turn_id)
        return to_reply(Answer.from_events(arrived), turn_id=turn_id, conversation_id=arrived[-1].conversation_id)

    async def Abort(self, request: pb.AbortRequest, context: Call) -> pb.AbortReply:
        turn_id = context.guest.inside(check_id("turn_id", request.turn_id, required=True))
        return pb.AbortReply(aborted=await _soon(self._pipeline.abort(turn_id), context, "aborting a turn"))

    async def CloseConversation(self, request: pb.CloseConversationRequest, context: Call) -> pb.CloseConversationReply:
        conversation_id = check_id("conversation_id", request.conversation_id, required=True)
        closing = self._pipeline.close_conversation(conversation_id)
        return pb.CloseConversationReply(closed=await _soon(closing, context, "closing a conversation"))

    # ---- the server --------------------------------------------------------------------------------------------------------

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Call) -> pb.ServerInfo:
        info = _visible(await _soon(self._pipeline.info(), context, "asking for info"), context.guest)
        door = {"calls": self._guard.num_calls, "spool_bytes": self._spool.num_bytes}
        return pb.ServerInfo(
            version=_version(),
            model=str(info.get("model", "")),
            fingerprint=str(info.get("fingerprint", "")),
            max_message_bytes=self._config.max_message_bytes,
            max_inline_bytes=self._config.max_inline_bytes,
            max_upload_bytes=min(self._engine.limits.max_bytes, self._config.spool_bytes),
            details_json=json.dumps({**info, "door": door}, default=str),
        )

    # ---- one turn ----------------------------------------------------------------------------------------------------------

    def _turn(self, request: pb.AskRequest, call: Call) -> Turn:
        turn_id = check_id("turn_id", request.turn_id) or uuid.uuid4().hex
        return to_turn(
            request,
            turn_id=call.guest.inside(turn_id),
            conversation_id=check_id("conversation_id", request.conversation_id),
            deadline_s=call.left_s(self._engine.turn_timeout_s),
            tenant=call.guest.tenant,
        )

    async def _events(self, turn: Turn, request: pb.AskRequest, call: Call) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn, measured. Leaving early aborts it. Raises what the pipeline raises."""
        labels = {"turn": "later" if request.conversation_id else "first"}
        media = "cold" if turn.media_id in self._fresh else "warm"
        first_s = last_s = None
        num_tokens = 0
        try:
            async with aclosing(self._pipeline.ask(turn)) as events:
                async for event in events:
                    if event.kind == "token":
                        num_tokens, last_s = num_tokens + len(event.token_ids), time.perf_counter()
                        if first_s is None:
                            first_s = last_s
                            self._fresh.pop(turn.media_id, None)
                            self._sink.observe("request_ttft_seconds", first_s - call.arrived_s, media=media, **labels)
                    if event.kind == "done":
                        if first_s is not None and last_s is not None and num_tokens > 1:
                            self._sink.observe("request_tpot_seconds", (last_s - first_s) / (num_tokens - 1))
                        self._sink.observe("request_e2e_seconds", time.perf_counter() - call.arrived_s, **labels)
                        yield event
                        return
                    yield event
        except BadMedia as error:  # from making an evicted prefix again: the bytes that it was made of are gone
            raise NotFound(f"media {turn.media_id!r} was evicted, and its source is gone; prepare it again") from error
        raise Internal(f"turn {call.guest.outside(turn.turn_id)} ended without an answer")

    def _note_fresh(self, handle: MediaHandle) -> None:
        if not handle.reused:
            self._fresh[handle.media_id] = None
            while len(self._fresh) > MAX_FRESH:
                self._fresh.popitem(last=False)


async def _soon(work: Awaitable[R], call: Call, what: str) -> R:
    """The result of what should take milliseconds. Raises DeadlineExceeded."""
    return await wait_within(work, call.left_s(SHORT_CALL_S), what)


def _version() -> str:
    try:
        return metadata.version("sparsevila-cluster")
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


async def _end(work: asyncio.Future[MediaHandle]) -> None:
    """Cancel `work` unless it is done, and wait for its end, for which it has GRACE_S."""
    work.cancel()
    await asyncio.wait((work,), timeout=GRACE_S)
    if work.done() and not work.cancelled():
        work.exception()  # whoever awaited it was told; nobody else has to be


def _visible(told: Any, guest: Principal) -> Any:
    """What `info()` tells, without entries of other tenants: mappings that name another `tenant`."""
    if isinstance(told, dict):
        return {name: _visible(value, guest) for name, value in told.items() if not _foreign(value, guest)}
    if isinstance(told, list | tuple):
        return [_visible(value, guest) for value in told if not _foreign(value, guest)]
    return told


def _foreign(told: Any, guest: Principal) -> bool:
    return isinstance(told, dict) and guest.apart and not may_use(told.get("tenant", ""), guest.tenant)
