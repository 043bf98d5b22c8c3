"""A server of the service that does what its script says, on real sockets, and a wire to it that can be cut."""

import asyncio
import hashlib
import itertools
from contextlib import asynccontextmanager

import grpc.aio
import msgpack

from sparsevila_cluster.client import AsyncClient
from sparsevila_cluster.core.errors import SparseVilaError, to_failure
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAServicer, add_VideoQAServicer_to_server

# Token i completes WORDS[i]; an empty one is held back and comes with a later token, or with `done`.
WORDS = ["A ", "red ", "", "star ", "and ", "", "a ", "blue ", "dot"]
TOKENS = [100 + i for i in range(len(WORDS))]
TAIL = "."
TEXT = "".join(WORDS) + TAIL
MEDIA_ID = "ab" * 32


async def refuse(context, error: SparseVilaError):
    """End a call as the server does: status, details, and the typed failure."""
    metadata = (("sparsevila-failure-bin", msgpack.packb(to_failure(error))),)
    await context.abort(grpc.StatusCode[error.grpc_status], str(error), trailing_metadata=metadata)


class Scripted(VideoQAServicer):
    """Each call takes the next step of the script of its method; without one it just works.

    A step is an async function of (context, ...): see the tests. `calls` lists (method, request).
    """

    def __init__(self):
        self.calls = []
        self.script = {}
        self.uploads = {}
        self.aborted = asyncio.Event()
        self.ended_early = asyncio.Event()
        self.max_inline_bytes = 1000
        self.details = "{}"
        self.moved_to = {}
        self.metadata = {}
        self._ids = itertools.count()

    def of(self, method):
        return [request for name, request in self.calls if name == method]

    async def _step(self, method, request, context):
        self.calls.append((method, request))
        self.metadata = dict(context.invocation_metadata())
        steps = self.script.get(method, [])
        step = steps.pop(0) if steps else None
        if isinstance(step, SparseVilaError):
            await refuse(context, step)
        if step is not None:
            return await step(context)

    async def Ask(self, request, context):
        conversation_id = self.moved_to.get(request.conversation_id, request.conversation_id) or f"c{next(self._ids)}"
        try:
            # A step may say (accept, after how many new tokens to do what).
            accept, cut_after, cut = await self._step("Ask", request, context) or (True, len(TOKENS) + 1, None)
            if accept:
                accepted = pb.Accepted(turn_id=request.turn_id, conversation_id=conversation_id)
                yield pb.AskEvent(accepted=accepted)
            said = len(request.said_token_ids)
            assert list(request.said_token_ids) == TOKENS[:said]
            for i in range(said, len(TOKENS)):
                if i - said == cut_after:
                    if await cut(context) == "end":
                        return
                yield pb.AskEvent(token=pb.Token(index=i, token_ids=[TOKENS[i]], text=WORDS[i], brownout=0.5))
            if request.want_evidence:
                frame = pb.EvidenceFrame(frame=2, time_s=1.5, share=1.0, rows=2, cols=3, heat=bytes([0, 255, 0, 0, 0, 85]))
                yield pb.AskEvent(evidence=pb.Evidence(frames=[frame]))
            if cut_after == len(TOKENS) - said:
                await cut(context)
            usage = pb.Usage(visual_tokens=640, visual_tokens_kept=160, visual_tokens_retrieved=16, ms={"ttft": 1.0, "total": 2.0})
            usage.completion_tokens, usage.effective_keep = len(TOKENS), 0.1
            yield pb.AskEvent(
                done=pb.Done(finish_reason="stop", text=TAIL, usage=usage, conversation_id=conversation_id, num_tokens=len(TOKENS))
            )
        except (asyncio.CancelledError, GeneratorExit):
            self.ended_early.set()
            raise

    async def Abort(self, request, context):
        await self._step("Abort", request, context)
        self.aborted.set()
        return pb.AbortReply(aborted=True)

    async def CloseConversation(self, request, context):
        await self._step("CloseConversation", request, context)
        return pb.CloseConversationReply(closed=True)

    async def UploadMedia(self, request_iterator, context):
        await self._step("UploadMedia", None, context)
        chunks = [chunk async for chunk in request_iterator]
        data = b"".join(chunk.data for chunk in chunks)
        upload_id = f"u{next(self._ids)}"
        self.uploads[upload_id] = chunks
        digest = hashlib.blake2b(data, digest_size=32).hexdigest()
        return pb.MediaUpload(upload_id=upload_id, num_bytes=len(data), digest=digest, expires_in_s=60)

    async def PrepareMedia(self, request, context):
        await self._step("PrepareMedia", request, context)
        for source in request.sources:
            if source.upload_id and source.upload_id not in self.uploads:
                await context.abort(grpc.StatusCode.NOT_FOUND, f"upload {source.upload_id!r} is unknown")
        for stage in ("decode", "encode"):
            yield pb.MediaStatus(state=pb.MediaStatus.WORKING, stage=stage, done=1, total=2)
        yield pb.MediaStatus(state=pb.MediaStatus.READY, media=self._media())

    async def GetMedia(self, request, context):
        await self._step("GetMedia", request, context)
        return self._media()

    async def DeleteMedia(self, request, context):
        await self._step("DeleteMedia", request, context)
        return pb.DeleteMediaReply(deleted=True)

    async def GetServerInfo(self, request, context):
        await self._step("GetServerInfo", request, context)
        return pb.ServerInfo(
            version="1", model="tiny", max_message_bytes=2**20, max_inline_bytes=self.max_inline_bytes, details_json=self.details
        )

    def _media(self):
        return pb.Media(
            media_id=MEDIA_ID, kind="video", num_frames=10, duration_s=5.0, visual_tokens=640, visual_tokens_kept=160,
            prefix_tokens=180, kv_bytes=1000, dense_kv_bytes=4000, ms={"decode": 3.0, "transfer": 2.0},
        )  # fmt: skip


def connect(port, **options):
    return AsyncClient.connect(f"127.0.0.1:{port}", **options)


class Wire:
    """TCP between a client and a server that can be cut, or held up, at any moment."""

    def __init__(self, port):
        self.to_port = port
        self.held = asyncio.Event()
        self.num_connections = 0
        self._links = set()

    async def start(self):
        self._server = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _link(self, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.to_port)
        except OSError:
            return writer.close()
        self.num_connections += 1
        self._links |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader, writer):
        try:
            while data := await reader.read(65536):
                if self.held.is_set():
                    await asyncio.sleep(3600)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def cut(self):
        """Reset every connection, as when a process dies."""
        for writer in self._links:
            writer.transport.abort()
        self._links = set()

    async def stop(self):
        self._server.close()
        self.cut()


@asynccontextmanager
async def serving(servicer, port=0, credentials=None, shared=False, options=()):
    """`servicer` on a port of this machine, which others may share. Yields (server, port)."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", int(shared)), *options])
    add_VideoQAServicer_to_server(servicer, server)
    address = f"127.0.0.1:{port}"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    await server.start()
    try:
        yield server, port
    finally:
        await server.stop(0)


@asynccontextmanager
async def wired(servicer, **options):
    """A server behind a wire. Yields the wire."""
    async with serving(servicer, **options) as (_, port):
        wire = Wire(port)
        await wire.start()
        try:
            yield wire
        finally:
            await wire.stop()
