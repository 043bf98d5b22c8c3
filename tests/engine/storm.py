"""A storm over the decode engine: `python -m tests.engine.storm --operations 10000 --seed 0`, or `make storm`.

It is made of runs: a few hundred operations each, with limits of their own. The same seed gives the same storm.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch, which the next lines import

from tests.engine.single_turn_reference import recorded_logits  # noqa: E402
from tests.engine.storm_run import StormRun  # noqa: E402

SEASON_OPERATIONS = 500


def blow(model, rng: random.Random, num_operations: int, report: Callable[[str], None] = lambda operation: None) -> Counter[str]:
    """A whole storm; `report` gets the name of each operation that is over. Sums over all runs, and the peak of bytes."""
    total: Counter[str] = Counter()
    for start in range(0, num_operations, SEASON_OPERATIONS):
        with recorded_logits() as heard:
            run = StormRun(model, rng, heard)
            for _ in range(min(SEASON_OPERATIONS, num_operations - start)):
                report(run.operate())
            run.end()
        peak_bytes = max(total["peak_bytes"], run.peak_bytes)
        total.update(run.summary())
        total["peak_bytes"] = peak_bytes
    return total


@contextmanager
def unlogged() -> Iterator[None]:
    """Faults are part of a storm: the package's logger is silent meanwhile."""
    log = logging.getLogger("sparsevila_cluster")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def make_model(directory):
    from sparsevila_cluster.models import load_model
    from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl

    return load_model(make_qwen2_5_vl(directory, seed=0, layers=2, hidden=32))


def main(argv: Sequence[str] | None = None) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m tests.engine.storm", description=__doc__.split("\n")[0])
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started_s, done = time.perf_counter(), []
    with unlogged(), tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("storm", total=options.operations)

        def report(operation: str) -> None:
            done.append(operation)
            bar.advance(task)

        try:
            total = blow(make_model(folder), random.Random(options.seed), options.operations, report)
        except Exception as error:
            Console(stderr=True).print_exception()
            print(f"storm FAILED: seed {options.seed}, operation {len(done) + 1} (after {done[-3:]}): {error}")
            return 1
    told = " ".join(f"{name}={value}" for name, value in total.items())
    print(f"storm ok: seed={options.seed} {told} seconds={time.perf_counter() - started_s:.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
