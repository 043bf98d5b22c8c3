"""Broken files through the public call, thousands of them: `python -m tests.media.fuzz --mutants 2000 --seed 0`.

Each must end, within its deadline, as valid media or as a typed error, and leave nothing behind: no file, no process, no memory.
Whatever does not is saved and named with its seed and number; `--only NUMBER` tries one again.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded, TooLarge
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import DecoderSandbox, Media, open_media
from sparsevila_cluster.media.sandbox import GRACE_S
from tests.media.mutants import mutant, seeds

# Time in which a busy machine may bring the answer. A process that has to start is not on the clock.
SLACK_S = 2.0
START_S = 30.0
MAX_GROWTH_BYTES = 64 << 20


@dataclass
class Tally:
    outcomes: Counter = field(default_factory=Counter)
    by_seed: dict[str, Counter] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, name: str, outcome: str, took_s: float, label: str) -> None:
        self.outcomes[outcome] += 1
        self.by_seed.setdefault(name, Counter())[outcome] += 1
        self.slowest = max(self.slowest, (took_s, label))

    def line(self, num: int, seed: int, restarts: int) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        return (
            f"fuzz: {num} mutants, seed {seed}: {counts}; slowest {self.slowest[0]:.2f} s ({self.slowest[1]}); "
            f"{restarts} workers replaced; {len(self.violations)} violations"
        )


def attempt(data: bytes, number: int, limits: MediaLimits, sandbox: DecoderSandbox) -> tuple[str, str | None]:
    """The outcome's name, and what is wrong with it."""
    fps, max_frames = ((0.5, 3), (2.0, 8), (30.0, 64))[number % 3]
    try:
        media = open_media(MediaSource(data), fps=fps, max_frames=max_frames, limits=limits, sandbox=sandbox)
    except (BadMedia, TooLarge, DeadlineExceeded) as error:
        return type(error).__name__, None if len(str(error)) > 10 else f"says only {str(error)!r}"
    except BaseException as error:
        return type(error).__name__, f"{type(error).__name__}: {error}"
    return "media", unsound(media, max_frames, limits)


def unsound(media: Media, max_frames: int, limits: MediaLimits) -> str | None:
    """What is not as `Media` promises."""
    frames, times_s = media.frames, media.times_s
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.flags.writeable:
        return f"frames {frames.dtype} {frames.shape}"
    if not 1 <= len(frames) <= max_frames or len(frames) != len(times_s) or frames[0, :, :, 0].size > limits.max_pixels:
        return f"{frames.shape} frames at {len(times_s)} times"
    if times_s[0] < 0 or (np.diff(times_s) <= 0).any() or not np.isfinite(times_s).all():
        return f"times {times_s}"
    if not 0 <= media.duration_s <= limits.max_duration_s or (media.kind == "video" and times_s[-1] > media.duration_s + 1e-6):
        return f"a duration of {media.duration_s} s with times {times_s}"
    int(frames.sum(dtype=np.int64))  # every byte can be read
    return None


def leftovers(sandbox: DecoderSandbox, num_files: int, others: set[int]) -> str | None:
    """Open files, processes (but for `others`) and shared memory that nobody owns any more."""
    pids = sandbox.pids()
    files = len(os.listdir("/proc/self/fd"))
    if files != num_files + 2 * len(pids):
        return f"{files} open files; there were {num_files} and {len(pids)} workers"
    if (children := child_pids() - others) != set(pids):
        return f"child processes {sorted(children)}, of which workers are {pids}"
    if "memfd:frames" in Path("/proc/self/maps").read_text():
        return "frames are still mapped"
    return None


def child_pids() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended since
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(
    numbers: Sequence[int], seed: int, *, deadline_s: float = 2.0, save: Path | None = None,
    advance: Callable[[Tally], None] = lambda tally: None,
) -> tuple[Tally, str]:  # fmt: skip
    """Try mutants; the tally and its summary line. What violates the rules is saved below `save`."""
    limits = MediaLimits(decode_timeout_s=deadline_s, max_pixels=1 << 24, decode_memory_bytes=1 << 30)
    tally, settled_bytes = Tally(), None
    seeds()
    gc.collect()
    num_files, others = len(os.listdir("/proc/self/fd")), child_pids()
    with DecoderSandbox() as sandbox:
        for count, number in enumerate(numbers):
            name, way, data = mutant(seed, number)
            label = f"{name}: {way}, seed {seed} number {number}"
            starts, begun_s = sandbox.num_started, time.monotonic()
            outcome, wrong = attempt(data, number, limits, sandbox)
            took_s = time.monotonic() - begun_s
            allowed_s = deadline_s + GRACE_S + SLACK_S + START_S * (sandbox.num_started - starts)
            if wrong is None and took_s > allowed_s:
                wrong = f"took {took_s:.2f} s of {allowed_s:.2f} s"
            wrong = wrong or leftovers(sandbox, num_files, others)
            tally.add(name, outcome, took_s, label)
            if wrong is not None:
                tally.violations.append(f"{label}: {wrong}")
                if save is not None:
                    save.mkdir(parents=True, exist_ok=True)
                    (save / f"{seed}-{number}.bin").write_bytes(data)
            if count == 100:
                settled_bytes = resident_bytes()
            advance(tally)
        gc.collect()
        if settled_bytes is not None and (growth := resident_bytes() - settled_bytes) > MAX_GROWTH_BYTES:
            tally.violations.append(f"this process grew by {growth} bytes")
        restarts = sandbox.num_started - 1
    if left := child_pids() - others:
        tally.violations.append(f"processes {sorted(left)} outlive their sandbox")
    if (files := len(os.listdir("/proc/self/fd"))) != num_files:
        tally.violations.append(f"{files} files are open after the run, {num_files} before it")
    return tally, tally.line(len(numbers), seed, restarts)


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m tests.media.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--mutants", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutant")
    parser.add_argument("--deadline-s", type=float, default=2.0, help="decode_timeout_s of each (default 2)")
    parser.add_argument("--save", type=Path, default=Path("out/fuzz"), help="where violating mutants go (default out/fuzz)")
    options = parser.parse_args(argv)
    numbers = range(options.mutants) if options.only is None else [options.only]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("making seeds", total=len(numbers))

        def advance(tally: Tally) -> None:
            progress.update(task, advance=1, description=f"{len(tally.violations)} violations")

        tally, line = fuzz(numbers, options.seed, deadline_s=options.deadline_s, save=options.save, advance=advance)
    width = max(map(len, tally.by_seed))
    for name, counts in sorted(tally.by_seed.items()):
        print(f"{name:<{width}}  " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    for violation in tally.violations:
        print(f"VIOLATION {violation}")
    if tally.violations:
        print(f"saved in {options.save}")
    print(line)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
