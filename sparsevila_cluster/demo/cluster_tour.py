"""`sparsevila demo`: a cluster on this machine, asked by several clients at once, and what happens when a worker dies meanwhile.

Knows: the demo world, clients, and how to tell a person how it went. Does not know: Ray, workers or engines; everything goes over
gRPC, except the signal that kills a worker.

    start -> upload + prepare (each video once) -> clients in parallel, turn by turn -> SIGKILL in mid-answer -> all answers marked
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsevila_cluster.client import AsyncChat, AsyncClient
from sparsevila_cluster.cluster_config import ClusterConfig, build_cluster_config
from sparsevila_cluster.demo.served import serving
from sparsevila_cluster.demo.tour import FILE_WIDTH, NOTE, PASS_SHARE, SHOWN_SEEDS, Marked, Report, film, new_table, pick_questions, plain
from sparsevila_cluster.demo.world import Question, Scene, make_questions
from sparsevila_cluster.errors import BadRequest, Internal, SparseVilaError
from sparsevila_cluster.request import MediaHandle
from sparsevila_cluster.trip import make_trip, megabytes, trip_card

NUM_CLIENTS = 4
# Streams under way when the worker dies, and how often to try when all of them were faster than the signal.
NUM_STREAMS = 6
MAX_KILLS = 3
MAX_TOKENS = 32
WHOLE_AGAIN_S = 120.0
LOOK_S = 0.2

Film = tuple[Path, Scene, int]


@dataclass
class Visitor:
    """One client and its conversation: what it waited for, and what it was told."""

    number: int
    film: Film
    media: MediaHandle
    turns: list[Marked] = field(default_factory=list)


@dataclass
class Stream:
    """One answer while it is spoken: when its pieces came, and how many before the kill."""

    question: Question
    chat: AsyncChat
    came_s: list[float] = field(default_factory=list)
    before: int = 0

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
class Accident:
    """A worker's death: whom it cut, and how long until its pool was whole again."""

    worker: str
    streams: list[Stream]
    prefills: tuple[int, int]
    whole_again_s: float


