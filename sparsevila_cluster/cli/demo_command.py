"""`sparsevila demo` and `sparsevila config check`: what there is beside asking and serving.

Knows: their options, what they print. Does not know: what the demo shows, or what a configuration means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparsevila_cluster.cli.options import OK, add_output_options
from sparsevila_cluster.cluster.check_cluster import check_cluster
from sparsevila_cluster.core.cluster_config import ClusterConfig, cluster_config_of
from sparsevila_cluster.core.config import load_config, read_yaml
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.engine.config_check import check_choices


def add_to(commands: Any) -> None:
    """The parsers of `demo` and `config`."""
    demo = commands.add_parser("demo", allow_abbrev=False, help="answer questions about videos that the bundled model never saw")
    demo.add_argument("--out", default="sparsevila-demo", metavar="DIR", help="where videos and heat map go (%(default)s)")
    demo.add_argument("--model", metavar="DIR", help="another checkpoint of the demo world")
    demo.add_argument("--local", action="store_true", help="in this process, without a cluster, and compared with a dense engine")
    add_output_options(demo)
    demo.set_defaults(run=_demo)

    config = commands.add_parser("config", allow_abbrev=False, help="work with configuration files")
    actions = config.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", allow_abbrev=False, help="validate a YAML file and print it with all defaults")
    check.add_argument("file", metavar="FILE")
    add_output_options(check)
    check.set_defaults(run=_config_check)


def _config_check(args: argparse.Namespace) -> int:
    given = read_yaml(args.file)
    cluster = set(given) & set(ClusterConfig.model_fields)
    config = cluster_config_of(given) if cluster else load_config(args.file)
    if isinstance(config, ClusterConfig):
        check_cluster(config)
    else:
        check_choices(config)
    fields = config.model_dump()
    if args.json:
        print(json.dumps({"file": args.file, "config": fields}))
    else:
        import yaml

        print(yaml.safe_dump(fields, sort_keys=False), end="")
    return OK


def _demo(args: argparse.Namespace) -> int:
    if args.local:
        from sparsevila_cluster.demo.local_tour import run_tour as run
    else:
        from sparsevila_cluster.demo.cluster_tour import run_cluster_tour as run

    with ProgressLine() as progress:
        return run(Path(args.out), args.model or "demo", args.json, progress.stage)
