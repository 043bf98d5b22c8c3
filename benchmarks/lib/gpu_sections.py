"""The sections of `benchmarks/gpu.sh`: checks, kernels, engine; each in a process and with a deadline of its own.

    section -> its own process -> rows, one line each, as soon as they are known   -> one document
                               -> its document as its last line, if it comes to an end

A section is asked to begin nothing new after some time (`--stop-after`), and is ended, with all that it started, after some more.
The engine needs pydantic, msgpack and PyYAML beside torch and transformers: where they are missing, `--wheels` brings them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib import device_clock
from benchmarks.lib.report import Report

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]

# Beside torch, triton and transformers with what those need; the wheels to bring for each.
NEEDED = {
    "pydantic": "pydantic, pydantic-core, annotated-types, typing-inspection",
    "msgpack": "msgpack",
    "yaml": "PyYAML",
    "jinja2": "Jinja2, MarkupSafe",
    "PIL": "pillow",
}


@dataclass(frozen=True)
class Section:
    """stop_s: when it is to begin nothing new; end_s: when it is ended."""

    name: str
    module: str
    stop_s: float
    end_s: float


# 520 s at most; the first two usually take less.
SECTIONS = (
    Section("checks", "benchmarks.lib.gpu_checks", stop_s=105, end_s=130),
    Section("kernels", "benchmarks.kernels", stop_s=130, end_s=155),
    Section("engine", "benchmarks.lib.gpu_engine", stop_s=175, end_s=235),
)
# Of a machine with a GPU: compiling is what the checks take their time for.
CHECK_WORKERS = 6


@dataclass(frozen=True)
class Outcome:
    """told: the row about the section itself; text: what it printed, without its document."""

    told: Row
    document: dict[str, Any]
    rows: list[Row]
    text: str


def run(section: Section, arguments: Sequence[str], environment: dict[str, str], folder: Path) -> Outcome:
    """Run one section to its end, or to the end of its time. The log of one that did not come to its own end stays in `folder`."""
    rows_path, log_path = folder / f"gpu_{section.name}.rows", folder / f"gpu_{section.name}.txt"
    rows_path.unlink(missing_ok=True)
    command = [sys.executable, "-m", section.module, *arguments, "--stop-after", str(section.stop_s), "--rows", str(rows_path)]
    begun_s = time.perf_counter()
    told: Row = {"section": section.name, "stage": "section"}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            told["status"] = process.wait(section.end_s)
            told["state"] = "done"
        except subprocess.TimeoutExpired:
            told["state"] = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    told["s"] = round(time.perf_counter() - begun_s, 1)
    document = last_document(log_path.read_text(errors="replace"))
    if told["state"] == "done" and not document:
        told["state"] = "failed"
    text = log_path.read_text(errors="replace").rstrip()
    if document:
        text = text[: text.rindex("\n") + 1] if "\n" in text else ""
        log_path.unlink()  # all of it is in the report
    rows = document.get("rows") or read_rows(rows_path)
    rows_path.unlink(missing_ok=True)
    return Outcome(told, document, [{"section": section.name, **row} for row in rows], text)


def last_document(text: str) -> dict[str, Any]:
    """The JSON document that a benchmark ends with, or {}."""
    lines = text.rstrip().splitlines()
    with contextlib.suppress(ValueError):
        document = json.loads(lines[-1]) if lines else {}
        if isinstance(document, dict) and {"what", "figures", "rows"} <= set(document):
            return document
    return {}


def read_rows(path: Path) -> list[Row]:
    """Rows that were written before the end came; the last one may be torn."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def unpack(wheels: Path, folder: Path) -> list[str]:
    """Wheels are archives of what lies in site-packages: no installer is needed. Their names."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [wheel.name for wheel in found]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="the same as --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are written (default: benchmarks/results)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what this machine lacks")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; without a GPU in any case")
    parser.add_argument("--sections", help=f"comma-separated, of {', '.join(s.name for s in SECTIONS)} (default: all)")
    options = parser.parse_args(argv)
    options.out = options.out or options.folder or ROOT / "benchmarks" / "results"
    names = [section.name for section in SECTIONS]
    options.sections = options.sections.split(",") if options.sections else names
    if unknown := set(options.sections) - set(names):
        parser.error(f"--sections: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: no folder {options.wheels}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    target = device_clock.choose("auto")
    toy = options.toy or target.type != "cuda"
    options.out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        if options.wheels is not None:
            brought = unpack(options.wheels, Path(scratch))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [scratch, os.environ.get("PYTHONPATH", "")]))
            sys.path.insert(0, scratch)
        report = Report("gpu_toy" if toy else "gpu", device_clock.card(target, {}))
        report.show_card()
        if options.wheels is not None:
            report.say(f"unpacked for this run: {', '.join(brought) or 'nothing'}")
        for name, wheels in NEEDED.items():
            if importlib.util.find_spec(name) is None:
                report.say(f"{name} is missing: the engine will not run; bring {wheels} with --wheels")
        for section in SECTIONS:
            if section.name not in options.sections:
                continue
            report.say(f"\n{section.name}: at most {section.end_s:.0f} s")
            arguments = ["--device", target.type, *(["--toy"] if toy else [])]
            if section.name == "checks" and target.type == "cuda":
                arguments += ["--workers", str(CHECK_WORKERS)]
            if target.type == "cpu":  # at toy sizes a second thread costs more than it brings
                environment |= {"OMP_NUM_THREADS": "1"}
                arguments += ["--threads", "1"] if section.name == "kernels" else []
            more = {"TRITON_INTERPRET": "1"} if section.name == "checks" and target.type != "cuda" else {}
            outcome = run(section, arguments, environment | more, options.out)
            report.rows += [outcome.told, *outcome.rows]
            report.figures |= outcome.document.get("figures", {})
            known = outcome.document.get("machine", {})
            report.machine |= {name: value for name, value in known.items() if name not in report.machine}
            report.say(f"{section.name}: {outcome.told['state']} after {outcome.told['s']} s, {len(outcome.rows)} rows")
            report.attach(outcome.text)
            if not outcome.document:
                print(outcome.text[-1500:], flush=True)
    body = [[row["section"], row["state"], row["s"], row.get("status")] for row in report.rows if row.get("stage") == "section"]
    report.show_table("Sections", ("section", "state", "s", "status"), body)
    report.show_figures()
    report.finish(options.out)


if __name__ == "__main__":
    main()
