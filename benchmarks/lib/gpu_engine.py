"""The engines on a GPU, with random weights of Qwen2.5-VL-7B's shape made on it. `python -m benchmarks.lib.gpu_engine`.

    bfloat16 and AWQ (4 bits, groups of 128)   x   64 and 256 frames of 364 x 364   x   dense and sparse (0.25 / 0.10)
        encode, prune, prefill, question, retrieve;  steps of 1, 4 and 16 conversations
    bfloat16, 64 frames, dense                 steps with CUDA graphs, without them, and without kernels

Bounds: operations at the measured rate of bfloat16 products, bytes at the measured rate of reading, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import device_clock
from benchmarks.lib.engine_comparison import EngineComparison, Plan
from benchmarks.lib.engine_pair import EnginePair, endless, time_round
from benchmarks.lib.flop_counts import four_bit_width
from benchmarks.lib.machine import Ceilings
from benchmarks.lib.midsize_checkpoint import Recipe, make_media
from benchmarks.lib.random_weights import SEVEN_B, RandomCheckpoint
from benchmarks.lib.report import Report
from benchmarks.lib.stopwatch import Repeats, Times
from benchmarks.lib.timing_table import Ledger, columns, show
from sparsevila_cluster.models import Model, load_model

BF16, AWQ = "bf16", "awq"
# Of the engine's config; of `load_model`.
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "graphs": ({}, {}),
    "no graphs": ({"decode_graphs": "none"}, {}),
    "no kernels": ({"decode_graphs": "none"}, {"attention": "torch"}),
}


@dataclass(frozen=True)
class Setting:
    """What is measured. dtype: of activations and of dense weights; ceilings of it bound the times."""

    recipe: Recipe
    group_size: int
    dtype: str
    plan: Plan


ONCE = Repeats(least=1, most=1, budget_s=1.0)
FULL = Setting(
    SEVEN_B,
    128,
    "bfloat16",
    Plan(
        frames=(64, 256), batches=(1, 4, 16), encode_frames=256, num_tokens=16, sessions=Repeats(least=2, most=4, budget_s=10.0),
        encodes=Repeats(least=2, most=5, budget_s=4.0), rounds=8, block=4, long_frames=0,
    ),
)  # fmt: skip
TOY = Setting(
    Recipe(
        hidden=128, num_layers=2, num_heads=2, num_kv_heads=1, intermediate=192, vocab=400, vision_hidden=32, vision_layers=2,
        vision_heads=2, vision_intermediate=48, full_layers=(1,), patch_px=8, window_px=48, frame_px=80,
    ),
    32,
    "float32",
    Plan(frames=(4, 8), batches=(1, 3), encode_frames=8, num_tokens=4, sessions=ONCE, encodes=ONCE, rounds=1, block=2,
         long_frames=0),
)  # fmt: skip


class Run:
    """Both models on one device_clock, into one ledger, until the time is up."""

    def __init__(self, setting: Setting, target: torch.device, tell: Callable[[str], None], stop_at_s: float):
        self.setting, self.device, self.tell = setting, target, tell
        self.ledger = Ledger()
        self._stop_at_s = stop_at_s
        self._contest = EngineComparison(self.ledger, tell, lambda text: None)

    @property
    def out_of_time(self) -> bool:
        return time.perf_counter() > self._stop_at_s

    def load(self, name: str, folder: Path, **how: Any) -> Model:
        """Random weights, the same numbers in both models; its row says what the model takes."""
        group = self.setting.group_size if name == AWQ else 0
        begun_s = time.perf_counter()
        checkpoint = RandomCheckpoint.make(self.setting.recipe, folder / name, group_size=group)
        model = load_model(checkpoint, device=self.device, dtype=self.setting.dtype, **how)
        took_s = round(time.perf_counter() - begun_s, 2)
        row = {"model": name, "frames": 0, "batch": 0, "stage": "weights", "variant": "all"}
        self.ledger.rows.append(row | {"weight_bytes": model.weight_bytes, "took_s": took_s})
        self.tell(f"{name}: {model.weight_bytes / 1e9:.2f} GB of weights, made in {took_s:.1f} s")
        return model

    def comparison(self, name: str, model: Model, frames: int) -> None:
        """Lives and steps of one model on one video."""
        video = make_media(frames, self.setting.recipe.frame_px)
        self._contest.measure(name, None, model, [video], self.setting.plan, matrix_width=self._matrix_width(name))
        self.clean()

    def switches(self, name: str, model: Model, frames: int, folder: Path) -> None:
        """Steps of dense conversations, the engine's switches one after the other turned off."""
        plan, batches = self.setting.plan, (self.setting.plan.batches[0], self.setting.plan.batches[-1])
        video = make_media(frames, self.setting.recipe.frame_px)
        rows = model.family.patchify(video).num_tokens + 64
        for switch, (knobs, loading) in SWITCHES.items():
            if loading:
                model = self.load(f"{name}, {switch}", folder, **loading)
            with endless(model):
                pair = EnginePair(model, "dense", rows, 1 + batches[-1], self._matrix_width(name), **knobs)
                prefix, _ = pair.prepare(video)
                for batch in batches:
                    pair.fill(prefix, batch, plan.rounds * (plan.block + 1) + 4)
                    times = {switch: Times()}
                    for _ in range(plan.rounds):
                        time_round({switch: pair}, times, plan.block)
                    work = pair.shape.step(batch, prefix.length)
                    self.ledger.add(name, frames, "step", switch, times[switch], batch=batch, work=work)
                    pair.forget(keep=prefix)
            del pair, prefix
            self.clean()

    def clean(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _matrix_width(self, name: str) -> float:
        return four_bit_width(self.setting.group_size) if name == AWQ else 0.0


def figures(ledger: Ledger, plan: Plan) -> dict[str, float]:
    """Dense over sparse, bfloat16 over AWQ, and the share of its bound that a step reaches; what was not measured is absent."""
    found: dict[str, float | None] = {}
    for frames in plan.frames:
        for name in (BF16, AWQ):
            found[f"{name}_prefill_speedup_{frames}f"] = ledger.ratio(name, frames, "prune+prefill", "dense", "sparse")
            found[f"{name}_e2e_speedup_{frames}f"] = ledger.ratio(name, frames, "end to end", "dense", "sparse")
        for batch in plan.batches:
            for name in (BF16, AWQ):
                found[f"{name}_decode_speedup_{frames}f_b{batch}"] = ledger.ratio(name, frames, "step", "dense", "sparse", batch)
            steps = {(name, v): ledger.find(name, frames, "step", v, batch) for name in (BF16, AWQ) for v in ("dense", "sparse")}
            for (name, variant), row in steps.items():
                if row is not None and batch == plan.batches[0]:
                    found[f"{name}_{variant}_step_share_of_bound_{frames}f_b{batch}"] = row.get("share_of_bound")
            for variant in ("dense", "sparse"):
                plain, quantised = steps[BF16, variant], steps[AWQ, variant]
                if plain is not None and quantised is not None:
                    found[f"awq_{variant}_step_speedup_{frames}f_b{batch}"] = round(plain["ms"] / quantised["ms"], 4)
    return {name: value for name, value in found.items() if value is not None}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.gpu_engine", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="a tiny model, to see that it runs; also on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="S", help="begin no further part after so many seconds")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also append every row to FILE as soon as it is measured")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    stop_at_s = time.perf_counter()
    options = parse(argv)
    stop_at_s += options.stop_after
    setting = TOY if options.toy else FULL
    target = device_clock.choose(options.device)
    found = device_clock.ceilings(target, (setting.dtype,), 0.05 if options.toy else 1.0)
    report = Report("gpu_engine", device_clock.card(target, found), quiet=options.json)
    report.show_card()
    run = Run(setting, target, report.say, stop_at_s)
    written = 0

    def keep_rows() -> None:
        nonlocal written
        run.ledger.settle(found[setting.dtype])
        if options.rows is not None:
            with options.rows.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in run.ledger.rows[written:])
        written = len(run.ledger.rows)

    with tempfile.TemporaryDirectory() as folder:
        models = {name: run.load(name, Path(folder)) for name in (BF16, AWQ)}
        parts: list[Callable[[], None]] = []
        for frames in setting.plan.frames:
            parts += [partial(run.comparison, name, model, frames) for name, model in models.items()]
        parts.append(partial(run.switches, BF16, models[BF16], setting.plan.frames[0], Path(folder)))
        for number, part in enumerate(parts):
            if run.out_of_time:
                report.say(f"out of time: {len(parts) - number} of {len(parts)} parts left")
                break
            part()
            keep_rows()
    finish(report, run.ledger, setting.plan, found[setting.dtype], options.save)


def finish(report: Report, ledger: Ledger, plan: Plan, ceilings: Ceilings, folder: Path | None) -> None:
    ledger.settle(ceilings)
    for name in (BF16, AWQ):
        if any(row["model"] == name and row["stage"] == "memory" for row in ledger.rows):
            show(report, ledger, name)
    head = ("model", "frames", "batch", "variant", "ms", "best_ms", "bound_ms", "share_of_bound")
    body = columns([row for row in ledger.rows if row["variant"] in SWITCHES], *head)
    if body:
        report.show_table("steps, by the engine's switches", head, body)
    report.rows, report.figures = ledger.rows, figures(ledger, plan)
    report.show_figures()
    report.finish(folder)


if __name__ == "__main__":
    main()
