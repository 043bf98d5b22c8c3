"""How fast media prefixes cross from worker to worker, and how much of that hides behind prefill. `python -m benchmarks.transfer`.

    gloo         two processes, checksums on    against one bare gloo send of as many bytes, in turns with it
    inproc       two threads                    against copying the rows
    objectstore  two processes of a Ray cluster  against `ray.put`, `ray.get` and a copy (`--no-ray` leaves it out)
    hidden       the mid-size model prefills a video while its prefix leaves: what is left to wait for behind the prefill, against
                 the transfer of the finished prefix

A share is the bare time by the lane's, medians over rounds that take turns; more is better, 1 is as fast as bare.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import machine
from benchmarks.lib.midsize_checkpoint import Recipe, default_cache, make_checkpoint, make_media
from benchmarks.lib.report import Report, progress
from benchmarks.lib.stopwatch import Repeats, Times, once_ms
from benchmarks.lib.transfer_peer import DroppingSink, Near, make_prefix
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.kvcache.arena import Arena, KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models import load_model
from sparsevila_cluster.transport import KVReceiver, KVSender, TransferTicket

MIB = 2**20
SIZES_MIB = (1, 4, 16, 64, 256, 1024)
SPEC = KVSpec(num_layers=12, num_kv_heads=4, head_dim=64, dtype=torch.float32, fingerprint="any")  # the mid-size model's
HEAD = ("kind", "MiB", "ms", "best ms", "bare ms", "best bare ms", "GB/s", "share", "share of best")
ROUNDS = Repeats(least=5, most=41, budget_s=12.0)
LIVES = Repeats(least=3, most=9, budget_s=60.0)


def contest(kind: str, mib: int, bare: Callable[[], float], lane: Callable[[], float], repeats: Repeats) -> dict[str, Any]:
    """A row: both give milliseconds, and take turns."""
    times = {"bare": Times(), "lane": Times()}
    for work in (bare, lane):
        work()
    for _ in repeats.rounds():
        times["bare"].add(bare())
        times["lane"].add(lane())
    ours, theirs = times["lane"], times["bare"]
    return {
        "kind": kind,
        "mib": mib,
        "ms": round(ours.median_ms, 3),
        "best_ms": round(ours.best_ms, 3),
        "bare_ms": round(theirs.median_ms, 3),
        "best_bare_ms": round(theirs.best_ms, 3),
        "gb_s": round(mib * MIB / ours.median_ms / 1e6, 3),
        "share": round(theirs.median_ms / ours.median_ms, 4),
        "share_of_best": round(theirs.best_ms / ours.best_ms, 4),
        "rounds": ours.num,
        "spread": round(ours.spread, 3),
    }


def gloo_rows(sizes: Sequence[int], repeats: Repeats, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Two processes. The ticket is asked for outside the clock: a router has done so long before."""
    rows = []
    num_slots = max(sizes) * MIB // SPEC.bytes_per_token + 1
    for name, config in (("gloo", TransportConfig(kind="gloo")), ("gloo int8", TransportConfig(kind="gloo", quantization="int8"))):
        near = Near(SPEC, num_slots, config)
        try:
            for mib in sizes if name == "gloo" else [mib for mib in sizes if mib == 64]:
                say(f"{name}, {mib} MiB")
                prefix = make_prefix(SPEC, mib * MIB)
                source = torch.ones(prefix.kv_bytes, dtype=torch.uint8)
                rows.append(contest(name, mib, lambda: near.raw_ms(source), lambda: near.lane_ms(prefix), repeats))  # noqa: B023
        finally:
            near.close()
    return rows


def inproc_row(mib: int, repeats: Repeats) -> dict[str, Any]:
    prefix = make_prefix(SPEC, mib * MIB)
    config = TransportConfig(kind="inproc")
    prefix_sink = DroppingSink(SPEC, prefix.length)
    receiver, sender = KVReceiver("far", prefix_sink, SPEC, config), KVSender("near", config)
    number = 0

    def bare() -> None:
        for source, target in zip(
            prefix.extent.arena.k + prefix.extent.arena.v, prefix_sink.arena.k + prefix_sink.arena.v, strict=True
        ):
            target.copy_(source)

    def lane() -> None:
        nonlocal number
        number += 1
        receiver.expect(str(number), "k", 60.0)
        transfer = sender.begin(prefix, (0, prefix.length), TransferTicket(str(number), receiver.address, 60.0))
        transfer.wrote_all()
        transfer.finish(60.0)

    try:
        return contest("inproc", mib, lambda: once_ms(bare), lambda: once_ms(lane), repeats)
    finally:
        sender.close()
        receiver.close()


class Watched:
    """What a prefill worker does while its engine prefills: begin the transfer, pass on which rows are final."""

    def __init__(self, near: Near, ticket: TransferTicket):
        self._near, self._ticket = near, ticket
        self.transfer: Any = None

    def on_start(self, prefix: MediaPrefix, bounds: Sequence[int]) -> None:
        self.transfer = self._near.begin(prefix, bounds, self._ticket)

    def on_rows(self, layer: int, start: int, stop: int) -> None:
        self.transfer.wrote(layer, start, stop)


