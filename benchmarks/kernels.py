"""How fast the kernels are: against references, against what others offer, against the device. `python -m benchmarks.kernels`.

Knows: which cases are measured in which order, for how long, and which figures come of it. Does not know: any operation (`ops`).

    case (one op, one shape) -> tensors -> ours | its torch path | reference | peers, in turns -> rows -> figures

All ways of one case take turns in the same run, their operands not in a processor cache. A share of the ceiling is bound over time;
the bound is what no way can avoid, bytes or operations, at the rate that the device was measured to read or to multiply with. The
reference computes in float64, and `error` is |result - reference| / |reference|.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import device, machine
from benchmarks.ledger import percent
from benchmarks.machine import Ceilings
from benchmarks.ops import attention, matmul, moves
from benchmarks.ops.case import CPU, GPU, QUICK, Case, Sizes, error_of
from benchmarks.report import Report, progress
from benchmarks.stopwatch import Patience

OPS = ("colreduce", "decode_attention", "kv_pack", "kv_quantize", "awq_matmul", "int8_matmul", "rms_norm", "rope_write", "silu_mul")
HEAD = ("shape", "way", "ms", "GB/s", "TFLOP/s", "of ceiling", "bound by", "ours is x faster", "error")
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often: `slow` rounds of a reference, which counts arithmetic rather than time."""

    sizes: Sizes
    patience: Patience
    slow: int = 1


PLANS = {
    "cuda": Plan(GPU, Patience(least=5, most=30, budget_s=0.3), slow=3),
    "cpu": Plan(CPU, Patience(least=3, most=9, budget_s=1.5)),
    "quick": Plan(QUICK, Patience(least=3, most=5, budget_s=0.5)),
}


class Measurement:
    """Cases one after the other, into rows. `tell` hears of peers that are missing, `write` every row as soon as it is there."""

    def __init__(self, target: torch.device, plan: Plan, tell: Callable[[str], None], write: Callable[[Row], None]):
        self.device, self.plan, self._tell, self._write = target, plan, tell, write
        self.rows: list[Row] = []
        self._stand = device.Stand(target, plan.patience)
        self._told: set[str] = set()

    def measure(self, case: Case, ceilings: dict[str, Ceilings]) -> None:
        """One case; what is left of it when memory does not suffice is told."""
        try:
            self._measure(case, ceilings)
        except torch.cuda.OutOfMemoryError:
            self._tell(f"{case.op}, {case.shape}: too little memory")
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _measure(self, case: Case, ceilings: dict[str, Ceilings]) -> None:
        subject = case.build(self.device, ("auto", "torch") if self.device.type == "cuda" else ("auto",))
        for name, why in subject.missing.items():
            if f"{name}: {why}" not in self._told:
                self._tell(f"{case.op}: no {name}: {why}")
                self._told.add(f"{name}: {why}")
        wanted = next((entry.run() for entry in subject.entries if entry.role == "reference"), None)
        errors, ways, replayed = {}, {}, {}
        for entry in subject.entries:
            if entry.judged and entry.role != "reference" and wanted is not None:
                errors[entry.name] = error_of(entry.run(), wanted)
            if entry.role == "reference":
                ways[entry.name], replayed[entry.name] = entry.run, False
            else:
                ways[entry.name], replayed[entry.name] = self._stand.prepare(entry.run)
        del wanted
        slow = {entry.name: self.plan.slow for entry in subject.entries if entry.role == "reference"}
        times = self._stand.in_turns(ways, slow)
        ceiling = ceilings["int8" if case.op == "int8_matmul" else case.dtype]
        bound_ms = subject.work.bound_ms(ceiling)
        memory_ms = 1e3 * subject.work.bytes / ceiling.bytes_per_s
        for entry in subject.entries:
            ms = times[entry.name].median_ms
            row: Row = {
                "op": case.op, "shape": case.shape, "way": entry.name, "role": entry.role, "device": self.device.type,
                "dtype": case.dtype, "ms": round(ms, 5), "best_ms": round(times[entry.name].best_ms, 5),
                "spread": round(times[entry.name].spread, 4), "samples": times[entry.name].num, "graph": replayed[entry.name],
                "gb_s": round(subject.work.bytes / ms / 1e6, 2), "tflop_s": round(subject.work.flop / ms / 1e9, 4),
                "bound_ms": round(bound_ms, 5), "bound_by": "memory" if memory_ms >= bound_ms else "arithmetic",
                "share_of_ceiling": round(bound_ms / ms, 4), "headline": case.headline,
            }  # fmt: skip
            if entry.name in errors:
                row["error"] = errors[entry.name] if errors[entry.name] == errors[entry.name] else "NaN"
            self.rows.append(row | {name: value for name, value in case.sizes.items() if name not in row})
            self._write(self.rows[-1])


