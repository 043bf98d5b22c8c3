"""How well the cluster serves, over gRPC, on this machine: `sparsevila serve` under load. `python -m benchmarks.serving`.

    overhead   the same turns through the cluster, from the engine in this process, and as messages of plain grpc.aio, in turns
    closed     1, 2, 4 and 8 clients at a time       each holds conversations of three turns, about videos that are there
    open       Poisson arrivals at two rates         already, and some about videos that nobody has prepared yet

Each load is laid on the sparse and on the dense configuration, one after the other. Both are the same cluster: dense clients ask to
keep everything, when they prepare and when they ask, which is what `keep_all` and `retrieve_all` do. A turn is good if it keeps the
SLO: so many times what the dense configuration takes for one client at a time. Rates of arrivals are shares of what the sparse
configuration did in its best closed loop. Answers of this checkpoint are noise, as long as they are asked to be.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import cluster_overhead, cpu_time, machine
from benchmarks.lib.goodput import KINDS, Slo, rounded
from benchmarks.lib.load_clients import DENSE, SPARSE
from benchmarks.lib.load_levels import Level, LoadRunner, Outcome, make_videos
from benchmarks.lib.midsize_checkpoint import Recipe, default_cache, make_checkpoint
from benchmarks.lib.report import Report, progress
from benchmarks.lib.stopwatch import Repeats
from sparsevila_cluster.core.cluster_config import ClusterConfig, build_cluster_config
from sparsevila_cluster.demo.served_cluster import serving

Row = dict[str, Any]
# Goodput hangs on how strict the SLO is: it is told for these, too.
SLO_SCALES = (1.5, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Plan:
    """What to measure. num_known: videos that are prepared before the loads; slo_scale: times the dense configuration's medians;
    limit_s: for one load; decodes: decode workers.
    """

    frames: int = 64
    num_tokens: int = 16
    num_turns: int = 3
    num_known: int = 2
    levels: tuple[Level, ...] = (
        Level(4, 2, clients=1),
        Level(4, 1, clients=2),
        Level(8, 1, clients=4),
        Level(12, 2, clients=8),
        Level(8, 1, share=0.5),
        Level(8, 1, share=0.9),
    )
    overhead: cluster_overhead.OverheadPlan = cluster_overhead.OverheadPlan()
    slo_scale: float = 3.0
    limit_s: float = 900.0
    decodes: int = 2


QUICK = Plan(
    frames=16,
    num_tokens=12,
    levels=(Level(4, 2, clients=1), Level(6, 1, clients=4), Level(5, 1, share=0.7)),
    overhead=cluster_overhead.OverheadPlan(
        num_tokens=12,
        alone=Repeats(least=2, most=5, budget_s=12.0),
        crowded=Repeats(least=1, most=2, budget_s=8.0),
    ),
)


async def measure(
    target: str, config: ClusterConfig, videos: Sequence[Path], plan: Plan, say: Callable[[str], None]
) -> tuple[cluster_overhead.Overhead, list[Outcome]]:
    known, new = videos[: plan.num_known], videos[plan.num_known :]
    loads = LoadRunner(target, known, new, plan.num_turns, plan.num_tokens, plan.limit_s)
    say("prepare the known videos")
    await loads.prepare()
    cost = await cluster_overhead.measure(target, config, known, plan.overhead, say)
    for level in plan.levels:
        await loads.run(level, say)
    return cost, loads.outcomes


# ---- what comes of it ----------------------------------------------------------------------------------------------------------


def slo_of(outcomes: Sequence[Outcome], scale: float) -> Slo:
    """By the dense configuration, for the fewest clients at a time."""
    calm = min((one for one in outcomes if one.variant == DENSE.name and one.level.clients), key=lambda one: one.level.clients)
    return Slo.of(calm.run.turns, scale)


def load_rows(outcomes: Sequence[Outcome], slo: Slo) -> list[Row]:
    rows: list[Row] = []
    for one in outcomes:
        run = one.run
        rows.append(
            {
                "load": one.level.name,
                "variant": one.variant,
                "conversations": one.level.num,
                "turns": len(run.turns),
                "failed": run.num_failed,
                "elapsed_s": rounded(run.elapsed_s),
                "tokens_per_s": rounded(run.tokens_per_s),
                "goodput_per_s": rounded(run.goodput(slo)),
                "good_share": rounded(sum(map(slo.is_met, run.turns)) / len(run.turns)),
                "prefills": one.prefills,
                "lane_bytes": one.lane_bytes,
                **run.times(),
            }
        )
    return rows


def goodput_rows(outcomes: Sequence[Outcome], scales: Sequence[float]) -> list[Row]:
    """Good turns per second of each configuration at its best load, by how many times calm medians the SLO allows."""
    rows: list[Row] = []
    for scale in scales:
        slo = slo_of(outcomes, scale)
        best = {name: max(one.run.goodput(slo) for one in outcomes if one.variant == name) for name in (SPARSE.name, DENSE.name)}
        ratio = best[SPARSE.name] / best[DENSE.name] if best[DENSE.name] else None
        told = {f"{name}_per_s": rounded(value) for name, value in best.items()}
        rows.append({"slo_scale": scale, **told, "ratio": rounded(ratio)})
    return rows


def figures(outcomes: Sequence[Outcome], scale: float) -> dict[str, float]:
    """Of the loads. Goodput at each configuration's best load; the share where one client at a time is served."""
    (goodput,) = goodput_rows(outcomes, (scale,))
    found = {"goodput_vs_dense": goodput["ratio"]}
    for one in outcomes:
        if one.level.clients == 1 and one.variant == SPARSE.name:
            times = one.run.times()
            cold_ms, later_ms = times["ttft_cold_p50_ms"], times["ttft_later_p50_ms"]
            found["warm_ttft_share_of_cold"] = round(later_ms / cold_ms, 4) if cold_ms and later_ms else None
    return {name: value for name, value in found.items() if value is not None}


