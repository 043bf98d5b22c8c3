"""How fast the engines are: dense, sparse, and transformers' `generate` on the same weights. `python -m benchmarks.engine`.

Knows: what is measured, in which order, and which figures come of it. Does not know: how an engine or a peer is driven.

    mid-size random checkpoint, 16, 64 and 256 frames   lives: media in memory -> prefix -> question -> answer -> second question
    demo model, one of its own videos                   steps: batches of 1, 4 and 8 conversations, each on a prefix of its own

Variants take turns within a round; a time is the median over rounds, a figure the ratio of two medians. `hf` is given the pixels
that our preprocessing makes, and its end to end includes that. `dense` is this package with everything kept, so that dense/sparse
shows sparsity alone and hf/dense the engine alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.bounds import TextShape, encode_work
from benchmarks.hf_peer import Peer
from benchmarks.ledger import HEAD, Ledger, percent
from benchmarks.midsize import Recipe, default_cache, make_checkpoint, make_media
from benchmarks.report import Report, progress
from benchmarks.stopwatch import Patience, Times, in_turns
from benchmarks.subject import QUESTION, VARIANTS, Life, Stand, endless, time_round
from sparsevila_cluster.config import EngineConfig, MediaLimits
from sparsevila_cluster.demo.world import make_video, write_mp4
from sparsevila_cluster.media import Media, open_media
from sparsevila_cluster.models import Model, load_model
from sparsevila_cluster.request import MediaSource

MID, DEMO = "mid-size", "demo"


@dataclass(frozen=True)
class Plan:
    """What to measure. hf_frames: the longest video that `generate` is given; encode_frames: the longest that is encoded with and
    without salience; `block` steps of one variant, then the next, `rounds` times."""

    frames: tuple[int, ...] = (16, 64, 256)
    batches: tuple[int, ...] = (1, 4, 8)
    hf_frames: int = 64
    encode_frames: int = 64
    num_tokens: int = 32
    lives: Patience = Patience(least=2, most=5, budget_s=150.0)
    encodes: Patience = Patience(least=5, most=15, budget_s=25.0)
    rounds: int = 10
    block: int = 2


QUICK = Plan(
    frames=(16, 64),
    num_tokens=16,
    lives=Patience(least=1, most=3, budget_s=10.0),
    encodes=Patience(least=2, most=5, budget_s=6.0),
    rounds=5,
)
# How the small model is measured: what is short can be repeated.
OFTEN = {
    "lives": Patience(least=9, most=31, budget_s=10.0),
    "encodes": Patience(least=9, most=31, budget_s=5.0),
    "rounds": 16,
    "block": 8,
}


class Bench:
    """Measures one model after another into one ledger."""

    def __init__(self, report: Report, ledger: Ledger, say):
        self.report, self.ledger, self.say = report, ledger, say

    def measure(self, name: str, directory: Path, model: Model, media: Sequence[Media], plan: Plan, hf_batches: tuple[int, ...]):
        """Everything about one model. `hf_batches`: batch sizes in which `generate` is asked for steps."""
        self.say(f"{name}: loading")
        peer = Peer(directory, model)
        with endless(model):
            for video in media:
                frames = len(video.frames)
                if frames <= plan.encode_frames:
                    self._encode(name, model, video, plan)
                with_peer = peer if frames <= plan.hf_frames else None
                room = self._room(model, video, plan)
                num = 1 + max(room, default=0)
                stands = {variant: Stand(model, variant, rows, num) for variant, rows in self._rows(model, video)}
                lives = self._lives(name, stands, video, plan, with_peer)
                for batch in room:
                    self._steps(name, stands, lives, video, batch, plan, with_peer if batch in hf_batches else None)
                self._memory(name, frames, stands, lives)

    # ---- one video ---------------------------------------------------------------------------------------------------------

    def _rows(self, model: Model, video: Media) -> list[tuple[str, int]]:
        """Rows of a media prefix, at most, by variant."""
        dense = model.family.patchify(video).num_tokens + 64
        return [(variant, dense if variant == "dense" else dense // 3 + 64) for variant in VARIANTS]

    def _room(self, model: Model, video: Media, plan: Plan) -> tuple[int, ...]:
        """The batch sizes whose prefixes fit into half of the free memory."""
        one = sum(rows for _, rows in self._rows(model, video)) * model.spec.bytes_per_token
        fits = tuple(batch for batch in plan.batches if (1 + batch) * one < machine.free_bytes() / 2)
        if fits != plan.batches:
            self.report.say(f"{len(video.frames)} frames: too little memory for all batches; measured: {fits}")
        return fits

    def _encode(self, name: str, model: Model, video: Media, plan: Plan) -> None:
        """The vision tower by itself, with and without salience."""
        frames, family = len(video.frames), model.family
        self.say(f"{name}, {frames} frames: encode")
        inputs = family.patchify(video)
        works = {
            "patchify": lambda: family.patchify(video),
            "plain": lambda: family.encode([inputs], capture=False),
            "with salience": lambda: family.encode([inputs], capture=True),
        }
        times = in_turns(works, plan.encodes)
        work = encode_work(model.config, inputs.grid, model.spec.dtype.itemsize)
        self.ledger.add(name, frames, "patchify", "plain", times["patchify"])
        self.ledger.add(name, frames, "encode", "plain", times["plain"], work=work, visual_tokens=inputs.num_tokens)
        pairs = zip(times["with salience"].samples_ms, times["plain"].samples_ms, strict=True)
        share = statistics.median(1 - without / with_salience for with_salience, without in pairs)
        self.ledger.add(name, frames, "encode", "with salience", times["with salience"], salience_share=round(share, 4))

    def _lives(self, name: str, stands: dict[str, Stand], video: Media, plan: Plan, peer: Peer | None) -> dict[str, Life]:
        frames = len(video.frames)
        times: dict[tuple[str, str], Times] = {}
        lives: dict[str, Life] = {}
        for number in plan.lives.rounds():
            for variant, stand in stands.items():
                self.say(f"{name}, {frames} frames: round {number + 1}, {variant}")
                life = lives[variant] = stand.live(video, plan.num_tokens)
                for stage, ms in life.ms.items():
                    times.setdefault((stage, variant), Times()).add(ms)
            if peer is not None:
                self.say(f"{name}, {frames} frames: round {number + 1}, generate")
                made = peer.live(video, QUESTION, plan.num_tokens)
                for stage, ms in (("first token, cold", made.first_ms), ("end to end", made.total_ms)):
                    times.setdefault((stage, "hf"), Times()).add(ms)
        for (stage, variant), found in times.items():
            work = stands[variant].work(lives[variant]) if variant in stands else {}
            more = {"equal_tokens": equal_tokens(lives["dense"].tokens, made.tokens)} if variant == "hf" else {}
            self.ledger.add(name, frames, stage, variant, found, work=work.get(stage), **more)
        if peer is not None:
            same = equal_tokens(lives["dense"].tokens, made.tokens)
            self.report.say(f"{name}, {frames} frames: {same} of {plan.num_tokens} dense tokens equal generate's")
        return lives

    def _steps(
        self, name: str, stands: dict[str, Stand], lives: dict[str, Life], video: Media, batch: int, plan: Plan, peer: Peer | None
    ) -> None:
        """One decode step over `batch` conversations; between `generate`'s own tokens where there is a peer."""
        frames, rounds, block = len(video.frames), plan.rounds, plan.block
        self.say(f"{name}, {frames} frames: steps of a batch of {batch}")
        num_steps = rounds * (block + 1)
        times = {variant: Times() for variant in stands}
        for variant, stand in stands.items():
            stand.fill(lives[variant].prefix, batch, num_steps + 4)
        if peer is None:
            for _ in range(rounds):
                time_round(stands, times, block)
        else:
            inputs = peer.inputs(video, QUESTION, batch)
            times["hf"] = peer.generate(inputs, num_steps + 1, lambda: time_round(stands, times, block), block).steps
        for variant, found in times.items():
            stand = stands.get(variant)
            work = stand.step_work(lives[variant], batch, num_steps) if stand else None
            self.ledger.add(name, frames, "step", variant, found, batch=batch, work=work)
        for variant, stand in stands.items():
            stand.forget(keep=lives[variant].prefix)

    def _memory(self, name: str, frames: int, stands: dict[str, Stand], lives: dict[str, Life]) -> None:
        for variant, life in lives.items():
            row_bytes = stands[variant].model.spec.bytes_per_token
            self.ledger.rows.append(
                {
                    "model": name,
                    "frames": frames,
                    "stage": "memory",
                    "variant": variant,
                    "visual_tokens": life.usage.visual_tokens,
                    "kept": life.usage.visual_tokens_kept,
                    "retrieved": life.usage.visual_tokens_retrieved,
                    "prefix_bytes": life.prefix.kv_bytes,
                    "attended_bytes": (life.prefix.length - life.prefix.num_kept + life.usage.visual_tokens_retrieved) * row_bytes,
                    "peak_rss_bytes": machine.peak_rss_bytes(),
                }
            )


