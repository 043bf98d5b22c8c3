"""`sparsevila serve`: its options, and the configuration that they and a file make."""

from __future__ import annotations

import argparse
from typing import Any

from sparsevila_cluster.cli.options import OK
from sparsevila_cluster.core.cluster_config import ClusterConfig, GatewayConfig, build_cluster_config, load_cluster_config


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    gateway = GatewayConfig.model_fields
    parser.add_argument("--config", metavar="FILE", help="YAML file of a cluster (the bundled model on this machine)")
    parser.add_argument("--address", help="a Ray cluster that is there, as auto or HOST:PORT (one of its own)")
    parser.add_argument("--host", help=f"{gateway['host'].description} ({gateway['host'].default})")
    parser.add_argument("--port", type=int, metavar="P", help=f"{gateway['port'].description} ({gateway['port'].default})")
    parser.add_argument("-v", "--verbose", action="store_true", help="logs of all processes on stderr")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    config = _read_options(args)  # complete before Ray is imported
    from sparsevila_cluster.serve.serve_cluster import serve_cluster

    serve_cluster(config, args.address, args.verbose)
    return OK


def _read_options(args: argparse.Namespace) -> ClusterConfig:
    config = load_cluster_config(args.config) if args.config else ClusterConfig()
    given: dict[str, Any] = {name: getattr(args, name) for name in ("host", "port") if getattr(args, name) is not None}
    if not given:
        return config
    fields = config.model_dump()
    return build_cluster_config(**{**fields, "door": {**fields["door"], **given}})