def show(report: Report, cost: cluster_overhead.Overhead, rows: Sequence[Row], goodputs: Sequence[Row], slo: Slo) -> None:
    def table(title: str, of: Sequence[Row], columns: dict[str, str]) -> None:
        report.show_table(title, list(columns.values()), [[row[name] for name in columns] for row in of])

    each = {"ttft_p50_ms": "TTFT p50 ms", "ttft_p95_ms": "p95", "token_p50_ms": "per token p50 ms", "token_p95_ms": "p95"}
    head = {"way": "way", **each, "tokens_per_s": "tokens/s in a crowd"}
    table("The same turns three ways, one conversation at a time", cost.rows(), head)
    report.say(f"\n{cost.num_equal} of {len(cost.pairs)} answers through the cluster equal the engine's.")
    head = {"process": "process", "cpu_ms_per_token": "CPU ms per token in a crowd"}
    table("Processor time through the cluster", cost.cpu_rows(), head)
    times = {f"ttft_{kind}": f"{kind} TTFT" for kind in KINDS} | {"tpot": "TPOT", "e2e": "e2e"}
    head = {"load": "load", "variant": "variant", "turns": "turns", "failed": "failed"}
    for name, title in times.items():
        head |= {f"{name}_p50_ms": f"{title} p50", f"{name}_p95_ms": "p95"}
    table("Load: what clients waited for, in ms", rows, head)
    head = {"load": "load", "variant": "variant", "elapsed_s": "seconds", "tokens_per_s": "tokens/s"}
    head |= {"goodput_per_s": "good turns/s", "good_share": "good share", "prefills": "prefills", "lane_mb": "MB over lanes"}
    table("Load: what the cluster did", [{**row, "lane_mb": row["lane_bytes"] / 1e6} for row in rows], head)
    limits = ", ".join(f"{kind} TTFT {limit_ms:.0f} ms" for kind, limit_ms in slo.ttft_ms.items())
    report.say(f"\nA good turn keeps {limits}, and {slo.tpot_ms:.0f} ms per token.")
    head = {"slo_scale": "SLO / calm dense", "sparse_per_s": "sparse", "dense_per_s": "dense", "ratio": "sparse/dense"}
    table("Good turns per second at the best load, by SLO", goodputs, head)


# ---- the command ---------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter videos, fewer loads: a minute and a half on two cores")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the checkpoint is kept (620 MB)")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, toy: tuple[Recipe, Plan] | None = None) -> None:
    """`toy`: another model, measured in another way; for tests."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = parse(argv)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster is ended on the way out
    try:
        _main(options, *(toy or (Recipe(), QUICK if options.quick else Plan())))
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(options: argparse.Namespace, recipe: Recipe, plan: Plan) -> None:
    torch.set_num_threads(machine.physical_cores())
    start_s = time.perf_counter()
    report = Report("serving", machine.card(), quiet=options.json)
    with progress() as say, tempfile.TemporaryDirectory(prefix="serving-") as folder:
        report.show_card()
        say("mid-size checkpoint")
        directory = make_checkpoint(options.cache, recipe)
        num_videos = plan.num_known + sum(level.num_new for level in plan.levels)
        videos = make_videos(Path(folder), num_videos, plan.frames, recipe.frame_px, say)
        config = build_cluster_config(
            engine={"model": str(directory), "device": "cpu", "max_frames": plan.frames},
            transport={"kind": "gloo"},
            decode={"replicas": plan.decodes},
            door={"port": 0},
        )
        with serving(config, lambda stage, done, total: say(stage)) as target:
            ready_s = time.perf_counter() - start_s
            neighbours, ours_s, began_s = machine.Neighbours(), cpu_time.cluster_cpu_s(), time.perf_counter()
            cost, outcomes = asyncio.run(measure(target, config, videos, plan, say))
            ours = (cpu_time.cluster_cpu_s() - ours_s) / (time.perf_counter() - began_s)
            busy = neighbours.cores()  # the cluster's are not of this process either
            say("end the cluster")
    if busy is not None:
        report.machine["cores_busy_with_others"] = round(max(0.0, busy - ours), 2)
    slo = slo_of(outcomes, plan.slo_scale)
    rows, goodputs = load_rows(outcomes, slo), goodput_rows(outcomes, SLO_SCALES)
    report.say(
        f"\n{config.prefill.replicas} prefill and {config.decode.replicas} decode workers of {config.decode.threads} thread, ready "
        f"after {ready_s:.0f} s; videos of {plan.frames} frames, {plan.num_turns} turns of {plan.num_tokens} tokens."
    )
    show(report, cost, rows, goodputs, slo)
    report.figures = figures(outcomes, plan.slo_scale) | cost.figures()
    limits = {f"ttft_{kind}_ms": rounded(ms) for kind, ms in slo.ttft_ms.items()} | {"tpot_ms": rounded(slo.tpot_ms)}
    parts = {"overhead": cost.rows(), "cpu": cost.cpu_rows(), "load": rows, "goodput": goodputs, "slo": [limits]}
    report.rows = [{"part": part, **row} for part, told in parts.items() for row in told]
    report.show_figures()
    if busy is not None:
        report.say(f"\nOther processes kept {report.machine['cores_busy_with_others']} of {report.machine['cores']} cores busy.")
    report.finish(options.save)


if __name__ == "__main__":
    main()
