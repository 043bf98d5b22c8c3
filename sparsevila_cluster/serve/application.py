"""The application that Serve runs: the directory, prefill and decode workers, and routers with a gRPC server each.

`serve run sparsevila_cluster.app:build config=cluster.yaml` and the `args:` of a Serve file end in `build`.

    Router (GrpcServer + ClusterPipeline) --> Prefill, Decode --> Registry (the directory)
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from sparsevila_cluster.cluster.check_cluster import check_cluster
from sparsevila_cluster.cluster.on_ray.loopback import stay_on_loopback
from sparsevila_cluster.cluster.on_ray.ray_metrics import RayMetricsSink
from sparsevila_cluster.cluster.on_ray.replicas import (
    DECODE,
    PREFILL,
    REGISTRY,
    ROUTER,
    DecodeReplica,
    DirectoryReplica,
    PrefillReplica,
    Replica,
    freeze_what_stays,
    replica_name,
    start_failures_reported,
)
from sparsevila_cluster.cluster.on_ray.serve_caller import worker_pool
from sparsevila_cluster.cluster.worker_api import DecodeWorkerApi, DirectoryApi, PrefillWorkerApi, RouterApi
from sparsevila_cluster.core.cluster_config import ClusterConfig, PoolConfig, cluster_config_of, load_cluster_config
from sparsevila_cluster.core.errors import BadConfig, Unavailable
from sparsevila_cluster.core.json_logging import log_to_stderr
from sparsevila_cluster.serve.local_ray import REPLICA_ENV

# Engines and the gateway refuse calls, for they know their queues.
MAX_CALLS = 100_000
# Constructors that fail again and again: a model that cannot be loaded does not get better.
MAX_START_ATTEMPTS = 3
# Where the configuration leaves it open and there is more than one core: one may die.
AUTO_ROUTERS = 2
PIN_ROUTER = "sparsevila_cluster.cluster.on_ray.replica_pinning:PinRouter"


def build(args: dict[str, Any]) -> Application:
    """The application for `serve run` and Serve files.

    args: {"config": path of a YAML file}, or what may stand in such a file. Raises BadConfig.
    """
    if "config" not in args:
        return application(with_routers(cluster_config_of(dict(args))), REPLICA_ENV, verbose=True)
    if len(args) > 1:
        raise BadConfig(f"config names a file that holds everything; besides it: {', '.join(sorted(set(args) - {'config'}))}")
    return application(with_routers(load_cluster_config(args["config"])), REPLICA_ENV, verbose=True)


def with_routers(config: ClusterConfig, spool_follows: bool = False) -> ClusterConfig:
    """`config` with the number of its routers, which share a port and the folder of uploads if they are several.

    spool_follows: `door.spool_dir` will be set where it is not. Raises BadConfig: several that could not share.
    """
    door, num, has_spool = config.door, config.router.replicas, spool_follows or config.door.spool_dir is not None
    if num == 0:
        can_share = sys.platform == "linux" and door.port and has_spool
        num = AUTO_ROUTERS if can_share and _num_cores() > 1 else 1
    if num > 1 and not door.port:
        raise BadConfig(f"door.port must be 1 to 65535 for router.replicas = {num}: they all listen on it; got 0")
    if num > 1 and not has_spool:
        raise BadConfig(
            f"door.spool_dir must be a folder that all routers and prefill workers reach for router.replicas = {num}: "
            "what is uploaded to one is prepared through another; got none"
        )
    return config.model_copy(update={"router": config.router.model_copy(update={"replicas": num})})


def _num_cores() -> float:
    """Of all nodes of Ray where it is connected to, else of this machine."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("CPU", 1.0))
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def application(config: ClusterConfig, env: dict[str, str], verbose: bool = False) -> Application:
    """All deployments of `config`.

    env: what their processes need beside what they inherit; with an empty one Ray takes processes that it has ready. verbose:
    replicas log what they do, not only what goes wrong. The number of routers is known (`with_routers`).

    Raises BadConfig: a choice that no table has.
    """
    check_cluster(config)
    config = config.with_secret()  # among the constructors' arguments, which Serve keeps: replicas that it restarts have it, too
    directory = _deployment(DirectoryReplica, REGISTRY, config, 1, _actor(0.0, env), verbose).bind(config, verbose)
    pools = [
        _deployment(kind, name, config, pool.replicas, _worker(pool, env), verbose).bind(config, directory, verbose)
        for kind, name, pool in ((PrefillReplica, PREFILL, config.prefill), (DecodeReplica, DECODE, config.decode))
    ]
    routers = _actor(config.router.num_cpus, env)
    router = _deployment(RouterReplica, ROUTER, config, config.router.replicas, routers, verbose)
    return router.bind(config, *pools, directory, verbose)


