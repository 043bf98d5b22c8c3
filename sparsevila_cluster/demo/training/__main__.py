"""`python -m sparsevila_cluster.demo.training --out DIR` trains the demo checkpoint from scratch, or goes on with it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sparsevila_cluster.demo.training.run import RunOptions, TrainingRun
from sparsevila_cluster.demo.training.training_log import TrainingLog


def main() -> None:
    """Read the command line, train, print the accuracy."""
    defaults = RunOptions(Path("."))
    parser = argparse.ArgumentParser(description="Train the demo checkpoint from scratch, or go on where a killed run was.")
    parser.add_argument("--out", type=Path, required=True, help="gets checkpoint/, training_log.jsonl, state.pt and encoded videos")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda")
    parser.add_argument("--dense", action="store_true", help="the twin: never drop a visual token")
    parser.add_argument("--no-salience", dest="salience", action="store_false", help="do not train the tower's attention")
    options = RunOptions(**vars(parser.parse_args()))
    with TrainingLog(options.out / "training_log.jsonl") as log:
        accuracy = TrainingRun(options, log).train()
    print(json.dumps(accuracy, indent=2))


if __name__ == "__main__":
    main()
