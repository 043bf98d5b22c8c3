"""What the demo does to a cluster: it kills a decode worker while it speaks, and looks at what becomes of the answers.

Knows: streams, signals, and how long people had to wait. Does not know: how the cluster recovers.
"""

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
from sparsevila_cluster.demo.local_tour import Film, Marked, Report, new_table, plain
from sparsevila_cluster.demo.world import Question, make_questions

# Streams under way when the worker dies, and how often to try when all of them were faster than the signal.
NUM_STREAMS = 6
MAX_KILLS = 3
MAX_TOKENS = 32
WHOLE_AGAIN_S = 120.0
LOOK_S = 0.2


@dataclass
class ClientStream:
    """One answer while it is spoken: when its pieces came, and how many before the kill."""

    question: Question
    chat: AsyncChat
    came_s: list[float] = field(default_factory=list)
    before: int = 0

    @property
    def worker(self) -> str:
        """Where it is answered, by the conversation's token."""
        return self.chat.conversation_id.split(".")[1]

    @property
    def cut(self) -> bool:
        """Whether it had begun, and had not ended, when the worker died."""
        return 0 < self.before < len(self.came_s)

    @property
    def marked(self) -> Marked:
        return Marked(self.question, self.chat.turns[-1][1])

    @property
    def pause_s(self) -> float:
        """The longest silence between two pieces."""
        return max((b - a for a, b in zip(self.came_s, self.came_s[1:], strict=False)), default=0.0)


@dataclass
class KillResult:
    """A worker's death: whom it cut, and how long until its pool was whole again."""

    worker: str
    streams: list[ClientStream]
    prefills: tuple[int, int]
    whole_again_s: float


async def have_accident(client: AsyncClient, film: Film, media: MediaHandle, report: Report) -> KillResult:
    """Kill the decode worker that speaks to most of several streams. Again, if they were all faster than the signal."""
    for number in range(MAX_KILLS):
        report("kill a worker in mid-answer", number, MAX_KILLS)
        accident = await _kill_once(client, film, media)
        if any(stream.cut for stream in accident.streams):
            break
    report("kill a worker in mid-answer", MAX_KILLS, MAX_KILLS)
    return accident


async def _kill_once(client: AsyncClient, film: Film, media: MediaHandle) -> KillResult:
    pids = await _pids(client)
    before = await num_prefills(client)
    streams = [ClientStream(question, client.conversation(media)) for question in _long_questions(film)]
    speaking = asyncio.Event()
    tasks = [asyncio.create_task(_listen(stream, streams, speaking)) for stream in streams]
    hearing = asyncio.create_task(speaking.wait())
    try:
        await asyncio.wait({*tasks, hearing}, return_when=asyncio.FIRST_COMPLETED)
        places = [stream.worker for stream in streams if stream.came_s]
        worker = max(set(places), key=places.count)
        os.kill(pids[worker], signal.SIGKILL)
        killed_s = time.perf_counter()
        for stream in streams:
            stream.before = len(stream.came_s)
        await asyncio.gather(*tasks)
    finally:
        for task in (*tasks, hearing):
            task.cancel()
    after = await num_prefills(client)
    while len(now := await _pids(client)) < len(pids) or worker in now:
        if time.perf_counter() - killed_s > WHOLE_AGAIN_S:
            raise Internal(f"the worker that was killed did not come back within {WHOLE_AGAIN_S:g} s")
        await asyncio.sleep(LOOK_S)
    return KillResult(worker, streams, (before, after), time.perf_counter() - killed_s)


async def _listen(stream: ClientStream, streams: Sequence[ClientStream], speaking: asyncio.Event) -> None:
    async for _ in stream.chat.stream(stream.question.text, max_tokens=MAX_TOKENS):
        stream.came_s.append(time.perf_counter())
        if sum(bool(one.came_s) for one in streams) > len(streams) // 2:
            speaking.set()


def _long_questions(film: Film) -> list[Question]:
    """Questions whose answers have many tokens."""
    questions = make_questions(film[1], np.random.default_rng((film[2], 18)), NUM_STREAMS, kinds=("describe",))
    return [questions[i % len(questions)] for i in range(NUM_STREAMS)]


async def _pids(client: AsyncClient) -> dict[str, int]:
    """The processes of the decode workers that answer."""
    try:
        pools = (await client.info())["details"]["pools"]
    except SparseVilaError:
        return {}
    return {worker["worker"]: worker["info"]["pid"] for worker in pools["decode"] if "pid" in worker["info"]}


def show_accident(console: Console, accident: KillResult) -> None:
    """A table of the streams, and how long recovery took."""
    console.print(f"worker {accident.worker} was killed (SIGKILL) in mid-answer", style="bold")
    table = new_table("question", "answer", "", right=("pieces before", "after", "longest pause"))
    for stream in accident.streams:
        sign = "[green]right" if stream.marked.right else "[bold red]wrong"
        table.add_row(
            plain(stream.question.text), plain(stream.marked.answer.text), sign, str(stream.before),
            str(len(stream.came_s) - stream.before), f"{stream.pause_s * 1e3:.0f} ms",
        )  # fmt: skip
    console.print(table)
    cut = [stream for stream in accident.streams if stream.cut]
    recovery = f"recovered within {max(stream.pause_s for stream in cut):.2f} s" if cut else "none of them was cut"
    console.print(
        f"{len(cut)} of {len(accident.streams)} answers were cut and went on elsewhere, {recovery}; media prefixes made before "
        f"{accident.prefills[0]}, after {accident.prefills[1]}; the pool was whole again after {accident.whole_again_s:.1f} s"
    )
    console.print()


async def num_prefills(client: AsyncClient) -> int:
    """Media prefixes that the prefill pool has made."""
    pools = (await client.info())["details"]["pools"]
    return sum(int(worker["info"]["prefills"]) for worker in pools["prefill"])