def _deployment(
    kind: type[Replica], name: str, config: ClusterConfig, replicas: int, actor: dict[str, Any], verbose: bool
) -> serve.Deployment:
    make: Any = serve.deployment(
        name=name,
        num_replicas=replicas,
        ray_actor_options=actor,
        max_ongoing_requests=MAX_CALLS,
        max_constructor_retry_count=MAX_START_ATTEMPTS,
        health_check_period_s=config.health_period_s,
        health_check_timeout_s=config.health_timeout_s,
        graceful_shutdown_timeout_s=config.drain_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config={"enable_access_log": False, "log_level": "INFO" if verbose else "WARNING"},
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": PIN_ROUTER}),
    )
    deployment: serve.Deployment = make(kind)
    return deployment


def _worker(pool: PoolConfig, env: dict[str, str]) -> dict[str, Any]:
    placing: dict[str, Any] = {"label_selector": pool.labels} if pool.labels else {}
    return _actor(pool.num_cpus, env) | {"num_gpus": pool.num_gpus, "resources": pool.resources} | placing


def _actor(num_cpus: float, env: dict[str, str]) -> dict[str, Any]:
    return {"num_cpus": num_cpus} | ({"runtime_env": {"env_vars": env}} if env else {})


class RouterReplica(Replica):
    """One router: a `ClusterPipeline` and the gRPC server in front of it, which listens by itself."""

    async def __init__(  # type: ignore[misc]
        self,
        config: ClusterConfig,
        prefill: DeploymentHandle,
        decode: DeploymentHandle,
        directory: DeploymentHandle,
        verbose: bool = False,
    ):
        stay_on_loopback()
        log_to_stderr(verbose, replica_name())
        async with start_failures_reported(ROUTER, directory):
            from sparsevila_cluster.cluster.routing.router import ClusterPipeline
            from sparsevila_cluster.gateway.grpc import GrpcServer
            from sparsevila_cluster.gateway.service import VideoQAService

            sink, silence_s = RayMetricsSink(), config.transport.silence_s
            apis = (prefill, PrefillWorkerApi), (decode, DecodeWorkerApi), (directory, DirectoryApi)
            self._pools = [worker_pool(handle, api, silence_s) for handle, api in apis]
            self._pipeline = ClusterPipeline(config, self._pools[0], self._pools[1], self._pools[2], sink, replica_name())
            self._service = VideoQAService(self._pipeline, config.door, config.engine, sink)
            self._server = GrpcServer(self._service, config.door)
            self._is_draining = False
            api: RouterApi = self
            super().__init__(config, api, RouterApi)
            freeze_what_stays()
            try:
                await self._server.start()
            except BaseException:
                await self._service.close()
                raise

    async def state(self) -> dict[str, Any]:
        """{"port": of the gRPC server, "ready": whether clients can be served}."""
        return {"port": self._server.port, "ready": await self._pipeline.ready()}

    async def drain(self, grace_s: float) -> None:
        """Take no more calls, and let those in progress finish for `grace_s`."""
        self._is_draining = True
        await self._server.stop(grace_s)
        await self._service.close()

    async def check_health(self) -> None:
        """What Serve asks every `health_period_s`. Raises Unavailable: the gRPC server does not listen."""
        if not (self._server.healthy or self._is_draining):
            raise Unavailable("the gRPC server does not listen any more")

    async def __del__(self) -> None:
        await self.drain(0.0)
        await self._pipeline.close()
        for pool in self._pools:
            await pool.close()