def hidden_row(directory: Path, frames: int, frame_px: int, repeats: Repeats, say: Callable[[str], None]) -> dict[str, Any]:
    """Prefill alone, transfer alone, and both at once: what a client waits for behind the prefill."""
    say(f"mid-size, {frames} frames, prefill and transfer")
    model = load_model(directory, device="cpu")
    engine = PrefillEngine(model, build_config(prune="salience", prune_keep=0.25))
    video = make_media(frames, frame_px)
    num_slots = model.family.patchify(video).num_tokens // 3 + 64
    near = Near(model.spec, num_slots, TransportConfig(kind="gloo"))
    arena = Arena(model.spec, num_slots)

    def prefill(watch: Watched | None) -> tuple[MediaPrefix, float]:
        """The prefix, and the milliseconds of its text model, which is what a transfer may hide behind."""
        preparation = Preparation(PrepareRequest((MediaSource(b""),)))
        prefix = engine.prefill(preparation, [video], "k", lambda length: _alloc(arena, length), watch)
        return prefix, preparation.stage_ms()["prefill"]

    alone, both, tails, transfers = Times(), Times(), Times(), Times()
    try:
        prefix, _ = prefill(None)  # warms everything up
        near.lane_ms(prefix)
        arena.free(prefix.extent)
        for _ in repeats.rounds():
            prefix, ms = prefill(None)
            transfer_ms = near.lane_ms(prefix)
            arena.free(prefix.extent)
            watch = Watched(near, near.ticket())
            _, with_ms = prefill(watch)
            end_s = time.perf_counter()
            watch.transfer.finish(60.0)
            tail_ms = (time.perf_counter() - end_s) * 1e3
            arena.free(watch.transfer.prefix.extent)
            for times, sample in ((alone, ms), (transfers, transfer_ms), (both, with_ms + tail_ms), (tails, tail_ms)):
                times.add(sample)
    finally:
        near.close()
        engine.close()
    return {
        "kind": "hidden",
        "frames": frames,
        "mib": round(prefix.kv_bytes / MIB, 2),
        "prefill_ms": round(alone.median_ms, 2),
        "transfer_ms": round(transfers.median_ms, 2),
        "together_ms": round(both.median_ms, 2),
        "tail_ms": round(tails.median_ms, 2),
        "hidden_share": round(1 - tails.median_ms / transfers.median_ms, 4),
        "rounds": tails.num,
    }


def _alloc(arena: Arena, length: int):
    extent = arena.alloc(length)
    assert extent is not None, "prefixes are freed in between"
    return extent


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that others read; what was not measured is absent."""
    names = {("gloo", 64): "gloo_share_of_raw_64mib", ("gloo", 1024): "gloo_share_of_raw_1gib"}
    names[("objectstore", 64)] = "objectstore_share_of_raw_64mib"
    found = {names[row["kind"], row["mib"]]: row["share"] for row in rows if (row["kind"], row["mib"]) in names}
    hidden = [row for row in rows if row["kind"] == "hidden"]
    if hidden:
        found["hidden_share"] = hidden[-1]["hidden_share"]
    return found


def show(report: Report) -> None:
    sent = [row for row in report.rows if row["kind"] != "hidden"]
    names = ("kind", "mib", "ms", "best_ms", "bare_ms", "best_bare_ms", "gb_s", "share", "share_of_best")
    report.show_table("Lanes (medians) against bare transport", HEAD, [[row[name] for name in names] for row in sent])
    parts = ("frames", "mib", "prefill_ms", "transfer_ms", "together_ms", "tail_ms", "hidden_share")
    head = ("frames", "MiB", "prefill ms", "transfer ms", "both ms", "tail ms", "hidden")
    hidden = [row for row in report.rows if row["kind"] == "hidden"]
    if hidden:
        report.show_table("Behind prefill, mid-size model", head, [[row[name] for name in parts] for row in hidden])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="64 MiB and 64 frames only")
    parser.add_argument("--sizes", help=f"comma-separated MiB (default {','.join(map(str, SIZES_MIB))})")
    parser.add_argument("--no-ray", action="store_true", help="leave out the object store, which starts a local Ray")
    parser.add_argument("--no-prefill", action="store_true", help="leave out the mid-size model")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the checkpoint is kept (670 MB)")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, toy: tuple[Recipe, Repeats] | None = None) -> None:
    """`toy`: another model, measured in another way; for tests."""
    options = parse(argv)
    torch.set_num_threads(1)  # one of two cores sends, the other one receives
    recipe, repeats = toy or (Recipe(), ROUNDS)
    lives = repeats if toy else LIVES
    sizes = [int(mib) for mib in options.sizes.split(",")] if options.sizes else list((64,) if options.quick else SIZES_MIB)
    neighbours = machine.Neighbours()
    with progress() as say:
        report = Report("transfer", machine.card(), quiet=options.json)
        report.show_card()
        report.rows += gloo_rows(sizes, repeats, say)
        say("inproc")
        report.rows.append(inproc_row(min(64, max(sizes)), repeats))
        if not options.no_ray:
            from benchmarks.lib.ray_store_peer import objectstore_rows

            report.rows += objectstore_rows(SPEC, [mib for mib in sizes if mib <= 256], repeats, say, contest)
        if not options.no_prefill:
            directory = make_checkpoint(options.cache, recipe)
            for frames in (8,) if toy else (64,) if options.quick else (64, 256):
                report.rows.append(hidden_row(directory, frames, recipe.frame_px, lives, say))
    report.machine["cores_busy_with_others"] = neighbours.cores()
    show(report)
    report.figures = figures(report.rows)
    report.show_figures()
    report.say(f"\nOther processes kept {report.machine['cores_busy_with_others']} of {report.machine['cores']} cores busy.")
    report.finish(options.save)


if __name__ == "__main__":
    main()
