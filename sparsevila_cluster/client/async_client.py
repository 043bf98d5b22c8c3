"""`AsyncClient`, for Python users in an event loop whose questions a server answers: the same calls as `AsyncVideoQA`."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from os import PathLike
from typing import Any, Unpack

from sparsevila_cluster.client.call_errors import RetryPolicy
from sparsevila_cluster.client.connection import Connection, Tls, tls_of
from sparsevila_cluster.client.media_upload import ClientSource, MediaPayload, Progress, Upload, to_local_media, upload
from sparsevila_cluster.client.proto_messages import prepare_message, to_handle
from sparsevila_cluster.client.targets import Target
from sparsevila_cluster.client.turn_stream import TurnStream
from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source, to_request
from sparsevila_cluster.core.conversation import AsyncChat
from sparsevila_cluster.core.errors import DataLoss, NotFound, SparseVilaError, Unavailable
from sparsevila_cluster.core.requests import Answer, MediaHandle, PrepareRequest, Turn, TurnEvent, check_deadline
from sparsevila_cluster.pb import video_qa_pb2 as pb

# Deadlines of calls that name none, when the client names none for all of them.
PREPARE_S, TURN_S, CALL_S = 600.0, 300.0, 20.0
# How often what the server lost is uploaded again within one preparation.
MAX_REUPLOADS = 2


class AsyncClient:
    """Questions about videos and images, to a server, from an event loop.

        async with AsyncClient.connect("videos.example.org:8600", api_key=key, tls=True) as client:
            chat = client.conversation(await client.prepare("clip.mp4"))
            print((await chat.ask("What happens?")).text)

    `connect` only checks its arguments; the connection is made by `async with` or by the first call, and made again whenever it is
    lost. Any number of tasks of one event loop may use it. Cancelling a task ends what it waits for, also on the server.

    Calls are made again while the server cannot be reached or has no room, within their deadline, as long as nothing was accepted;
    an answer whose stream is lost goes on at its next token. With several targets calls go to those that answer, in turn, and those
    of a target that is lost to another one: conversations, media and uploads are known at every router of a cluster.

    Raises:
        BadRequest. Methods also: Unavailable (the server cannot be reached, or this client is closed), DeadlineExceeded,
        Unauthenticated, PermissionDenied, QueueFull, Incompatible, Internal; each message names the target, or all of them.
    """

    def __init__(self, connection: Connection, timeout_s: float | None):
        check_deadline(timeout_s)
        self.target = connection.target
        self._connection = connection
        self._timeout_s = timeout_s

    @classmethod
    def connect(
        cls,
        target: str,
        *,
        api_key: str | None = None,
        tls: Tls | bool | str | PathLike[str] | None = None,
        timeout_s: float | None = None,
    ) -> AsyncClient:
        """A client of the server at `target`, "host:port", or of several routers of one cluster, "host:port,host:port".

        Nothing to await; use it with `async with`, or `close` it.

        tls: True trusts the authorities of the system, a path those in that PEM file, a `Tls` says all there is to say.
        timeout_s: the deadline of every call without one of its own; None: 600 s to prepare, 300 s for a turn, 20 s for others.
        """
        return cls(Connection(target, api_key, tls_of(tls)), timeout_s)

    async def upload(self, source: Source, *, progress: Progress | None = None, timeout_s: float | None = None) -> Upload:
        """Send a file (a path, bytes or a data URL) without preparing it. `progress("upload", bytes so far, of how many)`.

        Raises:
            BadMedia, TooLarge, QueueFull: the server's room for uploads is taken.
        """
        return await upload(self._connection, to_local_media(source), self._attempts("uploading", timeout_s), progress)

    async def prepare(
        self, source: ClientSource | Sequence[ClientSource], *, progress: Progress | None = None, **options: Unpack[PrepareOptions]
    ) -> MediaHandle:
        """Have a video or image prepared (a path, bytes, a data URL, an https URL, an `Upload`), or several as one.

        What is here is sent along, or uploaded first when it is large; a `file://` URL is a path below the server's file root.
        Options: `fps`, `max_frames`, `prune_keep`, `timeout_s`. The same media with the same options is found again without work
        (`handle.reused`). `progress(stage, done, total)` is called in the event loop; what it raises ends the preparation.

        Raises:
            BadMedia, BadRequest, TooLarge, QueueFull. NotFound: an upload that expired, and cannot be sent again.
        """
        payload = MediaPayload(self._connection, source, progress)
        # Only the options are checked here; the server decides about the media.
        request = to_request([f"media {i}" for i in range(len(payload))], options)
        attempts = self._attempts("preparing media", request.deadline_s)
        async with aclosing(self._statuses(request, payload, attempts)) as statuses:
            async for status in statuses:
                if status.state == pb.MediaStatus.READY:
                    return to_handle(status.media)
                if progress is not None and status.stage:
                    progress(status.stage, status.done, status.total)
        raise AssertionError("a preparation ends READY or with an error")

    def conversation(self, media: MediaHandle | str) -> AsyncChat[MediaHandle | str]:
        """A new conversation about prepared media, given as its handle or its media id."""
        return AsyncChat(self, media)

    async def ask(self, media: MediaHandle | str, question: str, **options: Unpack[AskOptions]) -> Answer:
        """The answer to a single question: a conversation of its own, which is closed afterwards. As `AsyncChat.ask`."""
        chat = self.conversation(media)
        try:
            return await chat.ask(question, **options)
        finally:
            self._close_later(chat)

    def stream(self, media: MediaHandle | str, question: str, **options: Unpack[AskOptions]) -> AsyncGenerator[str, None]:
        """The text of a single question's answer in pieces: as `AsyncChat.stream`, in a conversation that is closed afterwards."""
        chat = self.conversation(media)
        return self._then_close(chat, chat.stream(question, **options))

    async def info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """The server's version, model and limits, and what its workers hold and do."""
        reply = await self._call("GetServerInfo", pb.GetServerInfoRequest(), "asking for information", timeout_s)
        try:
            details = json.loads(reply.details_json or "{}")
        except ValueError as error:
            raise DataLoss(f"{self.target}: the details are no JSON: {error}") from error
        limits = {name: getattr(reply, name) for name in ("max_message_bytes", "max_inline_bytes", "max_upload_bytes")}
        return {"version": reply.version, "model": reply.model, "fingerprint": reply.fingerprint, **limits, "details": details}

    async def media(self, media_id: str, *, timeout_s: float | None = None) -> MediaHandle:
        """What was prepared under this id. Raises NotFound."""
        return to_handle(await self._call("GetMedia", pb.GetMediaRequest(media_id=media_id), "looking for media", timeout_s))

    async def delete_media(self, media_id: str, *, timeout_s: float | None = None) -> bool:
        """Forget prepared media. False: there was nothing to forget."""
        reply = await self._call("DeleteMedia", pb.DeleteMediaRequest(media_id=media_id), "deleting media", timeout_s)
        return bool(reply.deleted)

    def turn_events(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn; conversations ask through it. Closing the generator early aborts the turn."""
        return TurnStream(self._connection, turn, self.turn_limit_s(turn.deadline_s)).events()

    async def close_conversation(self, conversation_id: str) -> None:
        """Free the KV of a conversation; its media stays."""
        message = pb.CloseConversationRequest(conversation_id=conversation_id)
        await self._call("CloseConversation", message, "closing a conversation", None, conversation_id)

    async def close(self) -> None:
        """Abort what runs and disconnect. Idempotent."""
        await self._connection.close()

    async def __aenter__(self) -> AsyncClient:
        self._connection.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def prepare_limit_s(self, timeout_s: float | None = None) -> float:
        """The longest that a preparation, or an upload, with this deadline lets its caller wait."""
        return timeout_s or self._timeout_s or PREPARE_S

    def turn_limit_s(self, timeout_s: float | None = None) -> float:
        """The longest that a turn with this deadline lets its caller wait."""
        return timeout_s or self._timeout_s or TURN_S

    def call_limit_s(self, timeout_s: float | None = None) -> float:
        """The longest that any other call with this deadline lets its caller wait."""
        return timeout_s or self._timeout_s or CALL_S

    def _close_later(self, chat: AsyncChat[MediaHandle | str]) -> None:
        """Close a conversation without waiting for it, or hearing of its errors."""
        self._connection.run_in_background(chat.close())

    async def _then_close(self, chat: AsyncChat[MediaHandle | str], pieces: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece
        finally:
            self._close_later(chat)

    async def _call(self, method: str, message: Any, what: str, timeout_s: float | None, subject: str = "") -> Any:
        check_deadline(timeout_s)
        return await self._connection.call(method, message, self.call_limit_s(timeout_s), what, subject)

    def _attempts(self, what: str, timeout_s: float | None) -> RetryPolicy:
        check_deadline(timeout_s)
        return RetryPolicy(self.prepare_limit_s(timeout_s), f"{self.target}: {what}")

    async def _statuses(
        self, request: PrepareRequest, payload: MediaPayload, attempts: RetryPolicy
    ) -> AsyncGenerator[pb.MediaStatus, None]:
        """Statuses until READY. A preparation is named by its content, so it may be asked for as often as needed."""
        num_reuploads = 0
        target: Target | None = None
        while True:
            message = prepare_message(request, await payload.pack(attempts))
            target = self._connection.choose(after=target)
            try:
                async with aclosing(
                    self._connection.stream(target, "PrepareMedia", message, attempts.left_s(), "preparing media")
                ) as statuses:
                    async for status in statuses:
                        yield status
                        if status.state == pb.MediaStatus.READY:
                            return
                raise Unavailable(f"{self.target}: preparing media ended without a result")
            except NotFound:
                num_reuploads += 1
                if num_reuploads > MAX_REUPLOADS or not await payload.upload_again(attempts):
                    raise
            except SparseVilaError as error:
                await self._connection.again(attempts, error)
