"""What a tenant notices of another one's attacks: `python -m benchmarks.attack`.

A cluster of one prefill and two decode workers is served to two keys. The victim asks about a video that is there, one question
after the other. It does so under each kind of attack (`benchmarks.lib.attackers`), then, three times as long, under all of them at
once, and alone before and after each: a machine that others use too is not as fast now as it was five minutes ago. Attacker, victim
and server share the cores of the machine: what the attacker itself computes is missing to the victim. Both
are told beside what the server spends, and how late the system wakes a process that does nothing but sleep: no server answers
sooner than it is woken (`benchmarks.lib.wake_up`; --autogroup off).

Ends with status 1 if the victim was told an error or a wrong answer, or if its p99 under any attack is more than --limit times that
of the quiet phases around it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import cpu_time, machine, wake_up
from benchmarks.lib.attackers import KINDS, TOGETHER
from benchmarks.lib.report import Report, progress
from sparsevila_cluster.client import AsyncClient
from sparsevila_cluster.core.cluster_config import build_cluster_config
from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.demo.served_cluster import serving

KEYS = {"victim-key": "victim", "attacker-key": "attacker"}
NUM_QUESTIONS = 6
TURN_S = 30.0
READY_S = 120.0
AFTER_S = 1.0
# How many times as long all kinds together last: one answer in a hundred is to tell of more than how they begin.
TOGETHER_TIMES = 3


@dataclass
class Phase:
    """One stretch of time.

    attacks: kinds; times: how many times as long as others it lasts; told: what the attacker heard, by kind and status; cores: busy
    on average, by whom; late_ms: see `wake_up`.
    """

    attacks: tuple[str, ...] = ()
    times: int = 1
    latency_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    num_wrong: int = 0
    told: dict[str, dict[str, int]] = field(default_factory=dict)
    cores: dict[str, float] = field(default_factory=dict)
    late_ms: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For tables."""
        return "quiet" if not self.attacks else self.attacks[0] if len(self.attacks) == 1 else "all at once"

    def percentile_ms(self, percent: float) -> float:
        """Of the time from a question to the end of its answer."""
        return round(float(np.percentile(self.latency_s, percent)) * 1e3, 1) if self.latency_s else float("inf")


class Victim:
    """Asks the questions of one conversation again and again; `truths` are the answers of the first time, in quiet."""

    def __init__(self, client: AsyncClient, media_id: str, questions: Sequence[str]):
        self._client, self._media_id, self._questions = client, media_id, questions
        self._truths: list[tuple[int, ...]] = []

    async def learn(self) -> None:
        chat = self._client.conversation(self._media_id)
        self._truths = [(await chat.ask(question, evidence=False)).token_ids for question in self._questions]
        await chat.close()

    async def ask(self, phase: Phase, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            chat = self._client.conversation(self._media_id)
            try:
                for question, truth in zip(self._questions, self._truths, strict=True):
                    begun_s = time.monotonic()
                    answer = await chat.ask(question, evidence=False, timeout_s=TURN_S)
                    phase.latency_s.append(time.monotonic() - begun_s)
                    phase.num_wrong += answer.token_ids != truth
                await chat.close()
            except SparseVilaError as error:
                phase.errors.append(f"{type(error).__name__}: {error}")


async def measure(target: str, keys: Sequence[str], phases: Sequence[Phase], seconds: float, say: Callable[[str], None]) -> None:
    """Fills in the phases. keys: of the victim and of the attacker."""
    scene, frames = make_video(1)
    questions = [question.text for question in make_questions(scene, np.random.default_rng(1), NUM_QUESTIONS)]
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder) / "victim.mp4"
        write_mp4(frames, video)
        async with AsyncClient.connect(target, api_key=keys[0]) as client:
            victim = Victim(client, (await client.prepare(video)).media_id, questions)
            await victim.learn()
            for phase in phases:
                say(phase.name)
                await one_phase(target, keys[1], victim, phase, phase.times * seconds)


async def one_phase(target: str, key: str, victim: Victim, phase: Phase, seconds: float) -> None:
    """A conversation without the clock comes first, so that what the phase before left behind is not of this one."""
    await victim.ask(Phase(), 1.0)
    # They go on for longer than is measured: their end is none of the attack.
    attackers = [await _attacker(target, key, seconds + AFTER_S, kind) for kind in phase.attacks]
    sleeper = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.lib.wake_up", str(seconds), stdout=subprocess.PIPE, start_new_session=True
    )
    before, begun_s = cpu_time.cpu_s(), time.monotonic()
    for attacker in attackers:
        attacker.stdin.write(b"go\n")
        await attacker.stdin.drain()
    await victim.ask(phase, seconds)
    spent = {who: busy_s / (time.monotonic() - begun_s) for who, busy_s in cpu_time.cpu_since(before).items()}
    out, _ = await asyncio.wait_for(sleeper.communicate(), READY_S)
    phase.late_ms = json.loads(out)
    phase.cores = {"victim": spent.pop("client"), "server": sum(spent.values()), "attacker": 0.0}
    for kind, attacker in zip(phase.attacks, attackers, strict=True):
        out, _ = await asyncio.wait_for(attacker.communicate(), READY_S)
        outcome = json.loads(out.splitlines()[-1])
        phase.told[kind] = outcome["told"]
        phase.cores["attacker"] += outcome["cores"]


