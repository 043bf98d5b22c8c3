"""How fast the engines are: dense, sparse, and transformers' `generate` on the same weights. `python -m benchmarks.engine`.

    mid-size random checkpoint, 16, 64 and 256 frames   sessions: media in memory -> prefix -> question -> answer -> second question
    demo model, one of its own videos                   steps: batches of 1, 4 and 8 conversations, each on a prefix of its own
    mid-size, 512 frames from a file                    memory: the most that a process of its own held (`benchmarks.longvideo`)
    two films of ten minutes (`benchmarks.seeking`)     64 frames of each, by decoding every frame and by seeking
    random text model of 0.9 B (`lib.w4_decode`)        steps on bfloat16 weights and in 4 bits, where there is AVX-512

Variants take turns within a round; a time is the median over rounds, a figure the ratio of two medians. `hf` is given the pixels
that our preprocessing makes, and its end to end includes that. `dense` is this package with everything kept, so that dense/sparse
shows sparsity alone and hf/dense the engine alone.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import longvideo, seeking
from benchmarks.lib import device_clock, machine, w4_decode
from benchmarks.lib.engine_comparison import EngineComparison, Plan
from benchmarks.lib.flop_counts import TextShape
from benchmarks.lib.midsize_checkpoint import Recipe, default_cache, make_checkpoint, make_media
from benchmarks.lib.report import Report, progress
from benchmarks.lib.stopwatch import Repeats
from benchmarks.lib.timing_table import Ledger, show
from sparsevila_cluster.core.config import EngineConfig, MediaLimits
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.media import Media, open_media
from sparsevila_cluster.models import load_model

MID, DEMO = "mid-size", "demo"
W4_TOY_GROUP = 32


QUICK = Plan(
    frames=(16, 64),
    num_tokens=16,
    sessions=Repeats(least=1, most=3, budget_s=10.0),
    encodes=Repeats(least=2, most=5, budget_s=6.0),
    rounds=5,
    long_frames=0,
)
# How the small model is measured: what is short can be repeated.
OFTEN: dict[str, Any] = {
    "sessions": Repeats(least=9, most=31, budget_s=10.0),
    "encodes": Repeats(least=9, most=31, budget_s=5.0),
    "rounds": 16,
    "block": 8,
}


def figures(ledger: Ledger, demo_frames: int | None, by: str = "ms") -> dict[str, float]:
    """The figures that others read, by name, of medians (ms) or best times (best_ms); what was not measured is absent."""
    salience = ledger.find(MID, 64, "encode", "with salience")
    ratio = partial(ledger.ratio, by=by)
    found: dict[str, float | None] = {
        "prefill_speedup_64f": ratio(MID, 64, "prune+prefill", "dense", "sparse"),
        "prefill_speedup_256f": ratio(MID, 256, "prune+prefill", "dense", "sparse"),
        **{f"decode_speedup_b{b}": ratio(MID, 64, "step", "dense", "sparse", b) for b in (1, 4, 8)},
        "e2e_speedup_64f": ratio(MID, 64, "end to end", "dense", "sparse"),
        **{f"demo_decode_vs_hf_b{b}": ratio(DEMO, demo_frames or 0, "step", "hf", "dense", b) for b in (1, 8)},
        "mid_decode_vs_hf_b1": ratio(MID, 64, "step", "hf", "dense"),
        "salience_share_of_encode": salience["salience_share"] if salience else None,
        "turn2_ttft_share_of_cold": ratio(MID, 64, "first token, turn 2", "sparse", "sparse", under_stage="first token, cold"),
        **seeking.figures(ledger, by),
        **w4_decode.figure(ledger, by),
    }
    return {name: value for name, value in found.items() if value is not None}


def demo_media() -> Media:
    """A video of the demo world, through MP4 and sampling like any other."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.mp4"
        write_mp4(make_video(0)[1], path)
        return open_media(MediaSource(str(path)), fps=2.0, max_frames=64, limits=MediaLimits())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer frames and rounds: about two minutes on two cores")
    parser.add_argument("--frames", help="comma-separated numbers of frames of the mid-size model (default 16,64,256)")
    parser.add_argument("--threads", type=int, default=machine.physical_cores(), help="of torch (default: physical cores)")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where checkpoint and films are kept (670 MB)")
    parser.add_argument("--model", default="demo", help="checkpoint of the second part (default: the bundled model)")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, toy: tuple[Recipe, Plan] | None = None) -> None:
    """`toy`: another mid-size model, measured in another way; for tests."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = parse(argv)
    torch.set_num_threads(options.threads)
    recipe, plan = toy or (Recipe(), QUICK if options.quick else Plan())
    if options.frames:
        plan = replace(plan, frames=tuple(int(n) for n in options.frames.split(",")))
    neighbours = machine.Neighbours()
    with progress() as say:
        say("ceilings of this machine")
        ceilings = machine.measure_ceilings()
        report = Report("engine", machine.card(ceilings), quiet=options.json)
        report.show_card()
        ledger = Ledger()
        comparison = EngineComparison(ledger, report.say, say)
        say("mid-size checkpoint")
        directory = make_checkpoint(options.cache, recipe)
        model = load_model(directory, device="cpu")
        report.say(f"{MID}: {TextShape.of(model.config).num_parameters / 1e6:.0f} M text parameters, {directory.name}")
        todo = longvideo.cases(plan.long_frames, recipe.frame_px) if plan.long_frames else ()
        long_rows = longvideo.measure(directory, todo, options.threads, say, report.say)
        videos = [make_media(frames, recipe.frame_px) for frames in plan.frames]
        comparison.measure(MID, directory, model, videos, plan, hf_batches=(1,))
        directory = EngineConfig(model=options.model).model_dir
        demo_frames = None
        if directory.is_dir():
            model = load_model(directory, device="cpu")
            video = demo_media()
            demo_frames = len(video.frames)
            demo_plan = plan if toy else replace(plan, **OFTEN)
            comparison.measure(DEMO, directory, model, [video], demo_plan, hf_batches=demo_plan.batches)
        else:
            report.say(f"{DEMO}: no checkpoint at {directory}")
        seeking.measure(ledger, options.cache, seeking.TOY if toy else seeking.FILMS, plan.sessions, say)
        if w4_decode.usable():
            w4_decode.measure(ledger, say, *((recipe, W4_TOY_GROUP, 1) if toy else ()))
            say("ceilings of this machine in bfloat16")
            in_bfloat16 = device_clock.ceilings(torch.device("cpu"), ("bfloat16",), 0.05 if toy else 1.0)["bfloat16"]
        else:
            report.say(f"{w4_decode.NAME}: no AVX-512 here, so that no int4 matmul is fast; not measured")
        say("ceilings of this machine, again")
        ceilings |= machine.measure_ceilings()
    report.machine |= asdict(ceilings)
    report.machine["cores_busy_with_others"] = neighbours.cores()
    ledger.settle(ceilings)
    if w4_decode.usable():
        report.machine["matmul_gflops_bfloat16"] = in_bfloat16.matmul_gflops
        ledger.settle(in_bfloat16 | replace(ceilings, matmul_gflops=0.0), w4_decode.NAME)
    for name in (MID, DEMO) if demo_frames else (MID,):
        show(report, ledger, name)
    seeking.show(report, ledger)
    w4_decode.show(report, ledger)
    if long_rows:
        report.show_table(longvideo.TITLE, longvideo.HEAD, longvideo.table(long_rows))
    report.rows = ledger.rows + long_rows
    report.figures = figures(ledger, demo_frames) | longvideo.figure(long_rows)
    best = figures(ledger, demo_frames, by="best_ms")
    body = [[name, value, best.get(name)] for name, value in report.figures.items()]
    report.show_table("Figures", ("name", "value", "of best times"), body)
    report.say(f"\nOther processes kept {report.machine['cores_busy_with_others']} of {report.machine['cores']} cores busy.")
    report.finish(options.save)


if __name__ == "__main__":
    main()
