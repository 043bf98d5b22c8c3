"""Those who mean harm to a server, as clients with a key: `python -m benchmarks.lib.attackers TARGET KEY SECONDS KIND`

    questions   as long as a message may be, four at a time
    replays     60,000 tokens that the client says it has heard, and the longest that the server takes
    media       videos and pictures that are small as files and large as pixels, sixteen in a request, and broken files
    streams     a thousand answers at the same time, as long as they may be
    resets      ten thousand calls that are taken back at once, of the method that others wait for; again every ten seconds
    watchers    five hundred that watch the server's health
    connects    connections that are made and closed without a pause, sixteen at a time
    flood       resets without a pause

Streams and watchers have their connections when it begins: `connects` tells what making them costs.

The last line tells, as JSON, what this process was told and how busy it was: {"told": {status: number}, "cores": on average}.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import av
import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from benchmarks.lib import http2_frames as http2
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub

NUM_LOOPS = 4
NUM_STREAMS, NUM_RESETS, NUM_WATCHERS = 1_000, 10_000, 500
RESET_PERIOD_S = 10.0
NUM_CONNECTS = 16
QUESTION_BYTES = 7_900_000
SAID_TOKENS, CONTROL_TOKEN = 60_000, 0
NUM_SOURCES = 16
LONG_ANSWER = 3_500  # tokens; the bundled model has room for a few more
CALL_S = 30.0


class Attacker:
    """One client with a key that does as much harm as it can until `until_s`."""

    def __init__(self, target: str, key: str, until_s: float):
        self._target, self._key, self._until_s = target, key, until_s
        self._metadata = (("authorization", f"Bearer {key}"),)
        self.told: Counter[str] = Counter()
        self.cores = 0.0

    async def run(self, kind: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            clip = Path(folder) / "clip.mp4"
            write_mp4(make_video(3)[1], clip)
            self._clip = clip.read_bytes()
        if kind == "media":
            self._costly = (costly_video(), large_picture())
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(self._channel())
            self._media_id = await self._prepared(VideoQAStub(channel), self._clip)
            num = {"streams": NUM_STREAMS, "watchers": NUM_WATCHERS}.get(kind, 0)
            self._connected = [await stack.enter_async_context(self._channel()) for _ in range(num)]
            for each in self._connected:
                await asyncio.wait_for(each.channel_ready(), CALL_S)
            print("ready", flush=True)
            if not await asyncio.to_thread(sys.stdin.readline):  # whoever measures says when, or has gone
                return
            begun_s, spent_s = time.monotonic(), time.process_time()
            self._until_s += begun_s
            await getattr(self, f"_{kind}")()
            self.cores = (time.process_time() - spent_s) / (time.monotonic() - begun_s)

    def _channel(self) -> grpc.aio.Channel:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
        return grpc.aio.insecure_channel(self._target, options)

    async def _prepared(self, stub: VideoQAStub, data: bytes) -> str:
        request = pb.PrepareMediaRequest(sources=[pb.MediaSource(inline=data)])
        async for status in stub.PrepareMedia(request, metadata=self._metadata, timeout=120):
            if status.state == pb.MediaStatus.READY:
                return str(status.media.media_id)
        raise RuntimeError("the attacker's own video is not ready")

    async def _loop(self, work: Callable[[VideoQAStub], Awaitable[None]], num: int) -> None:
        """`num` times at once, each again and again over a channel of its own."""

        async def one(connected: grpc.aio.Channel | None) -> None:
            async with contextlib.nullcontext(connected) if connected else self._channel() as channel:
                stub = VideoQAStub(channel)
                while time.monotonic() < self._until_s:
                    try:
                        await asyncio.wait_for(work(stub), max(0.1, self._until_s - time.monotonic()))
                        self.told["OK"] += 1
                    except grpc.aio.AioRpcError as error:
                        self.told[error.code().name] += 1
                    except TimeoutError:
                        self.told["still waiting"] += 1

        await asyncio.gather(*map(one, self._connected or [None] * num))

    async def _questions(self) -> None:
        async def ask(stub: VideoQAStub) -> None:
            request = pb.AskRequest(media_id=self._media_id, question="why " * (QUESTION_BYTES // 4))
            await stub.Answer(request, metadata=self._metadata, timeout=CALL_S)

        await self._loop(ask, NUM_LOOPS)

    async def _replays(self) -> None:
        longest = await self._longest_replay()

        async def ask(stub: VideoQAStub) -> None:
            num, most = random.choice(((SAID_TOKENS, 2**31 - 1), (longest, longest + 1)))
            request = pb.AskRequest(media_id=self._media_id, question="Why?", said_token_ids=[CONTROL_TOKEN] * num)
            request.sampling.max_tokens = most
            await stub.Answer(request, metadata=self._metadata, timeout=CALL_S)

        await self._loop(ask, NUM_LOOPS)

    async def _longest_replay(self) -> int:
        """By halving: what is one token longer is refused as too long."""
        low, high = 1, SAID_TOKENS
        async with self._channel() as channel:
            while high - low > 16:
                middle = (low + high) // 2
                request = pb.AskRequest(media_id="none", question="Why?", said_token_ids=[CONTROL_TOKEN] * middle)
                request.sampling.max_tokens = middle
                try:
                    await VideoQAStub(channel).Answer(request, metadata=self._metadata, timeout=CALL_S)
                except grpc.aio.AioRpcError as error:
                    low, high = (low, middle) if error.code() == grpc.StatusCode.INVALID_ARGUMENT else (middle, high)
        return low

    async def _media(self) -> None:
        rng = random.Random(0)

        def broken() -> bytes:
            data = bytearray(self._clip)
            for _ in range(8):
                data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data[: rng.randrange(1, len(data))])

        async def prepare(stub: VideoQAStub) -> None:
            # Other bytes behind the end of a file make another file of it.
            sources = [rng.choice((*self._costly, broken()))] * rng.choice((1, NUM_SOURCES))
            request = pb.PrepareMediaRequest(sources=[pb.MediaSource(inline=data + rng.randbytes(8)) for data in sources])
            async for _ in stub.PrepareMedia(request, metadata=self._metadata, timeout=CALL_S):
                pass

        await self._loop(prepare, NUM_LOOPS)

    async def _streams(self) -> None:
        async def ask(stub: VideoQAStub) -> None:
            request = pb.AskRequest(media_id=self._media_id, question="Describe everything.")
            request.sampling.max_tokens, request.sampling.temperature = LONG_ANSWER, 2.0  # what is guessed ends late
            try:
                async for _ in stub.Ask(request, metadata=self._metadata, timeout=CALL_S):
                    pass
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.5)  # a thousand at the same time, not as many as fit into the time
                raise

        await self._loop(ask, NUM_STREAMS)

    async def _flood(self) -> None:
        await self._resets(period_s=0.0)

    async def _resets(self, period_s: float = RESET_PERIOD_S) -> None:
        data = pb.AskRequest(media_id=self._media_id, question="Why?").SerializeToString()
        header = ("authorization", f"Bearer {self._key}")
        reset = http2.CANCEL.to_bytes(4, "big")
        while (begun_s := time.monotonic()) < self._until_s:
            with contextlib.suppress(ConnectionError):
                async with http2.connection(self._target) as connection:
                    for i in range(NUM_RESETS):
                        stream = 2 * i + 1
                        call = http2.call(stream, "Ask", data, header) + http2.frame(http2.RST_STREAM, 0, stream, reset)
                        if time.monotonic() >= self._until_s or not await connection.send(call):
                            break
                        self.told["sent"] += 1
                self.told["connections"] += 1
            await asyncio.sleep(max(0.0, min(begun_s + period_s, self._until_s) - time.monotonic()))

    async def _watchers(self) -> None:
        async def watch(channel: grpc.aio.Channel) -> None:
            stub = health_pb2_grpc.HealthStub(channel)
            while time.monotonic() < self._until_s:
                watching = stub.Watch(health_pb2.HealthCheckRequest(service="sparsevila.v1.VideoQA"))
                try:
                    async with asyncio.timeout(max(0.1, self._until_s - time.monotonic())):
                        async for reply in watching:
                            self.told[health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)] += 1
                except TimeoutError:
                    watching.cancel()
                except grpc.aio.AioRpcError as error:
                    self.told[error.code().name] += 1
                    await asyncio.sleep(0.5)

        await asyncio.gather(*map(watch, self._connected))

    async def _connects(self) -> None:
        async def connect() -> None:
            while time.monotonic() < self._until_s:
                with contextlib.suppress(ConnectionError):
                    async with http2.connection(self._target):
                        self.told["connections"] += 1

        await asyncio.gather(*(connect() for _ in range(NUM_CONNECTS)))


def costly_video(width: int = 3840, height: int = 2160, num_frames: int = 240) -> bytes:
    """A minute of nothing in ultra-high definition, with one key frame: some 50 kB."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4, options={"preset": "ultrafast", "g": str(num_frames)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((height * 3 // 2, width), np.uint8), format="yuv420p")
        for i in range(num_frames):
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def large_picture(side: int = 8192) -> bytes:
    """As many pixels as are allowed, all the same: some 200 kB."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return file.getvalue()


KINDS = ("questions", "replays", "media", "streams", "resets", "watchers", "connects", "flood")
# All but the last two, which only ask for as much of the processors as they can get.
TOGETHER = KINDS[:-2]


def main(argv: Sequence[str]) -> None:
    target, key, seconds, kind = argv
    attacker = Attacker(target, key, float(seconds))
    asyncio.run(attacker.run(kind))
    print(json.dumps({"told": attacker.told, "cores": attacker.cores}))


if __name__ == "__main__":
    main(sys.argv[1:])
