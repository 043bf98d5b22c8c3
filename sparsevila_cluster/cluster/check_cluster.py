"""Whether everything that a cluster's configuration names exists, before anything is started. Needs no torch."""

from __future__ import annotations

from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.engine.config_check import check_choices


def check_cluster(config: ClusterConfig) -> None:
    """Check what only the tables of methods know.

    Raises:
        BadConfig: the message names the value and what is legal.
    """
    check_choices(config.engine)
