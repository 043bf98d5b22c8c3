"""A Ray of our own on this machine: loopback only, quiet, in a private folder, gone with the process that started it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsevila_cluster.core.cluster_config import ClusterConfig, PoolConfig
from sparsevila_cluster.core.config import MIB
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.core.private_folder import own_folder

OBJECT_STORE_BYTES = 512 * MIB
# For the processes of every node that runs replicas. Handles have no event loop of their own: gRPC wakes every loop of a process
# for each message. Whether a replica lives is asked for 1 s, not 0.1 s, which a busy machine does not hold.
REPLICA_ENV = {
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",
}
# Ray starts its workers at nice 15, which is for batch jobs. Replicas serve, and share the machine with their clients.
# Without the third, Ray takes 127.0.0.1 for this machine's address in the network, and every port is open to that.
LOCAL_ENV = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def local_ray(config: ClusterConfig, verbose: bool = False) -> Iterator[Path]:
    """Ray and Serve for `config` on 127.0.0.1 while the context lasts; yields a folder that only this user may look into.

    It goes with the context; that of a server that was killed goes when the next one starts.

    What the pools ask for counts as there: workers share the processors. Ray's token authentication is on, as it is by
    default, with a token that no file holds.
    """
    import ray
    from ray import serve
    from ray._private import ray_constants

    # Only now: in this process Serve has read its settings, which must leave the routing loop apart.
    added = {name: value for name, value in {**LOCAL_ENV, **REPLICA_ENV}.items() if name not in os.environ}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # stays: Ray reads it once per process
    folder, lock = own_folder("sv-", "/tmp" if Path("/tmp").is_dir() else None)  # short: sockets lie in it
    os.environ.update(added)
    networked, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False  # as its variable says in children
    try:
        set_ray_log_level(verbose)
        pools: list[PoolConfig] = [config.prefill, config.decode]
        num_cpus = sum(pool.replicas * pool.num_cpus for pool in pools) + config.router.replicas * config.router.num_cpus
        ray.init(
            num_cpus=max(os.cpu_count() or 1, int(num_cpus + 1)),
            resources=_total_resources(pools),
            labels=_labels(pools),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            logging_level=logging.INFO if verbose else logging.CRITICAL,
            log_to_driver=verbose,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "r"),  # Ray opens its folder to everybody; that above stays private
            _metrics_export_port=config.metrics_port or None,
        )
        try:
            _check_gpus(sum(pool.replicas * pool.num_gpus for pool in pools), ray.cluster_resources().get("GPU", 0.0))
            serve.start(proxy_location="Disabled")
            yield folder
        finally:
            try:
                call_within(config.drain_timeout_s + GRACE_S, serve.shutdown)
            finally:
                ray.shutdown()
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = networked
        for name in added:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def set_ray_log_level(verbose: bool) -> None:
    """What Ray and Serve log in this process: INFO and above if `verbose`, else CRITICAL."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.CRITICAL)


def call_within(most_s: float, call: Callable[[], object]) -> None:
    """Wait for `call`, which Ray may never answer, for at most `most_s`. What it raises is dropped."""

    def run() -> None:
        with suppress(Exception):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(most_s)


def _total_resources(pools: list[PoolConfig]) -> dict[str, float]:
    names = {name for pool in pools for name in pool.resources}
    return {name: sum(pool.resources.get(name, 0.0) * pool.replicas for pool in pools) for name in names}


def _labels(pools: list[PoolConfig]) -> dict[str, str]:
    """One node has every label; two pools that want different values of one cannot both be on it."""
    labels: dict[str, str] = {}
    for pool in pools:
        for name, value in pool.labels.items():
            if labels.setdefault(name, value) != value:
                raise BadConfig(f"one machine cannot be both {name}={labels[name]!r} and {name}={value!r}; legal: one of them")
    return labels


def _check_gpus(wanted: float, available: float) -> None:
    if wanted > available:
        raise BadConfig(f"the pools ask for {wanted:g} GPUs; this machine has {available:g}")
