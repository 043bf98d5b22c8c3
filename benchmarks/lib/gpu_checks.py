"""Whether the kernels are right on this machine, without pytest. `python -m benchmarks.lib.gpu_checks`.

    kernels    every case of `benchmarks.lib.ops` at small odd shapes: Triton and torch against the float64 reference; the same bits
               twice; rows that do not depend on their neighbours; nothing read beyond what is named (NaN lies there)
    engine     tokens of a small random model: with CUDA graphs, without, with the attention of torch; logits in 4 bits

On a CPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1), and what needs a GPU is skipped. Ends with status 1 if a
check fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.lib import device_clock, interpreted_triton, kernel_checks
from benchmarks.lib.limit_check import Check, Row, Skipped, judge, unbroken
from benchmarks.lib.report import Report

HEAD = ("check", "state", "value", "limit", "s")


def engine_checks(target: torch.device) -> Iterator[Check]:
    """Imported late: without pydantic and the like there is no engine, but there are kernels."""
    try:
        from benchmarks.lib.engine_checks import checks
    except ImportError as error:
        why = str(error)

        def cannot() -> float:
            raise Skipped(why)

        yield Check("engine", cannot)
        return
    yield from checks(target)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lib.gpu_checks", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="few and tiny shapes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes: most of the time goes into compiling")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="only every Nth group of checks, from the Ith on")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="S", help="begin no further check after so many seconds")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also append every row to FILE as soon as it is known")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    stop_at_s = time.perf_counter()
    options = parse(argv)
    stop_at_s += options.stop_after
    target = device_clock.choose(options.device)
    interpreted_triton.prepare_once()
    report = Report("gpu_checks", device_clock.card(target, {}), quiet=options.json)
    report.show_card()
    for row in in_parts(options) if options.workers > 1 else here(options, target, stop_at_s):
        report.rows.append(row)
        if options.rows is not None:
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    count = {state: sum(row["state"] == state for row in report.rows) for state in ("passed", "failed", "skipped", "not begun")}
    failed = [row for row in report.rows if row["state"] == "failed"]
    if failed:
        report.show_table("Checks that failed", HEAD, [[row.get(name) for name in HEAD] for row in failed])
    for row in failed:
        report.say(f"{row['check']}: {row.get('why', row.get('value'))} {row.get('where', '')}")
    report.figures = {f"checks_{state.replace(' ', '_')}": num for state, num in count.items()}
    report.show_figures()
    report.finish(options.save)
    return 1 if count["failed"] else 0


def here(options: argparse.Namespace, target: torch.device, stop_at_s: float) -> Iterator[Row]:
    """The engine first: its few checks cover what the figures are about."""
    index, num = map(int, options.part.split("/"))
    groups: list[kernel_checks.Group] = [("engine", partial(engine_checks, target)), *kernel_checks.groups(target, options.toy)]
    for name, make in groups[index::num]:
        if time.perf_counter() > stop_at_s:
            yield {"check": name, "state": "not begun", "s": 0.0}
            continue
        yield from map(judge, unbroken(name, make()))


def in_parts(options: argparse.Namespace) -> Iterator[Row]:
    """Several processes share the device, and what Triton compiles. What one leaves out when it dies is a check that failed."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for i in range(options.workers):
            command = [sys.executable, "-m", "benchmarks.lib.gpu_checks", "--part", f"{i}/{options.workers}", "--json"]
            command += ["--device", options.device, "--stop-after", str(options.stop_after), *(["--toy"] if options.toy else [])]
            log = Path(folder, str(i))
            with log.open("w") as file:
                running.append((log, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)))
        for i, (log, process) in enumerate(running):
            process.wait()
            lines = log.read_text(errors="replace").rstrip().splitlines() or [""]
            try:
                yield from json.loads(lines[-1])["rows"]
            except (ValueError, TypeError, KeyError):
                yield {
                    "check": f"part {i} of {options.workers}",
                    "state": "failed",
                    "why": "\n".join(lines[-12:])[-1500:],
                    "s": 0.0,
                }


if __name__ == "__main__":
    sys.exit(main())
