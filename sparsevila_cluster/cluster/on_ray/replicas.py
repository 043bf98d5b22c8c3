"""What Serve runs: one worker, or the registry, behind a clerk.

Knows: the life of a replica under Serve, and what may be asked of each kind. Does not know: how workers do it. The workers are
imported where they are made, so that building the application, and the registry, need no torch.

    constructed -> worker made and warm -> ready -> reports every `report_s` -> told to stop -> `__del__` closes the worker
Serve skips `__del__` when requests outlast the drain, and nothing runs after a kill: others must not rely on it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from sparsevila_cluster.cluster.directory import Directory
from sparsevila_cluster.cluster.on_ray.loopback import node_address, stay_on_loopback
from sparsevila_cluster.cluster.on_ray.ray_metrics import RayMetricsSink
from sparsevila_cluster.cluster.on_ray.ray_worker_pool import RayWorkerPool
from sparsevila_cluster.cluster.on_ray.rpc_server import RpcServer
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.core.json_logging import log_to_stderr

log = logging.getLogger(__name__)

PREFILL, DECODE, REGISTRY, ROUTER = "Prefill", "Decode", "Registry", "Router"

PREFILL_CALLS = ("drop", "info")
PREFILL_STREAMS = ("key_of", "make", "ship")
DECODE_CALLS = ("reserve", "release", "abort", "close_conversation", "media", "drop", "set_brownout", "info", "exchange")
DECODE_STREAMS = ("ask", "ship")
REGISTRY_CALLS = tuple(name for name, member in vars(Directory).items() if callable(member) and not name.startswith("_"))


def replica_name() -> str:
    """The id of the replica that this process is: never used again."""
    return str(serve.get_replica_context().replica_id.unique_id)


def placed(config: ClusterConfig) -> ClusterConfig:
    """`config` with what depends on the node of this process."""
    if config.transport.host != "auto":
        return config
    transport = config.transport.model_copy(update={"host": node_address()})
    return config.model_copy(update={"transport": transport})


class RegistryReplica(RpcServer):
    """The directory. There is one: Serve starts it again when it dies, and the workers' reports fill it."""

    def __init__(self, config: ClusterConfig, verbose: bool = False):
        stay_on_loopback()
        log_to_stderr(verbose, "registry")
        directory = Directory(config.report_s, config.router.max_conversations)
        super().__init__(replica_name(), directory, REGISTRY_CALLS, beat_s=config.transport.beat_s)


class WorkerReplica(RpcServer):
    """What prefill and decode replicas share: reports, health, the end."""

    def _open(self, config: ClusterConfig, registry: DeploymentHandle, verbose: bool) -> dict[str, Any]:
        """Settle into this process; what every worker is made with, besides its name and configuration."""
        from sparsevila_cluster.cluster.on_ray.ray_object_store import RayObjectStore

        stay_on_loopback()
        log_to_stderr(verbose, replica_name())
        self._config = config
        self._registry = RayWorkerPool(registry)
        decode = serve.get_deployment_handle(DECODE, app_name=serve.get_replica_context().app_name)
        return {
            "object_store": RayObjectStore(RayWorkerPool(decode, by_reference=True)),
            "sink": RayMetricsSink(),
            "node": ray.get_runtime_context().get_node_id(),
        }

    def _begin(self, worker: Any, calls: tuple[str, ...], streams: tuple[str, ...]) -> None:
        RpcServer.__init__(self, replica_name(), worker, calls, streams, self._config.transport.beat_s)
        self._reporting = asyncio.create_task(self._report())

    async def check_health(self) -> None:
        """What Serve asks every `health_period_s`: three failures and it starts another replica instead of this one."""
        await self.worker.check()
        if self._reporting.done():
            self._reporting.result()

    async def _report(self) -> None:
        full, heard = True, True
        while True:
            try:
                report = self.worker.report(full)
                report = await report if inspect.isawaitable(report) else report
                answer = await self._registry.call(None, "report", report, within_s=self._config.router.call_timeout_s)
                again, full, heard = not full and answer["send_all"], answer["send_all"], True
                for conversation_id in answer["close"]:
                    await self.worker.close_conversation(conversation_id)
            except SparseVilaError as error:
                again, full = False, True
                if heard:  # once, until it is there again
                    log.warning("the registry does not answer: %s", error)
                heard = False
            if not again:
                await asyncio.sleep(self._config.report_s)

    async def __del__(self) -> None:
        self._reporting.cancel()
        try:
            await self._registry.call(None, "forget_worker", self.name, within_s=1.0)
        except SparseVilaError as error:
            log.info("the registry was not told: %s", error)
        await self.worker.close()


class PrefillReplica(WorkerReplica):
    """One `PrefillWorker`."""

    async def __init__(self, config: ClusterConfig, registry: DeploymentHandle, verbose: bool = False):  # type: ignore[misc]
        given = self._open(config, registry, verbose)
        from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker

        worker = PrefillWorker(replica_name(), placed(config), **given)
        await worker.warm()
        self._begin(worker, PREFILL_CALLS, PREFILL_STREAMS)
        self._meeting = asyncio.create_task(self._meet())

    async def _meet(self) -> None:
        """Build lanes to decode workers as they appear: no client waits for one to be dialled."""
        met: set[Any] = set()
        while True:
            with suppress(SparseVilaError):  # `_report` says that the registry does not answer
                snapshot = await self._registry.call(None, "snapshot", within_s=self._config.router.call_timeout_s)
                docks = {one.address for one in snapshot.of("decode")}
                await self.worker.meet(docks - met)
                met = docks
            await asyncio.sleep(self._config.report_s)


class DecodeReplica(WorkerReplica):
    """One `DecodeWorker`."""

    async def __init__(self, config: ClusterConfig, registry: DeploymentHandle, verbose: bool = False):  # type: ignore[misc]
        given = self._open(config, registry, verbose)
        from sparsevila_cluster.cluster.workers.decode_worker import DecodeWorker

        worker = DecodeWorker(replica_name(), placed(config), **given)
        await worker.warm()
        self._begin(worker, DECODE_CALLS, DECODE_STREAMS)
