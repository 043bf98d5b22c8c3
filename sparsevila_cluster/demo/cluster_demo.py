"""`sparsevila demo`: a cluster on this machine, asked by several clients at once, and what happens when a worker dies meanwhile.

start -> upload + prepare (each video once) -> clients in parallel, turn by turn -> SIGKILL in mid-answer -> all answers graded
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
from sparsevila_cluster.core.summary import PREPARE_STAGES, media_summary, megabytes, summary_line
from sparsevila_cluster.demo.local_demo import (
    FILE_WIDTH,
    MAX_FRAMES,
    MAX_TOKENS,
    NOTE,
    NUM_SHOWN,
    PASS_SHARE,
    SHOWN,
    DemoVideo,
    GradedTurn,
    Report,
    ask_about,
    new_table,
    plain,
    write_video,
)
from sparsevila_cluster.demo.served_cluster import serving
from sparsevila_cluster.demo.worker_kill import KillResult, kill_worker, num_prefills, show_kill

NUM_CLIENTS = 4


@dataclass
class ClientResult:
    """One client: the video that it asked about, and its turns."""

    number: int
    video: DemoVideo
    media: MediaHandle
    turns: list[GradedTurn] = field(default_factory=list)


def run_cluster_demo(out: Path, model: str, as_json: bool, report: Report) -> int:
    """The whole demo; 0 if at least `PASS_SHARE` of the answers are right and no stream was lost, else 1.

    out: folder for the videos, made if it is missing. report: called with (stage, done, total) of long work.

    Raises:
        BadRequest: `out` cannot be written. Unavailable, DeadlineExceeded: the cluster does not start. BadCheckpoint.
    """
    console = Console(quiet=as_json, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    try:
        out.mkdir(parents=True, exist_ok=True)
        videos = [write_video(out / f"video-{number}.mp4", *video) for number, video in enumerate(SHOWN, 1)]
    except OSError as error:
        raise BadRequest(f"cannot write to {str(out)!r}: {error.strerror or error}") from error
    config = build_cluster_config(engine={"model": model, "max_frames": MAX_FRAMES}, decode={"replicas": 2}, door={"port": 0})
    started_s = time.perf_counter()
    with serving(config, report) as target:
        ready_s = time.perf_counter() - started_s
        console.print(
            f"{config.prefill.replicas} prefill and {config.decode.replicas} decode workers behind routers, gRPC on {target}, "
            f"ready after {ready_s:.0f} s"
        )
        console.print()
        outcome = asyncio.run(_run(target, videos, console, report))
        report("end the cluster", 0, 1)
    report("end the cluster", 1, 1)
    return _finish(console, outcome, videos, config, ready_s, as_json)


@dataclass
class DemoOutcome:
    """What the summary and the JSON document are made of. prefills: media prefixes made before and after the clients' turns."""

    medias: list[MediaHandle]
    clients: list[ClientResult]
    prefills: tuple[int, int]
    kill: KillResult

    @property
    def turns(self) -> list[GradedTurn]:
        """All turns: of the clients, and of the streams that were under way when the worker was killed."""
        return [turn for result in self.clients for turn in result.turns] + [one.graded for one in self.kill.streams]


async def _run(target: str, videos: Sequence[DemoVideo], console: Console, report: Report) -> DemoOutcome:
    async with AsyncClient.connect(target) as client:
        medias = [await _prepare(client, video, console, report) for video in videos]
        console.print()
        before = await num_prefills(client)
        report("ask", 0, 1)
        clients = await asyncio.gather(
            *(_run_client(target, number, videos[number % len(videos)]) for number in range(NUM_CLIENTS))
        )
        report("ask", 1, 1)
        after = await num_prefills(client)
        _show_clients(console, clients, (before, after))
        kill = await kill_worker(client, videos[1], medias[1], report)
        show_kill(console, kill)
        return DemoOutcome(medias, list(clients), (before, after), kill)


async def _prepare(client: AsyncClient, video: DemoVideo, console: Console, report: Report) -> MediaHandle:
    """Upload a video and prepare it; then ask for it again."""
    path = video.path
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


async def _run_client(target: str, number: int, video: DemoVideo) -> ClientResult:
    """A connection of its own: prepare the video, which is resident already, and hold a conversation about it."""
    async with AsyncClient.connect(target) as client:
        media = await client.prepare(video.path)
        result, chat = ClientResult(number, video, media), client.conversation(media)
        for question in ask_about(video.scene, video.seed, NUM_SHOWN):
            result.turns.append(GradedTurn(question, await chat.ask(question.text, max_tokens=MAX_TOKENS)))
        await chat.close()
        return result


def _show_clients(console: Console, clients: Sequence[ClientResult], prefills: tuple[int, int]) -> None:
    console.print(f"{len(clients)} clients at the same time", style="bold")
    table = new_table("client", "video", "last question", "its answer", right=("right", "first token", "later turns"))
    for result in clients:
        first, *later = [turn.answer.timeline["ttft"] for turn in result.turns]
        last = result.turns[-1]
        table.add_row(
            str(result.number + 1), result.video.path.name, plain(last.question.text), plain(last.answer.text),
            f"{sum(turn.right for turn in result.turns)} of {len(result.turns)}", f"{first:.0f} ms",
            f"{sum(later) / max(1, len(later)):.0f} ms",
        )  # fmt: skip
    console.print(table)
    num_turns = sum(len(result.turns) for result in clients)
    console.print(
        f"{num_turns} turns in {len(clients)} conversations: the prefill pool had made {prefills[0]} media prefixes before them "
        f"and {prefills[1]} after"
    )
    console.print()


def _finish(
    console: Console, outcome: DemoOutcome, videos: Sequence[DemoVideo], config: ClusterConfig, ready_s: float, as_json: bool
) -> int:
    last = outcome.clients[0]
    summary = media_summary(outcome.medias[0], [turn.answer for turn in last.turns])
    console.print(summary_line(summary, last.turns[-1].answer.text), markup=False, soft_wrap=True)
    console.print(NOTE, style="dim")
    num_right = sum(turn.right for turn in outcome.turns)
    passed = num_right >= PASS_SHARE * len(outcome.turns)
    console.print(f"{num_right} of {len(outcome.turns)} answers are right" + ("" if passed else f": below {PASS_SHARE:.0%}"))
    console.print(f"videos: {videos[0].path.parent}/video-*.mp4", markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_document(outcome, summary, num_right, passed, ready_s, config)))
    return 0 if passed else 1


def _document(
    outcome: DemoOutcome, summary: dict[str, Any], num_right: int, passed: bool, ready_s: float, config: ClusterConfig
) -> dict[str, Any]:
    cut = [stream for stream in outcome.kill.streams if stream.cut]
    return {
        "right": num_right,
        "asked": len(outcome.turns),
        "passed": passed,
        "model": config.engine.model,
        "ready_s": round(ready_s, 3),
        "clients": len(outcome.clients),
        "prefixes_made": {
            "before_turns": outcome.prefills[0],
            "after_turns": outcome.prefills[1],
            "after_kill": outcome.kill.prefills[1],
        },  # fmt: skip
        "kill": {
            "answers_cut": len(cut),
            "recovery_s": [round(stream.pause_s, 4) for stream in cut],
            "pool_whole_again_s": round(outcome.kill.whole_again_s, 3),
        },
        "trip": summary,
    }
