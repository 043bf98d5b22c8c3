"""`sparsevila serve`: its options, and the configuration that they and a file make.

Knows: what a user types. Does not know: how a cluster is started; Ray is imported only once the configuration is whole.
"""

from __future__ import annotations

import argparse
from typing import Any

from sparsevila_cluster.cli.options import OK
from sparsevila_cluster.core.cluster_config import ClusterConfig, GatewayConfig, build_cluster_config, load_cluster_config


def add_to(commands: Any) -> None:
    """The parser of `serve`."""
    door = GatewayConfig.model_fields
    serve = commands.add_parser("serve", allow_abbrev=False, help="answer over gRPC, with pools of workers")
    serve.add_argument("--config", metavar="FILE", help="YAML file of a cluster (the bundled model on this machine)")
    serve.add_argument("--address", help="a Ray cluster that is there, as auto or HOST:PORT (one of its own)")
    serve.add_argument("--host", help=f"{door['host'].description} ({door['host'].default})")
    serve.add_argument("--port", type=int, metavar="P", help=f"{door['port'].description} ({door['port'].default})")
    serve.add_argument("-v", "--verbose", action="store_true", help="logs of all processes on stderr")
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    config = _read_options(args)
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
