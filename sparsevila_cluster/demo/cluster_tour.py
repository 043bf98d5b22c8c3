"""`sparsevila demo`: a cluster on this machine, asked by several clients at once, and what happens when a worker dies meanwhile.

Knows: the demo world, clients, and how to tell a person how it went. Does not know: Ray, workers or engines; everything goes over
gRPC, except the signal that kills a worker.

    start -> upload + prepare (each video once) -> clients in parallel, turn by turn -> SIGKILL in mid-answer -> all answers marked
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsevila_cluster.client import AsyncClient
from sparsevila_cluster.core.cluster_config import ClusterConfig, build_cluster_config
from sparsevila_cluster.core.errors import BadRequest, Internal
from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.core.summary import PREPARE_STAGES, make_trip, megabytes, trip_card
from sparsevila_cluster.demo.local_tour import (
    FILE_WIDTH,
    NOTE,
    PASS_SHARE,
    SHOWN_SEEDS,
    Film,
    Marked,
    Report,
    make_film,
    new_table,
    pick_questions,
    plain,
)
from sparsevila_cluster.demo.served_cluster import serving
from sparsevila_cluster.demo.worker_kill import MAX_TOKENS, KillResult, have_accident, num_prefills, show_accident

NUM_CLIENTS = 4


@dataclass
class Visitor:
    """One client and its conversation: what it waited for, and what it was told."""

    number: int
    film: Film
    media: MediaHandle
    turns: list[Marked] = field(default_factory=list)


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
        films = [make_film(out / f"video-{number}.mp4", seed) for number, seed in enumerate(SHOWN_SEEDS, 1)]
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
    accident: KillResult

    @property
    def turns(self) -> list[Marked]:
        return [turn for visitor in self.visitors for turn in visitor.turns] + [one.marked for one in self.accident.streams]


async def _tour(target: str, films: Sequence[Film], console: Console, report: Report) -> Tour:
    async with AsyncClient.connect(target) as client:
        medias = [await _prepare(client, film, console, report) for film in films]
        console.print()
        before = await num_prefills(client)
        report("ask", 0, 1)
        visitors = await asyncio.gather(*(_visit(target, number, films[number % len(films)]) for number in range(NUM_CLIENTS)))
        report("ask", 1, 1)
        after = await num_prefills(client)
        _show_visitors(console, visitors, (before, after))
        accident = await have_accident(client, films[1], medias[1], report)
        show_accident(console, accident)
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
    stages = ", ".join(f"{stage} {media.ms[stage]:.0f}" for stage in PREPARE_STAGES if stage in media.ms)
    console.print(
        f"{path.name}: {upload.num_bytes / 1e3:.0f} kB uploaded; {media.visual_tokens} visual tokens, "
        f"{media.visual_tokens_kept} kept, {megabytes(media.kv_bytes)} KV; {stages} ms. Again: reused in {again_ms:.0f} ms",
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
        f"{num_turns} turns in {len(visitors)} conversations: the prefill pool had made {prefills[0]} media prefixes before them "
        f"and {prefills[1]} after"
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
        "prefixes_made": {
            "before_turns": tour.prefills[0],
            "after_turns": tour.prefills[1],
            "after_kill": tour.accident.prefills[1],
        },  # fmt: skip
        "kill": {
            "answers_cut": len(cut),
            "recovery_s": [round(stream.pause_s, 4) for stream in cut],
            "pool_whole_again_s": round(tour.accident.whole_again_s, 3),
        },
        "trip": trip,
    }
