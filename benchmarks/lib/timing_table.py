"""Every time that was measured, as rows of plain data; figures and tables are read from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lib.flop_counts import Work
from benchmarks.lib.machine import Ceilings
from benchmarks.lib.report import Report
from benchmarks.lib.stopwatch import Times

Row = dict[str, Any]
HEAD = (
    "frames", "batch", "stage", "dense ms", "sparse ms", "hf ms", "dense/sparse", "hf/dense", "spread",
    "dense bound", "of it", "sparse bound", "of it",
)  # fmt: skip


@dataclass
class Ledger:
    rows: list[Row] = field(default_factory=list)

    def add(
        self,
        model: str,
        frames: int,
        stage: str,
        variant: str,
        times: Times,
        *,
        batch: int = 1,
        work: Work | None = None,
        **more: Any,
    ) -> None:
        """ms is the median; spread: distance of the quartiles over the median."""
        row: Row = {"model": model, "frames": frames, "batch": batch, "stage": stage, "variant": variant}
        row |= {
            "ms": round(times.median_ms, 4),
            "best_ms": round(times.best_ms, 4),
            "spread": round(times.spread, 4),
            "samples": times.num,
        }
        if work is not None:
            row |= {"flop": work.flop, "bytes": work.bytes}
        self.rows.append(row | more)

    def settle(self, ceilings: Ceilings, model: str | None = None) -> None:
        """Put bounds beside the times (of one model, or of all), and the share bound / ms."""
        for row in self.rows:
            if "flop" in row and model in (None, row["model"]):
                bound_ms = Work(row["flop"], row["bytes"]).bound_ms(ceilings)
                row |= {"bound_ms": round(bound_ms, 4), "share_of_bound": round(bound_ms / row["ms"], 4)}

    def find(self, model: str, frames: int, stage: str, variant: str, batch: int = 1) -> Row | None:
        wanted = (model, frames, stage, variant, batch)
        names = ("model", "frames", "stage", "variant", "batch")
        return next((row for row in self.rows if tuple(row.get(name) for name in names) == wanted), None)

    def ratio(
        self,
        model: str,
        frames: int,
        stage: str,
        over: str,
        under: str,
        batch: int = 1,
        *,
        under_stage: str | None = None,
        by: str = "ms",
    ) -> float | None:
        """Time of `over` / time of `under`, both `by` median (ms) or best_ms; None where one was not measured."""
        a = self.find(model, frames, stage, over, batch)
        b = self.find(model, frames, under_stage or stage, under, batch)
        return None if a is None or b is None else round(a[by] / b[by], 4)

    def table(self, model: str) -> list[list[Any]]:
        """Lines under HEAD: variants side by side."""
        mine = [row for row in self.rows if row["model"] == model and row["variant"] in ("dense", "sparse", "hf") and "ms" in row]
        keys = dict.fromkeys((row["frames"], row["batch"], row["stage"]) for row in mine)
        return [self._line(model, *key) for key in keys]

    def _line(self, model: str, frames: int, batch: int, stage: str) -> list[Any]:
        dense, sparse, hf = (self.find(model, frames, stage, variant, batch) for variant in ("dense", "sparse", "hf"))
        present = [row for row in (dense, sparse, hf) if row is not None]
        line: list[Any] = [frames, batch, stage, *(row and row["ms"] for row in (dense, sparse, hf))]
        line += [
            self.ratio(model, frames, stage, "dense", "sparse", batch),
            self.ratio(model, frames, stage, "hf", "dense", batch),
            percent(max(row["spread"] for row in present)),
        ]
        for row in (dense, sparse):
            line += [(row or {}).get("bound_ms"), percent((row or {}).get("share_of_bound"))]
        return line


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.0f} %"


def columns(rows: Sequence[Row], *names: str) -> list[list[Any]]:
    return [[row.get(name) for name in names] for row in rows]


def show(report: Report, ledger: Ledger, name: str) -> None:
    """Times, encodes and memory of one model as tables."""
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
