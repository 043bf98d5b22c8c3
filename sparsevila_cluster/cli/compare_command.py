"""`sparsevila compare`: how far quantized checkpoints are from their original."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sparsevila_cluster.cli.options import OK, add_output_options
from sparsevila_cluster.cli.quantization_inputs import add_input_options, check_numbers, read_inputs, reading_of
from sparsevila_cluster.cli.server_tables import WIDTH_IN_FILES
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.summary import megabytes

if TYPE_CHECKING:
    from sparsevila_cluster.quantization.compare import Distance

HELD_OUT_EXAMPLES = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `compare`."""
    parser.description = (
        "Next-token distributions on inputs that were not calibrated on: KL is the mean divergence in nats a token."
    )
    parser.add_argument("original", metavar="ORIGINAL", help="checkpoint with float weights")
    parser.add_argument("others", metavar="QUANTIZED", nargs="+", help="checkpoints made from it")
    add_input_options(parser, "--inputs", HELD_OUT_EXAMPLES)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add_output_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    check_numbers(args)
    with ProgressLine() as progress:
        progress.stage("load", 0, 1)
        from sparsevila_cluster.models.loading.originals import read_vocabulary
        from sparsevila_cluster.quantization.compare import compare

        original, others = Path(args.original), [Path(other) for other in args.others]
        vocabulary, reading = read_vocabulary(original), reading_of(args, pruned=False)
        inputs = read_inputs(args, vocabulary, reading, held_out=True)
        found = compare(original, others, vocabulary, inputs, reading, device=args.device, report=progress.stage)
    if args.json:
        print(json.dumps({"original": args.original, "distances": [one.as_dict() for one in found]}))
    else:
        _show(args.original, found)
    return OK


def _show(original: str, found: list[Distance]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Distance from {original}, on {found[0].num_tokens} tokens", title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    for name in ("KL (nats)", "logits off by", "same top token", "files"):
        table.add_column(name, justify="right")
    for one in found:
        size = megabytes(one.stored_bytes)
        table.add_row(one.checkpoint, f"{one.kl:.3e}", f"{100 * one.relative_error:.2f} %", f"{100 * one.same_top:.2f} %", size)
    Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES, highlight=False).print(table)
