"""`sparsevila config check`: validate a YAML file, and print it with every default filled in."""

from __future__ import annotations

import argparse
import json

from sparsevila_cluster.cli.options import OK, add_output_options
from sparsevila_cluster.cluster.check_cluster import check_cluster
from sparsevila_cluster.core.cluster_config import ClusterConfig, cluster_config_of
from sparsevila_cluster.core.config import load_config, read_yaml
from sparsevila_cluster.engine.config_check import check_choices


def add_options(parser: argparse.ArgumentParser) -> None:
    """The actions of `config` and their options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", allow_abbrev=False, help="validate a YAML file and print it with all defaults")
    check.add_argument("file", metavar="FILE")
    add_output_options(check)
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    given = read_yaml(args.file)
    cluster = set(given) & set(ClusterConfig.model_fields)
    config = cluster_config_of(given) if cluster else load_config(args.file)
    if isinstance(config, ClusterConfig):
        check_cluster(config)
    else:
        check_choices(config)
    fields = config.model_dump(mode="json")  # secrets as asterisks
    if args.json:
        print(json.dumps({"file": args.file, "config": fields}))
    else:
        import yaml

        print(yaml.safe_dump(fields, sort_keys=False), end="")
    return OK
