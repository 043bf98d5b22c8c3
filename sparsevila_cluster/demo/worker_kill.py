"""The demo kills a decode worker of the cluster while it answers, and measures what becomes of the answers."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console

from sparsevila_cluster.client import AsyncChat, AsyncClient
from sparsevila_cluster.core.errors import Internal, SparseVilaError
from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.demo.local_demo import MAX_TOKENS, DemoVideo, GradedTurn, Report, new_table, plain
from sparsevila_cluster.demo.questions import SceneQuestion, make_questions

# Streams under way when the worker dies, and how often to try when all of them ended before the signal.
NUM_STREAMS = 6
MAX_KILLS = 3
WHOLE_AGAIN_S = 120.0
POLL_S = 0.2


@dataclass
class ClientStream:
    """One answer while it is streamed: when its pieces arrived (s), and how many before the kill."""

    question: SceneQuestion
    chat: AsyncChat[MediaHandle | str]
    piece_times_s: list[float] = field(default_factory=list)
    before: int = 0

    @property
    def worker(self) -> str:
        """The worker that answers, as the conversation id says."""
        return self.chat.conversation_id.split(".")[1]

    @property
    def cut(self) -> bool:
        """Whether it had begun, and had not ended, when the worker died."""
        return 0 < self.before < len(self.piece_times_s)

    @property
    def graded(self) -> GradedTurn:
        """The turn, once it is finished."""
        return GradedTurn(self.question, self.chat.turns[-1][1])

    @property
    def pause_s(self) -> float:
        """The longest time between two pieces, in seconds."""
        return max((b - a for a, b in zip(self.piece_times_s, self.piece_times_s[1:], strict=False)), default=0.0)


@dataclass
class KillResult:
    """A killed worker: the streams under way, prefills before and after, and seconds until its pool was whole again."""

    worker: str
    streams: list[ClientStream]
    prefills: tuple[int, int]
    whole_again_s: float


async def kill_worker(client: AsyncClient, video: DemoVideo, media: MediaHandle, report: Report) -> KillResult:
    """Kill the decode worker that answers most of several streams; again, if all of them ended before the signal."""
    for number in range(MAX_KILLS):
        report("kill a worker in mid-answer", number, MAX_KILLS)
        kill = await _kill_once(client, video, media)
        if any(stream.cut for stream in kill.streams):
            break
    report("kill a worker in mid-answer", MAX_KILLS, MAX_KILLS)
    return kill


async def _kill_once(client: AsyncClient, video: DemoVideo, media: MediaHandle) -> KillResult:
    pids = await _pids(client)
    before = await num_prefills(client)
    streams = [ClientStream(question, client.conversation(media)) for question in _long_questions(video)]
    enough_started = asyncio.Event()
    tasks = [asyncio.create_task(_read(stream, streams, enough_started)) for stream in streams]
    waiting = asyncio.create_task(enough_started.wait())
    try:
        await asyncio.wait({*tasks, waiting}, return_when=asyncio.FIRST_COMPLETED)
        workers = [stream.worker for stream in streams if stream.piece_times_s]
        worker = max(set(workers), key=workers.count)
        os.kill(pids[worker], signal.SIGKILL)
        killed_s = time.perf_counter()
        for stream in streams:
            stream.before = len(stream.piece_times_s)
        await asyncio.gather(*tasks)
    finally:
        for task in (*tasks, waiting):
            task.cancel()
    after = await num_prefills(client)
    while len(now := await _pids(client)) < len(pids) or worker in now:
        if time.perf_counter() - killed_s > WHOLE_AGAIN_S:
            raise Internal(f"the worker that was killed did not come back within {WHOLE_AGAIN_S:g} s")
        await asyncio.sleep(POLL_S)
    return KillResult(worker, streams, (before, after), time.perf_counter() - killed_s)


async def _read(stream: ClientStream, streams: Sequence[ClientStream], enough_started: asyncio.Event) -> None:
    async for _ in stream.chat.stream(stream.question.text, max_tokens=MAX_TOKENS):
        stream.piece_times_s.append(time.perf_counter())
        if sum(bool(one.piece_times_s) for one in streams) > len(streams) // 2:
            enough_started.set()


def _long_questions(video: DemoVideo) -> list[SceneQuestion]:
    """Questions whose answers have many tokens."""
    questions = make_questions(video.scene, np.random.default_rng((video.seed, 18)), NUM_STREAMS, kinds=("listing", "describe"))
    return [questions[i % len(questions)] for i in range(NUM_STREAMS)]


async def _pids(client: AsyncClient) -> dict[str, int]:
    """The processes of the decode workers that answer."""
    try:
        pools = (await client.info())["details"]["pools"]
    except SparseVilaError:
        return {}
    return {worker["worker"]: worker["info"]["pid"] for worker in pools["decode"] if "pid" in worker["info"]}


def show_kill(console: Console, kill: KillResult) -> None:
    """A table of the streams, and how long recovery took."""
    console.print(f"worker {kill.worker} was killed (SIGKILL) in mid-answer", style="bold")
    table = new_table("question", "answer", "", right=("pieces before", "after", "longest pause"))
    for stream in kill.streams:
        sign = "[green]right" if stream.graded.right else "[bold red]wrong"
        table.add_row(
            plain(stream.question.text), plain(stream.graded.answer.text), sign, str(stream.before),
            str(len(stream.piece_times_s) - stream.before), f"{stream.pause_s * 1e3:.0f} ms",
        )  # fmt: skip
    console.print(table)
    cut = [stream for stream in kill.streams if stream.cut]
    recovery = f"recovered within {max(stream.pause_s for stream in cut):.2f} s" if cut else "none of them was cut"
    console.print(
        f"{len(cut)} of {len(kill.streams)} answers were cut and went on elsewhere, {recovery}; media prefixes made before "
        f"{kill.prefills[0]}, after {kill.prefills[1]}; the pool was whole again after {kill.whole_again_s:.1f} s"
    )
    console.print()


async def num_prefills(client: AsyncClient) -> int:
    """Media prefixes that the prefill pool has made."""
    pools = (await client.info())["details"]["pools"]
    return sum(int(worker["info"]["prefills"]) for worker in pools["prefill"])