def run_cluster_tour(out: Path, model: str, as_json: bool, report: Report) -> int:
    """The whole demo; 0 if at least `PASS_SHARE` of the answers are right and no stream was lost, else 1.

    out: folder for the videos, made if it is missing. report: told (stage, done, total) of long work.

    Raises:
        BadRequest: `out` cannot be written. Unavailable, DeadlineExceeded: the cluster does not start. BadCheckpoint.
    """
    console = Console(quiet=as_json, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    try:
        out.mkdir(parents=True, exist_ok=True)
        films = [film(out / f"video-{number}.mp4", seed) for number, seed in enumerate(SHOWN_SEEDS, 1)]
    except OSError as error:
        raise BadRequest(f"cannot write to {str(out)!r}: {error.strerror or error}") from error
    config = build_cluster_config(engine={"model": model}, decode={"replicas": 2}, door={"port": 0})
    started_s = time.perf_counter()
    with serving(config, report) as target:
        ready_s = time.perf_counter() - started_s
        console.print(
            f"{config.prefill.replicas} prefill and {config.decode.replicas} decode workers behind a router, gRPC on {target}, "
            f"ready after {ready_s:.0f} s"
        )
        console.print()
        tour = asyncio.run(_tour(target, films, console, report))
        report("end the cluster", 0, 1)
    report("end the cluster", 1, 1)
    return _finish(console, tour, films, config, ready_s, as_json)


@dataclass
class Tour:
    """What happened, for the last lines and the JSON document."""

    medias: list[MediaHandle]
    visitors: list[Visitor]
    prefills: tuple[int, int]
    accident: Accident

    @property
    def turns(self) -> list[Marked]:
        return [turn for visitor in self.visitors for turn in visitor.turns] + [one.marked for one in self.accident.streams]


async def _tour(target: str, films: Sequence[Film], console: Console, report: Report) -> Tour:
    async with AsyncClient.connect(target) as client:
        medias = [await _prepare(client, film, console, report) for film in films]
        console.print()
        before = await _num_prefills(client)
        report("ask", 0, 1)
        visitors = await asyncio.gather(*(_visit(target, number, films[number % len(films)]) for number in range(NUM_CLIENTS)))
        report("ask", 1, 1)
        after = await _num_prefills(client)
        _show_visitors(console, visitors, (before, after))
        accident = await _accident(client, target, films[0], medias[0], report)
        _show_accident(console, accident)
        return Tour(medias, list(visitors), (before, after), accident)


async def _prepare(client: AsyncClient, film: Film, console: Console, report: Report) -> MediaHandle:
    """Upload a video and prepare it; then ask for it again."""
    path = film[0]
    upload = await client.upload(path, progress=report)
    media = await client.prepare(upload, progress=report)
    started_s = time.perf_counter()
    again = await client.prepare(path)
    again_ms = (time.perf_counter() - started_s) * 1e3
    if not again.reused or again.media_id != media.media_id:
        raise Internal(f"{path.name} was prepared twice")
    stages = ", ".join(f"{stage} {spent:.0f}" for stage, spent in media.ms.items())
    console.print(
        f"{path.name}: {upload.num_bytes / 1e3:.0f} kB uploaded; {media.visual_tokens} visual tokens, {media.visual_tokens_kept} kept, "
        f"{megabytes(media.kv_bytes)} KV shipped; {stages} ms. Again: reused in {again_ms:.0f} ms",
        markup=False,
        soft_wrap=True,
    )
    return media


async def _visit(target: str, number: int, film: Film) -> Visitor:
    """One client of its own: prepares the video that it asks about, which is there already, and holds a conversation."""
    async with AsyncClient.connect(target) as client:
        media = await client.prepare(film[0])
        visitor, chat = Visitor(number, film, media), client.conversation(media)
        for question in pick_questions(film[1], film[2]):
            visitor.turns.append(Marked(question, await chat.ask(question.text, max_tokens=MAX_TOKENS)))
        await chat.close()
        return visitor


# ---- the accident --------------------------------------------------------------------------------------------------------------


async def _accident(client: AsyncClient, target: str, film: Film, media: MediaHandle, report: Report) -> Accident:
    """Kill the decode worker that speaks to most of several streams. Again, if they were all faster than the signal."""
    for number in range(MAX_KILLS):
        report("kill a worker in mid-answer", number, MAX_KILLS)
        accident = await _kill_once(client, target, film, media)
        if any(stream.cut for stream in accident.streams):
            break
    report("kill a worker in mid-answer", MAX_KILLS, MAX_KILLS)
    return accident


async def _kill_once(client: AsyncClient, target: str, film: Film, media: MediaHandle) -> Accident:
    workers = {worker["worker"]: worker["info"]["pid"] for worker in await _decode_workers(client)}
    before = await _num_prefills(client)
    questions = _long_questions(film)
    streams = [Stream(questions[i % len(questions)], client.conversation(media)) for i in range(NUM_STREAMS)]
    speaking = asyncio.Event()
    tasks = [asyncio.ensure_future(_listen(stream, speaking)) for stream in streams]
    await asyncio.wait({*tasks, heard := asyncio.ensure_future(speaking.wait())}, return_when=asyncio.FIRST_COMPLETED)
    heard.cancel()
    victims = [stream.chat.conversation_id.split(".")[1] for stream in streams if stream.came_s]
    worker = max(set(victims), key=victims.count)
    os.kill(workers[worker], signal.SIGKILL)
    killed_s = time.perf_counter()
    for stream in streams:
        stream.before = len(stream.came_s)
    await asyncio.gather(*tasks)
    after = await _num_prefills(client)
    while {one["worker"] for one in await _decode_workers(client)} & {worker} or len(await _decode_workers(client)) < len(workers):
        if time.perf_counter() - killed_s > WHOLE_AGAIN_S:
            raise Internal(f"the worker that was killed did not come back within {WHOLE_AGAIN_S:g} s")
        await asyncio.sleep(LOOK_S)
    return Accident(worker, streams, (before, after), time.perf_counter() - killed_s)


async def _listen(stream: Stream, speaking: asyncio.Event) -> None:
    async for _ in stream.chat.stream(stream.question.text, max_tokens=MAX_TOKENS):
        stream.came_s.append(time.perf_counter())
        speaking.set()


def _long_questions(film: Film) -> list[Question]:
    """Questions whose answers have many tokens."""
    import numpy as np

    return make_questions(film[1], np.random.default_rng((film[2], 18)), NUM_STREAMS, kinds=("describe",))


async def _decode_workers(client: AsyncClient) -> list[dict[str, Any]]:
    try:
        return list((await client.info())["details"]["pools"]["decode"])
    except SparseVilaError:
        return []


async def _num_prefills(client: AsyncClient) -> int:
    pools = (await client.info())["details"]["pools"]
    return sum(int(worker["info"]["prefills"]) for worker in pools["prefill"])


# ---- what people see -----------------------------------------------------------------------------------------------------------


def _show_visitors(console: Console, visitors: Sequence[Visitor], prefills: tuple[int, int]) -> None:
    console.print(f"{len(visitors)} clients at the same time", style="bold")
    table = new_table("client", "video", "last question", "its answer", right=("right", "first token", "later turns"))
    for visitor in visitors:
        first, *later = [turn.answer.timeline["ttft"] for turn in visitor.turns]
        last = visitor.turns[-1]
        table.add_row(
            str(visitor.number + 1), visitor.film[0].name, plain(last.question.text), plain(last.answer.text),
            f"{sum(turn.right for turn in visitor.turns)} of {len(visitor.turns)}", f"{first:.0f} ms",
            f"{sum(later) / max(1, len(later)):.0f} ms",
        )  # fmt: skip
    console.print(table)
    num_turns = sum(len(visitor.turns) for visitor in visitors)
    console.print(
        f"{num_turns} turns in {len(visitors)} conversations: the prefill pool had made {prefills[0]} media prefixes before them and "
        f"{prefills[1]} after"
    )
    console.print()


def _show_accident(console: Console, accident: Accident) -> None:
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


def _finish(console: Console, tour: Tour, films: Sequence[Film], config: ClusterConfig, ready_s: float, as_json: bool) -> int:
    last = tour.visitors[0]
    trip = make_trip(tour.medias[0], [turn.answer for turn in last.turns])
    console.print(trip_card(trip, last.turns[-1].answer.text), markup=False, soft_wrap=True)
    console.print(NOTE, style="dim")
    num_right = sum(turn.right for turn in tour.turns)
    passed = num_right >= PASS_SHARE * len(tour.turns)
    console.print(f"{num_right} of {len(tour.turns)} answers are right" + ("" if passed else f": below {PASS_SHARE:.0%}"))
    console.print(f"videos: {films[0][0].parent}/video-*.mp4", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_document(tour, trip, num_right, passed, ready_s, config)))
    return 0 if passed else 1


def _document(
    tour: Tour, trip: dict[str, Any], num_right: int, passed: bool, ready_s: float, config: ClusterConfig
) -> dict[str, Any]:
    cut = [stream for stream in tour.accident.streams if stream.cut]
    return {
        "right": num_right,
        "asked": len(tour.turns),
        "passed": passed,
        "model": config.engine.model,
        "ready_s": round(ready_s, 3),
        "clients": len(tour.visitors),
        "prefixes_made": {"before_turns": tour.prefills[0], "after_turns": tour.prefills[1], "after_kill": tour.accident.prefills[1]},
        "kill": {
            "answers_cut": len(cut),
            "recovery_s": [round(stream.pause_s, 4) for stream in cut],
            "pool_whole_again_s": round(tour.accident.whole_again_s, 3),
        },
        "trip": trip,
    }