def equal_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def figures(ledger: Ledger, demo_frames: int | None) -> dict[str, float]:
    """The figures that others read, by name; what was not measured is absent."""
    salience = ledger.find(MID, 64, "encode", "with salience")
    found = {
        "prefill_speedup_64f": ledger.ratio(MID, 64, "prune+prefill", "dense", "sparse"),
        "prefill_speedup_256f": ledger.ratio(MID, 256, "prune+prefill", "dense", "sparse"),
        **{f"decode_speedup_b{b}": ledger.ratio(MID, 64, "step", "dense", "sparse", b) for b in (1, 4, 8)},
        "e2e_speedup_64f": ledger.ratio(MID, 64, "end to end", "dense", "sparse"),
        **{f"demo_decode_vs_hf_b{b}": ledger.ratio(DEMO, demo_frames or 0, "step", "hf", "dense", b) for b in (1, 8)},
        "mid_decode_vs_hf_b1": ledger.ratio(MID, 64, "step", "hf", "dense"),
        "salience_share_of_encode": salience and salience["salience_share"],
        "turn2_ttft_share_of_cold": ledger.ratio(
            MID, 64, "first token, turn 2", "sparse", "sparse", under_stage="first token, cold"
        ),
    }
    return {name: value for name, value in found.items() if value is not None}


