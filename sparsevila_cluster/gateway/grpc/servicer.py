"""The methods of the gRPC service, each a translation of one endpoint of `VideoQAService`.

The interceptor hands in a `Call` in place of a gRPC context, and sends what a stream yields.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from sparsevila_cluster.gateway.call import Call
from sparsevila_cluster.gateway.grpc.translate import (
    given,
    to_chunk,
    to_event,
    to_info,
    to_media,
    to_reference,
    to_reply,
    to_status,
    to_turn,
    to_upload,
)
from sparsevila_cluster.gateway.service import VideoQAService
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAServicer


class GrpcServicer(VideoQAServicer):
    """The service over gRPC's messages. Raises what the service raises."""

    def __init__(self, service: VideoQAService):
        self._service = service

    async def UploadMedia(self, request_iterator: AsyncIterator[pb.MediaChunk], call: Call) -> pb.MediaUpload:
        """`upload`."""
        return to_upload(await self._service.upload(call, (to_chunk(chunk) async for chunk in request_iterator)))

    async def PrepareMedia(self, request: pb.PrepareMediaRequest, call: Call) -> AsyncIterator[pb.MediaStatus]:
        """`prepare`."""
        media = [to_reference(source) for source in request.sources]
        async with aclosing(self._service.prepare(call, media, **given(request, "fps", "max_frames", "prune_keep"))) as updates:
            async for update in updates:
                yield to_status(update)

    async def GetMedia(self, request: pb.GetMediaRequest, call: Call) -> pb.Media:
        """`media`."""
        return to_media(await self._service.media(call, request.media_id))

    async def DeleteMedia(self, request: pb.DeleteMediaRequest, call: Call) -> pb.DeleteMediaReply:
        """`delete_media`."""
        return pb.DeleteMediaReply(deleted=await self._service.delete_media(call, request.media_id))

    async def Ask(self, request: pb.AskRequest, call: Call) -> AsyncIterator[pb.AskEvent]:
        """`ask`, event by event."""
        num_tokens = len(request.said_token_ids)
        async with aclosing(self._service.ask(call, to_turn(request, self._service.max_answer_tokens))) as events:
            async for event in events:
                num_tokens += len(event.token_ids)
                yield to_event(event, num_tokens)

    async def Answer(self, request: pb.AskRequest, call: Call) -> pb.AnswerReply:
        """`ask`, all events in one message."""
        async with aclosing(self._service.ask(call, to_turn(request, self._service.max_answer_tokens))) as events:
            return to_reply([event async for event in events])

    async def Abort(self, request: pb.AbortRequest, call: Call) -> pb.AbortReply:
        """`abort`."""
        return pb.AbortReply(aborted=await self._service.abort(call, request.turn_id))

    async def CloseConversation(self, request: pb.CloseConversationRequest, call: Call) -> pb.CloseConversationReply:
        """`close_conversation`."""
        return pb.CloseConversationReply(closed=await self._service.close_conversation(call, request.conversation_id))

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, call: Call) -> pb.ServerInfo:
        """`server_info`."""
        return to_info(await self._service.server_info(call))
