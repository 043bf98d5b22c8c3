"""Whether everything that a cluster's configuration names exists, before anything is started. `auto` needs no torch."""

from __future__ import annotations

from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.engine.config_check import check_choices


def check_cluster(config: ClusterConfig) -> None:
    """Check what only the tables of methods and of transports know.

    Raises:
        BadConfig: the message names the value and what is legal.
    """
    check_choices(config.engine)
    if config.transport.kind != "auto":
        from sparsevila_cluster.transport import check_transport  # whose links need torch

        check_transport(config.transport)