def show(report: Report, ledger: Ledger, name: str) -> None:
    report.show_table(f"{name}: times (medians; bounds in ms, and their share of the time)", HEAD, ledger.table(name))
    mine = [row for row in ledger.rows if row["model"] == name]
    encodes = [row for row in mine if row["stage"] in ("encode", "patchify")]
    shares = ("share_of_bound", "salience_share")
    body = [[r["frames"], r["stage"], r["variant"], r["ms"], *(percent(r.get(share)) for share in shares)] for r in encodes]
    if body:
        report.show_table(f"{name}: encode", ("frames", "stage", "variant", "ms", "bound of it", "salience of it"), body)
    memory = [row for row in mine if row["stage"] == "memory"]
    names = ("frames", "variant", "visual_tokens", "kept", "retrieved")
    body = [[*(r[n] for n in names), r["prefix_bytes"] / 1e6, r["attended_bytes"] / 1e6, r["peak_rss_bytes"] / 1e9] for r in memory]
    head = ("frames", "variant", "visual tokens", "kept", "retrieved", "prefix MB", "attended MB", "peak RSS GB so far")
    report.show_table(f"{name}: memory", head, body)


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
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the mid-size checkpoint is kept (630 MB)")
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
    with progress() as say:
        say("ceilings of this machine")
        ceilings = machine.measure_ceilings()
        report = Report("engine", machine.card(ceilings), quiet=options.json)
        report.show_card()
        ledger = Ledger(ceilings)
        bench = Bench(report, ledger, say)
        say("mid-size checkpoint")
        directory = make_checkpoint(options.cache, recipe)
        model = load_model(directory, device="cpu")
        report.say(f"{MID}: {TextShape.of(model.config).num_parameters / 1e6:.0f} M text parameters, {directory}")
        videos = [make_media(frames, recipe.frame_px) for frames in plan.frames]
        bench.measure(MID, directory, model, videos, plan, hf_batches=(1,))
        show(report, ledger, MID)
        directory = EngineConfig(model=options.model).model_dir
        demo_frames = None
        if directory.is_dir():
            model = load_model(directory, device="cpu")
            video = demo_media()
            demo_frames = len(video.frames)
            demo_plan = plan if toy else replace(plan, **OFTEN)
            bench.measure(DEMO, directory, model, [video], demo_plan, hf_batches=demo_plan.batches)
            show(report, ledger, DEMO)
        else:
            report.say(f"{DEMO}: no checkpoint at {directory}")
    report.machine["load_at_end"] = machine.load()
    report.rows = ledger.rows
    report.figures = figures(ledger, demo_frames)
    report.show_figures()
    report.finish(options.save)


if __name__ == "__main__":
    main()
