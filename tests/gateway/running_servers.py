"""Real gRPC servers over real pipelines on loopback, and generated stubs that call them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import msgpack
import numpy as np

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import from_failure
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.gateway.grpc import GrpcServer
from sparsevila_cluster.gateway.service import VideoQAService
from sparsevila_cluster.models import load_model
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub
from tests.media.media_files import video_bytes

FIELDS = {"prune_keep": 0.5, "retrieve_keep": 0.3, "max_frames": 8}
MODELS: dict[str, Any] = {}


@dataclass
class RunningServer:
    """A server, what is behind it, and a channel to it."""

    server: GrpcServer
    service: VideoQAService
    pipeline: LocalPipeline
    sink: Tally
    channel: grpc.aio.Channel
    stub: VideoQAStub

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def settled(self) -> None:
        """No turn runs and every byte has an owner."""

        async def idle() -> bool:
            info = await self.pipeline.info()
            return info["turns_running"] == info["turns_waiting"] == 0

        await until(idle, "turns go on for nobody")
        await self.pipeline.decode.call(lambda engine: engine.check_integrity())


@asynccontextmanager
async def running_server(
    checkpoint, *, engine=None, fetcher=None, pipeline=None, credentials=None, **fields
) -> AsyncIterator[RunningServer]:
    """A server over a tiny pipeline; keyword arguments are fields of GatewayConfig."""
    config, sink = build_config(model=str(checkpoint), **FIELDS | (engine or {})), Tally()
    if pipeline is None:
        if str(checkpoint) not in MODELS:
            MODELS[str(checkpoint)] = load_model(config.model_dir, device=config.device, dtype=config.dtype)
        pipeline = LocalPipeline(config, MODELS[str(checkpoint)])
    # Client and server share a loop, and the machine is busy: only tests of it mean lateness.
    gateway = GatewayConfig(port=0, **{"max_loop_lag_s": 60.0} | fields)
    service = VideoQAService(pipeline, gateway, config, sink, fetcher=fetcher)
    server = GrpcServer(service, gateway)
    try:
        await server.start()
        address = f"127.0.0.1:{server.port}"
        channel = grpc.aio.insecure_channel(address) if credentials is None else grpc.aio.secure_channel(address, credentials)
        async with channel:
            yield RunningServer(server, service, pipeline, sink, channel, VideoQAStub(channel))
    finally:
        await server.stop(0)
        await service.close()
        await pipeline.close()


def run(checkpoint, work: Callable[[RunningServer], Awaitable[Any]], **options) -> Any:
    """`await work(served)` within a minute."""

    async def main() -> Any:
        async with running_server(checkpoint, **options) as served:
            return await work(served)

    return asyncio.run(asyncio.wait_for(main(), 60))


async def until(condition: Callable[[], Awaitable[bool]], what: str, within_s: float = 20) -> None:
    give_up_at = time.time() + within_s
    while not await condition():
        assert time.time() < give_up_at, what
        await asyncio.sleep(0.01)


async def refused(call: Any) -> tuple[str, Exception | None]:
    """(status code, the error that the trailer describes) of a call that must fail."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall):
            async for _ in call:
                pass
        else:
            await call
    except grpc.RpcError as error:
        trailers = dict(error.trailing_metadata() or ())
        failure = trailers.get("sparsevila-failure-bin")
        raised = None if failure is None else from_failure(msgpack.unpackb(failure))
        if raised is not None:
            assert raised.grpc_status == error.code().name and str(raised) == error.details()
            assert "Traceback" not in error.details()
        return error.code().name, raised
    raise AssertionError("the call succeeded")


async def blocking_upload(address: str, chunks: Iterable[pb.MediaChunk]) -> Any:
    """An upload by gRPC's client of threads: grpc.aio's may make up a status where a write finds that the call was refused."""

    def sent() -> Any:
        with grpc.insecure_channel(address) as channel:
            return VideoQAStub(channel).UploadMedia(iter(chunks))

    return await asyncio.to_thread(sent)


def clip(seed: int, num: int = 8, side: int = 112) -> bytes:
    """A short video, a few blurred colours in each frame."""
    rng = np.random.default_rng(seed)
    draw = rng.integers(0, 256, (num, side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return video_bytes(num, fps=4, size=(side, side), draw=lambda i: draw[i])


async def upload(stub: VideoQAStub, data: bytes, step: int = 1 << 20, kind: str = "", **options) -> Any:
    async def chunks():
        for start in range(0, len(data), step):
            yield pb.MediaChunk(data=data[start : start + step], kind=kind, file_name="clip.mp4")

    return await stub.UploadMedia(chunks(), **options)


async def prepare(stub: VideoQAStub, source: bytes | pb.MediaSource, metadata: Any = None, **fields) -> Any:
    """The media of the last status, which must be READY."""
    source = pb.MediaSource(inline=source) if isinstance(source, bytes) else source
    call = stub.PrepareMedia(pb.PrepareMediaRequest(sources=[source], **fields), metadata=metadata)
    statuses = [status async for status in call]
    assert [s.state for s in statuses] == [pb.MediaStatus.WORKING] * (len(statuses) - 1) + [pb.MediaStatus.READY]
    return statuses[-1].media


def ask(media_id: str, question: str = "what is it?", max_tokens: int = 8, **fields) -> pb.AskRequest:
    return pb.AskRequest(media_id=media_id, question=question, sampling=pb.Sampling(max_tokens=max_tokens), **fields)


async def streamed(stub: VideoQAStub, request: pb.AskRequest, **options) -> tuple[str, tuple[int, ...], list[Any]]:
    """(text, token ids, events) of a stream, whose order and indices are checked."""
    events = [event async for event in stub.Ask(request, **options)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted" and kinds[-1] == "done" and kinds.count("evidence") == int(request.want_evidence), kinds
    ids: list[int] = list(request.said_token_ids)
    text = ""
    for event in events:
        if event.HasField("token"):
            assert event.token.index == len(ids)
            ids += event.token.token_ids
            text += event.token.text
    done = events[-1].done
    assert done.num_tokens == len(ids) == done.usage.completion_tokens
    return text + done.text, tuple(ids), events


async def locally(pipeline: LocalPipeline, data: bytes, questions: list[str], max_tokens: int = 8, name: str = "") -> list[Answer]:
    """The answers of one conversation held without a server."""
    media = await pipeline.prepare(PrepareRequest((MediaSource(data),)))
    answers = []
    for i, question in enumerate(questions):
        sampling = SamplingParams(max_tokens=max_tokens)
        turn = Turn(f"local-{name}-{i}", f"local-{name}", media.media_id, question, sampling, want_evidence=True)
        answers.append(Answer.from_events([event async for event in pipeline.ask(turn)]))
    await pipeline.close_conversation(f"local-{name}")
    return answers


def slow_down(pipeline: LocalPipeline, step_s: float = 0.01) -> None:
    """The real engine, but every step takes this much longer: there is time to leave in the middle of a turn."""
    step = pipeline.decode.engine.step

    def slowly() -> Any:
        time.sleep(step_s)
        return step()

    pipeline.decode.engine.step = slowly


async def long_question(stub: VideoQAStub, media_id: str, max_tokens: int = 150, metadata: Any = None, **fields) -> pb.AskRequest:
    """A question that a tiny model answers with `max_tokens` tokens: random weights come upon an end now and then."""
    for i in range(50):
        request = ask(media_id, f"what is step {i}?", max_tokens)
        if (await stub.Answer(request, metadata=metadata)).finish_reason == "length":
            request.MergeFrom(pb.AskRequest(**fields))
            return request
    raise AssertionError("every answer is short")