def cases(sizes: Sizes, wanted: Sequence[str] = OPS) -> list[Case]:
    """The headline of each operation first: whoever stops early has the figures."""
    found = [case for module in (attention, matmul, moves) for case in module.cases(sizes) if case.op in wanted]
    return sorted(found, key=lambda case: not case.headline)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Of the headline shape of each operation. A peer is the fastest of those that were here."""
    found = {}
    for op in OPS:
        mine = [row for row in rows if row["op"] == op and row["headline"]]
        ours = next((row for row in mine if row["role"] == "op"), None)
        if ours is None:
            continue
        for name, role in (("reference", "reference"), ("peer", "peer")):
            if others := [row["ms"] for row in mine if row["role"] == role]:
                found[f"{op}_vs_{name}"] = round(min(others) / ours["ms"], 4)
        found[f"{op}_share_of_ceiling"] = ours["share_of_ceiling"]
    return found


def show(report: Report, rows: Sequence[Row]) -> None:
    ours = {(row["op"], row["shape"]): row["ms"] for row in rows if row["role"] == "op"}
    for op in OPS:
        body = [
            [
                row["shape"], row["way"], row["ms"], row["gb_s"], row["tflop_s"] or None, percent(row["share_of_ceiling"]),
                row["bound_by"], None if row["role"] == "op" else row["ms"] / ours[op, row["shape"]], _scientific(row.get("error")),
            ]
            for row in rows
            if row["op"] == op and (op, row["shape"]) in ours
        ]  # fmt: skip
        if body:
            report.show_table(op, HEAD, body)


def _scientific(error: float | str | None) -> str | None:
    return f"{error:.1e}" if isinstance(error, float) else error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds: about a minute on a CPU")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(OPS)} (default: all)")
    parser.add_argument("--threads", type=int, default=machine.physical_cores(), help="of torch (default: physical cores)")
    parser.add_argument("--stop-after", type=float, metavar="S", help="begin no further case after so many seconds")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also append every row to FILE as soon as it is measured")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    options = parser.parse_args(argv)
    options.ops = tuple(options.ops.split(",")) if options.ops else OPS
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"--ops: no {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    return options


def main(argv: Sequence[str] | None = None, toy: Plan | None = None) -> None:
    """`toy`: another plan; for tests."""
    started_s = time.perf_counter()
    options = parse(argv)
    torch.set_num_threads(options.threads)
    target = device.choose(options.device)
    plan = toy or PLANS["quick" if options.quick else target.type]
    neighbours = machine.Neighbours()
    with progress() as say:
        say("ceilings of this device")
        dtypes = tuple(dict.fromkeys((plan.sizes.dtype, matmul.AWQ_DTYPE, "int8")))
        size = 0.05 if toy else 1.0
        found = device.ceilings(target, dtypes, size)
        report = Report("kernels", device.card(target, found), quiet=options.json)
        report.show_card()
        measurement = Measurement(target, plan, report.say, _appender(options.rows))
        todo = cases(plan.sizes, options.ops)
        for number, case in enumerate(todo):
            if options.stop_after is not None and time.perf_counter() - started_s > options.stop_after:
                report.say(f"out of time: {len(todo) - number} of {len(todo)} cases left")
                break
            say(f"{number + 1} of {len(todo)}: {case.op}, {case.shape}")
            measurement.measure(case, found)
    report.machine["cores_busy_with_others"] = neighbours.cores()
    report.rows, report.figures = measurement.rows, figures(measurement.rows)
    show(report, report.rows)
    report.show_figures()
    report.finish(options.save)


def _appender(path: Path | None) -> Callable[[Row], None]:
    """Write rows where another process finds them, should this one be ended."""

    def write(row: Row) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    return write


if __name__ == "__main__":
    main()
