"""`sparsevila demo`: questions about videos of the demo world, to the bundled model."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsevila_cluster.cli.options import add_output_options
from sparsevila_cluster.core.progress_line import ProgressLine


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    parser.add_argument("--out", default="sparsevila-demo", metavar="DIR", help="where videos and heat map go (%(default)s)")
    parser.add_argument("--model", metavar="DIR", help="another checkpoint of the demo world")
    parser.add_argument("--local", action="store_true", help="in this process, without a cluster, and compared with a dense engine")
    add_output_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.local:
        from sparsevila_cluster.demo.local_demo import run_local_demo as run
    else:
        from sparsevila_cluster.demo.cluster_demo import run_cluster_demo as run

    with ProgressLine() as progress:
        return run(Path(args.out), args.model or "demo", args.json, progress.stage)