async def _attacker(target: str, key: str, seconds: float, kind: str) -> Any:
    """A process of this kind, which has prepared what it needs and waits for a line. All kinds in one would starve each other."""
    command = [sys.executable, "-m", "benchmarks.lib.attackers", target, key, str(seconds), kind]
    pipe = subprocess.PIPE
    # In a session of its own: Linux shares cores between sessions (sched_autogroup), and the attacker's is not the victim's.
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**20, start_new_session=True)
    assert process.stdout is not None
    line = await asyncio.wait_for(process.stdout.readline(), READY_S)
    if line != b"ready\n":
        raise RuntimeError(f"the attacker does not start: {line!r}")
    return process


# ---- what comes of it ----------------------------------------------------------------------------------------------------------


def judge(phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """One row per phase. ratio: of its p99 to that of the quiet phases next to it."""
    quiet = [_around(phases, i).percentile_ms(99) for i in range(len(phases))]
    return [
        {
            "attack": phase.name,
            "answers": len(phase.latency_s),
            "errors": len(phase.errors),
            "wrong": phase.num_wrong,
            "p50_ms": phase.percentile_ms(50),
            "p99_ms": phase.percentile_ms(99),
            "ratio": round(phase.percentile_ms(99) / quiet_ms, 2),
            **{f"late_{which}_ms": phase.late_ms.get(which, 0.0) for which in ("p99", "max")},
            **{f"{who}_cores": round(phase.cores.get(who, 0.0), 2) for who in ("server", "attacker", "victim")},
            "told": phase.told,
        }
        for phase, quiet_ms in zip(phases, quiet, strict=True)
    ]


def _around(phases: Sequence[Phase], i: int) -> Phase:
    """What the victim saw in the last quiet phase up to this one and in the first from there on."""
    before = next((phase for phase in reversed(phases[: i + 1]) if not phase.attacks), None)
    after = next((phase for phase in phases[i:] if not phase.attacks), None)
    near = [before] if before is after else [before, after]
    return Phase(latency_s=[each for phase in near if phase is not None for each in phase.latency_s])


HEAD = {
    "attack": "attack", "answers": "victim's answers", "errors": "errors", "wrong": "wrong", "p50_ms": "p50 ms", "p99_ms": "p99 ms",
    "ratio": "p99 / quiet", "late_p99_ms": "woken late, p99 ms", "late_max_ms": "at most ms",
    "server_cores": "cores: server", "attacker_cores": "attacker", "victim_cores": "victim",
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help=f"of each phase; all at once: {TOGETHER_TIMES} times as many")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated; all but connects and flood come again together")
    parser.add_argument("--limit", type=float, default=3.0, help="the most that the victim's p99 may grow")
    parser.add_argument(
        "--autogroup", choices=("as-is", "off"), default="as-is", help="off: without Linux's sched_autogroup meanwhile; needs root"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    options = parser.parse_args(argv)
    if options.autogroup == "off" and wake_up.has_autogroup() and not os.access(wake_up.AUTOGROUP, os.W_OK):
        parser.error(f"--autogroup off: this user may not write {wake_up.AUTOGROUP}")
    options.kinds = tuple(options.kinds.split(","))
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"--kinds: no {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster is ended on the way out
    try:
        return _main(options)
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(options: argparse.Namespace) -> int:
    report = Report("attack", machine.card(), quiet=options.json)
    config = build_cluster_config(
        engine={"device": "cpu", "max_batch": 2},
        transport={"kind": "gloo"},
        decode={"replicas": 2},
        door={"port": 0, "api_keys": KEYS},
    )
    kinds = options.kinds
    several = tuple(kind for kind in kinds if kind in TOGETHER)
    attacks = [Phase((kind,)) for kind in kinds] + ([Phase(several, TOGETHER_TIMES)] if len(several) > 1 else [])
    phases = [Phase(), *(phase for attack in attacks for phase in (attack, Phase()))]
    with progress() as say:
        report.show_card()
        fair = wake_up.without_autogroup() if options.autogroup == "off" else nullcontext()
        with fair, serving(config, lambda stage, done, total: say(stage)) as target:
            report.say(f"sched_autogroup  {'on' if wake_up.has_autogroup() else 'off'}")
            asyncio.run(measure(target, list(KEYS), phases, options.seconds, say))
            say("end the cluster")
    report.rows = judge(phases)
    report.show_table("The victim", list(HEAD.values()), [[row[name] for name in HEAD] for row in report.rows])
    told = [[phase.name, kind, ", ".join(f"{n} {status}" for status, n in counts.items())]
            for phase in phases for kind, counts in phase.told.items()]  # fmt: skip
    report.show_table("What the attacker was told", ("attack", "kind", "how often"), told)
    for error in [error for phase in phases for error in phase.errors][:20]:
        report.say(error)
    worst = max((row["ratio"] for row in report.rows if row["attack"] != "quiet"), default=0.0)
    num_errors = sum(row["errors"] + row["wrong"] for row in report.rows)
    attacked = [row for row in report.rows if row["attack"] != "quiet"]
    report.figures = {
        **{f"{row['attack'].replace(' ', '_')}_p99_ratio": row["ratio"] for row in attacked},
        "worst_p99_ratio": worst,
        "victim_errors": num_errors,
    }
    report.show_figures()
    report.finish(options.save)
    return 1 if num_errors or worst > options.limit else 0


if __name__ == "__main__":
    sys.exit(main())
