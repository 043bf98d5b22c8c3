"""How fast the kernels are: against references, against what others offer, against the device. `python -m benchmarks.kernels`.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import device_clock, machine
from benchmarks.lib.machine import Ceilings
from benchmarks.lib.ops import attention_ops, matmul_ops, memory_ops
from benchmarks.lib.ops.op_case import CPU, GPU, QUICK, TOY, Case, Entry, Sizes, Subject, error_of
from benchmarks.lib.report import Report, progress
from benchmarks.lib.stopwatch import Repeats, Times
from benchmarks.lib.timing_table import percent

OPS = ("colreduce", "decode_attention", "kv_pack", "kv_quantize", "awq_matmul", "int8_matmul", "rms_norm", "rope_write", "silu_mul")
HEAD = ("shape", "way", "ms", "GB/s", "TFLOP/s", "of ceiling", "bound by", "ours is x faster", "error")
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure, and how often: `slow` runs of a reference, of which the first does not count if there are several."""

    sizes: Sizes
    repeats: Repeats
    slow: int = 1


PLANS = {
    "cuda": Plan(GPU, Repeats(least=5, most=30, budget_s=0.3), slow=3),
    "cpu": Plan(CPU, Repeats(least=3, most=9, budget_s=1.0)),
    "quick": Plan(QUICK, Repeats(least=3, most=5, budget_s=0.5)),
    "toy": Plan(TOY, Repeats(least=2, most=3, budget_s=0.1)),
}


@dataclass
class Ready:
    """By name, those ways of a case that run: what to time, which of that a CUDA graph replays, how far each is from the reference;
    and the times of the reference, which is run for its result anyway, and takes long.
    """

    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    replayed: set[str] = field(default_factory=set)
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)


class Measurement:
    """Cases one after the other, into rows. `tell` hears of peers that are missing, `write` every row as soon as it is there."""

    def __init__(self, target: torch.device, plan: Plan, tell: Callable[[str], None], write: Callable[[Row], None]):
        self.device, self.plan, self._tell, self._write = target, plan, tell, write
        self.rows: list[Row] = []
        self._clock = device_clock.Clock(target, plan.repeats)
        self._told: set[str] = set()

    @torch.inference_mode()
    def measure(self, case: Case, ceilings: dict[str, Ceilings]) -> None:
        """One case. A way that cannot run (for want of memory, mostly) is told, and has a row that says why."""
        subject = case.build(self.device, ("auto", "torch") if self.device.type == "cuda" else ("auto",))
        for name, why in subject.meet_peers().items():
            if f"{name}: {why}" not in self._told:
                self._tell(f"{case.op}: no {name}: {why}")
                self._told.add(f"{name}: {why}")
        ready = self._ready(case, subject)
        times = ready.times | self._clock.in_turns(ready.works)
        entries = [entry for entry in subject.entries if entry.name in times]
        ceiling = ceilings["int8" if case.op == "int8_matmul" else case.dtype]
        bound_ms = subject.work.bound_ms(ceiling)
        in_memory = subject.work.bytes / ceiling.bytes_per_s > subject.work.flop / (ceiling.matmul_gflops * 1e9)
        for entry in entries:
            ms = times[entry.name].median_ms
            row: Row = {
                "op": case.op, "shape": case.shape, "way": entry.name, "role": entry.role, "device": self.device.type,
                "dtype": case.dtype, "ms": round(ms, 5), "best_ms": round(times[entry.name].best_ms, 5),
                "spread": round(times[entry.name].spread, 4), "samples": times[entry.name].num,
                "graph": entry.name in ready.replayed, "gb_s": round(subject.work.bytes / ms / 1e6, 2),
                "tflop_s": round(subject.work.flop / ms / 1e9, 4),
                "bound_ms": round(bound_ms, 5), "bound_by": "memory" if in_memory else "arithmetic",
                "share_of_ceiling": round(bound_ms / ms, 4), "headline": case.headline,
            }  # fmt: skip
            if (error := ready.errors.get(entry.name)) is not None:
                row["error"] = error if error == error else "NaN"
            self._add(row | {name: value for name, value in case.sizes.items() if name not in row})

    def _ready(self, case: Case, subject: Subject) -> Ready:
        """Run every way of a case once."""
        ready = Ready()
        wanted: Any = None
        for entry in sorted(subject.entries, key=lambda entry: entry.role != "reference"):
            try:
                if entry.role == "reference":
                    wanted = self._run_reference(entry, ready.times)
                    continue
                if entry.judged and wanted is not None:
                    ready.errors[entry.name] = error_of(entry.run(), wanted)
                ready.works[entry.name], replayed = self._clock.prepare(entry.run)
                if replayed:
                    ready.replayed.add(entry.name)
            except RuntimeError as error:  # torch's own class for whatever a device refuses
                why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                self._tell(f"{case.op}, {case.shape}: {entry.name}: {why}")
                self._add({"op": case.op, "shape": case.shape, "way": entry.name, "role": entry.role, "failed": why})
        return ready

    def _run_reference(self, entry: Entry, times: dict[str, Times]) -> Any:
        """Its result; its times, if it comes to an end."""
        found: list[Any] = []
        taken = Times()
        for number in range(self.plan.slow):
            ms = self._clock.once_ms(lambda: found.append(entry.run()))
            if number or self.plan.slow == 1:
                taken.add(ms)
        times[entry.name] = taken
        return found[-1]

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._write(row)


def cases(sizes: Sizes, wanted: Sequence[str] = OPS) -> list[Case]:
    """The headline of each operation first: whoever stops early has the figures."""
    found = [case for module in (attention_ops, matmul_ops, memory_ops) for case in module.cases(sizes) if case.op in wanted]
    return sorted(found, key=lambda case: not case.headline)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Of the headline shape of each operation. A peer is the fastest of those that were here."""
    found: dict[str, float] = {}
    rows = [row for row in rows if "ms" in row]
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
    rows = [row for row in rows if "ms" in row]
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
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that it runs")
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


def main(argv: Sequence[str] | None = None) -> None:
    started_s = time.perf_counter()
    options = parse(argv)
    torch.set_num_threads(options.threads)
    target = device_clock.choose(options.device)
    plan = PLANS["toy" if options.toy else "quick" if options.quick else target.type]
    neighbours = machine.Neighbours()
    with progress() as say:
        say("ceilings of this device")
        dtypes = tuple(dict.fromkeys((plan.sizes.dtype, matmul_ops.AWQ_DTYPE, "int8")))
        found = device_clock.ceilings(target, dtypes, 0.05 if options.toy else 1.0)
        report = Report("kernels", device_clock.card(target, found), quiet=options.json)
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
