"""Decoding with weights of 4 bits against the same weights in bfloat16, on a CPU: per token, through the whole engine.

    random numbers -> bfloat16            -> loader -> lean decoder -> decode engine: steps of 1 and 4 conversations
                   -> AutoAWQ's 4 bits    -> loader -> lean decoder -> decode engine: the same

The quantised model is not compared in what it says (`sparsevila quantize --compare` does that), only in time and memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import machine
from benchmarks.lib.engine_pair import EnginePair, endless, time_round
from benchmarks.lib.flop_counts import four_bit_width
from benchmarks.lib.midsize_checkpoint import Recipe, make_media
from benchmarks.lib.random_weights import RandomCheckpoint
from benchmarks.lib.report import Report
from benchmarks.lib.stopwatch import Times
from benchmarks.lib.timing_table import Ledger, percent
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models import Model, load_model

NAME = "text-0.9b"
# 16 layers of 2048: 721 M weights in the layers' matrices, 67 M in the head and as many in the embedding.
RECIPE = Recipe(
    hidden=2048, num_layers=16, num_heads=16, num_kv_heads=4, intermediate=5632, vocab=32768, vision_layers=2, full_layers=(1,)
)
GROUP_SIZE = 128
FRAMES = 4
BATCHES = (1, 4)
BLOCK = 2
HEAD = ("batch", "bfloat16 ms", "4 bits ms", "bfloat16 / 4 bits", "spread", "bfloat16 bound", "4 bits bound")


def usable() -> bool:
    """Whether this CPU has what torch's int4 matmul is fast with."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def measure(
    ledger: Ledger, say: Callable[[str], None], recipe: Recipe = RECIPE, group_size: int = GROUP_SIZE, rounds: int = 12
) -> None:
    """Steps of both forms, in turns, into `ledger`."""
    video = make_media(FRAMES, recipe.frame_px)
    pairs: dict[str, EnginePair] = {}
    prefixes: dict[str, MediaPrefix] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for form, group in (("bfloat16", 0), ("w4", group_size)):
            say(f"{NAME}: {form}, loading")
            model, loaded = _load(RandomCheckpoint.make(recipe, Path(folder) / form, group_size=group))
            ledger.rows.append({"model": NAME, "frames": FRAMES, "batch": 0, "stage": "weights", "variant": form, **loaded})
            stack.enter_context(endless(model))
            rows, width = model.family.patchify(video).num_tokens + 64, four_bit_width(group) if group else 0.0
            pairs[form] = EnginePair(model, "dense", rows, 1 + BATCHES[-1], width)
            prefixes[form], _ = pairs[form].prepare(video)
        for batch in BATCHES:
            say(f"{NAME}: steps of a batch of {batch}")
            num_tokens = rounds * (BLOCK + 1)
            times = {form: Times() for form in pairs}
            for form, pair in pairs.items():
                pair.fill(prefixes[form], batch, num_tokens + 4)
            for _ in range(rounds):
                time_round(pairs, times, BLOCK)
            for form, pair in pairs.items():
                work = pair.shape.step(batch, prefixes[form].length + num_tokens // 2)
                ledger.add(NAME, FRAMES, "step", form, times[form], batch=batch, work=work)
                pair.forget(keep=prefixes[form])


def figure(ledger: Ledger, by: str = "ms") -> dict[str, float]:
    """Time of a step in bfloat16 / in 4 bits, one conversation; absent where it was not measured."""
    ratio = ledger.ratio(NAME, FRAMES, "step", "bfloat16", "w4", 1, by=by)
    return {} if ratio is None else {"w4_decode_speedup_b1": ratio}


def show(report: Report, ledger: Ledger) -> None:
    body = []
    for batch in BATCHES:
        dense, quantised = (ledger.find(NAME, FRAMES, "step", form, batch) for form in ("bfloat16", "w4"))
        if dense is not None and quantised is not None:
            spread = percent(max(dense["spread"], quantised["spread"]))
            bounds = [row.get("bound_ms") for row in (dense, quantised)]
            body.append([batch, dense["ms"], quantised["ms"], dense["ms"] / quantised["ms"], spread, *bounds])
    if body:
        report.show_table(f"{NAME}: decode steps on bfloat16 weights and on the same in 4 bits", HEAD, body)
        mine = [row for row in ledger.rows if row["model"] == NAME and row["stage"] == "weights"]
        lines = [[row["variant"], row["weight_bytes"] / 1e6, row.get("load_peak_bytes", 0) / 1e6 or None] for row in mine]
        report.show_table(f"{NAME}: memory, MB", ("weights", "weights MB", "most while loading"), lines)


def _load(checkpoint: RandomCheckpoint) -> tuple[Model, dict[str, Any]]:
    """The model in bfloat16, and the bytes that it takes: its weights, and the most that loading took."""
    known = machine.reset_peak_rss()
    before = machine.peak_rss_bytes()
    model = load_model(checkpoint, device="cpu", dtype="bfloat16")
    loaded: dict[str, Any] = {"weight_bytes": model.weight_bytes}
    if known:
        loaded["load_peak_bytes"] = machine.peak_rss_bytes() - before
    return model, loaded
