"""What Serve runs: one worker, or the directory, behind an `RpcServer`.

Workers are imported where they are made: building the application, and the directory, need no torch.

    constructed -> worker made and warm -> ready -> reports every `report_s` -> told to stop -> `__del__` closes the worker
Serve skips `__del__` when requests outlast the drain, and nothing runs after a kill: others must not rely on it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from sparsevila_cluster.cluster.directory import Directory
from sparsevila_cluster.cluster.on_ray.loopback import node_address, stay_on_loopback
from sparsevila_cluster.cluster.on_ray.ray_metrics import RayMetricsSink
from sparsevila_cluster.cluster.on_ray.serve_caller import ServeCaller, worker_pool
from sparsevila_cluster.cluster.rpc.rpc_server import Envelope, RpcServer
from sparsevila_cluster.cluster.worker_api import DecodeWorkerApi, DirectoryApi, PrefillWorkerApi
from sparsevila_cluster.cluster.worker_pool import pool_stub, stub
from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import SparseVilaError, Unavailable, WorkerLost, to_failure
from sparsevila_cluster.core.json_logging import log_to_stderr

if TYPE_CHECKING:
    from sparsevila_cluster.cluster.workers.decode_worker import DecodeWorker
    from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker

log = logging.getLogger(__name__)

# Names of deployments. Registry is the directory's.
PREFILL, DECODE, REGISTRY, ROUTER = "Prefill", "Decode", "Registry", "Router"
# The directory starts together with those who report to it that they cannot.
START_FAILURE_WITHIN_S = 10.0
STOP_WITHIN_S = 1.0
# Of the time that a replica has to stop: to let calls end. Serve kills it at the end of that time.
LEAVE_SHARE = 0.8


def replica_name() -> str:
    """The id of the replica that this process is: never used again."""
    return str(serve.get_replica_context().replica_id.unique_id)


def placed(config: ClusterConfig) -> ClusterConfig:
    """`config` with what depends on the node of this process."""
    if config.transport.host != "auto":
        return config
    transport = config.transport.model_copy(update={"host": node_address()})
    return config.model_copy(update={"transport": transport})


def freeze_what_stays() -> None:
    """Keep what was imported and loaded so far from the garbage collector, which else stops the process to look at all of it."""
    gc.collect()
    gc.freeze()


@asynccontextmanager
async def start_failures_reported(deployment: str, directory: DeploymentHandle) -> AsyncIterator[None]:
    """Tell the directory of an error that ends the block, in which a replica of `deployment` starts."""
    try:
        yield
    except SparseVilaError as error:
        api = stub(DirectoryApi, partial(ServeCaller(directory).call, None, within_s=START_FAILURE_WITHIN_S))
        try:
            await api.note_start_failure(deployment, to_failure(error))
        except SparseVilaError as unheard:
            log.warning("the directory was not told why a replica of %s cannot start: %s", deployment, unheard)
        raise


class Replica:
    """A worker, the directory or a router as others find it, through Serve (`ServeCaller`), and then call it (`RpcWorkerPool`)."""

    def __init__(self, config: ClusterConfig, worker: object, api: Callable[..., object]):
        self.name = replica_name()
        self._rpc = RpcServer(self.name, worker, api, config.transport.beat_s, placed(config).transport.host)
        self._leave_s = LEAVE_SHARE * config.drain_timeout_s

    async def call(self, addressee: str | None, method: str, args: tuple[Any, ...]) -> Envelope:
        """See `RpcServer.call`."""
        return await self._rpc.call(addressee, method, args)

    async def endpoint(self, addressee: str | None) -> Envelope:
        """Where this process answers by itself, or why it does not."""
        if addressee not in (None, self.name):
            return "failure", to_failure(WorkerLost(f"worker {addressee} is gone"))
        try:
            return "value", await self._rpc.listen()
        except (OSError, RuntimeError) as error:
            return "failure", to_failure(Unavailable(f"worker {self.name} cannot listen: {error}"))

    async def leave(self) -> None:
        """Let calls end and take no new ones: Serve does not know of them."""
        await self._rpc.leave(self._leave_s)


class DirectoryReplica(Replica):
    """The directory. There is one: Serve starts it again when it dies, and the workers' reports fill it."""

    def __init__(self, config: ClusterConfig, verbose: bool = False):
        stay_on_loopback()
        log_to_stderr(verbose, "registry")
        router = config.router
        directory = Directory(
            config.report_s, router.max_conversations, config.door.max_share, conversation_idle_s=router.conversation_idle_s
        )
        super().__init__(config, directory, DirectoryApi)
        freeze_what_stays()


class WorkerReplica(Replica):
    """What prefill and decode replicas share: reports, health, the end."""

    def _open(self, config: ClusterConfig, directory: DeploymentHandle, verbose: bool) -> dict[str, Any]:
        """Settle into this process; what every worker is made with, besides its name and configuration."""
        from sparsevila_cluster.cluster.on_ray.ray_object_store import RayObjectStore

        stay_on_loopback()
        log_to_stderr(verbose, replica_name())
        self._config = config
        self._directory_pool = worker_pool(directory, DirectoryApi)
        decode = serve.get_deployment_handle(DECODE, app_name=serve.get_replica_context().app_name)
        return {
            "object_store": RayObjectStore(ServeCaller(decode, by_reference=True)),
            "sink": RayMetricsSink(),
            "node": ray.get_runtime_context().get_node_id(),
        }

    def _directory(self, within_s: float | None = None) -> DirectoryApi:
        return pool_stub(DirectoryApi, self._directory_pool, None, within_s or self._config.router.call_timeout_s)

    def _begin(self, worker: PrefillWorker | DecodeWorker, api: Callable[..., object]) -> None:
        Replica.__init__(self, self._config, worker, api)
        self._hosted = worker
        freeze_what_stays()
        self._reporting = asyncio.create_task(self._report())

    async def check_health(self) -> None:
        """What Serve asks every `health_period_s`: three failures and it starts another replica instead of this one."""
        await self._hosted.check()
        if self._reporting.done():
            self._reporting.result()

    async def _report(self) -> None:
        full, answered = True, True
        while True:
            try:
                answer = await self._directory().report(self._hosted.report(full))
                again, full, answered = not full and answer.send_all, answer.send_all, True
                for conversation_id in answer.close:
                    await self._close_conversation(conversation_id)
            except SparseVilaError as error:
                again, full = False, True
                if answered:  # once, until it is there again
                    log.warning("the directory does not answer: %s", error)
                answered = False
            if not again:
                await asyncio.sleep(self._config.report_s)

    async def _close_conversation(self, conversation_id: str) -> None:
        """The worker is to forget a conversation; only decode workers have any."""

    async def __del__(self) -> None:
        self._reporting.cancel()
        try:
            await self._directory(STOP_WITHIN_S).forget_worker(self.name)
        except SparseVilaError as error:
            log.info("the directory was not told that worker %s stops: %s", self.name, error)
        await self.leave()
        await self._hosted.close()


class PrefillReplica(WorkerReplica):
    """One `PrefillWorker`."""

    async def __init__(self, config: ClusterConfig, directory: DeploymentHandle, verbose: bool = False):  # type: ignore[misc]
        async with start_failures_reported(PREFILL, directory):
            given = self._open(config, directory, verbose)
            from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker

            worker = PrefillWorker(replica_name(), placed(config), **given)
            await worker.warm()
        self._api: PrefillWorkerApi = worker
        self._begin(worker, PrefillWorkerApi)
        self._building_lanes = asyncio.create_task(self._build_lanes(worker))

    async def _build_lanes(self, worker: PrefillWorker) -> None:
        """Build lanes to decode workers as they appear: no client waits for one to be dialled."""
        known: set[ReceiverAddress] = set()
        while True:
            with suppress(SparseVilaError):  # `_report` says that the directory does not answer
                snapshot = await self._directory().snapshot()
                addresses = {one.address for one in snapshot.of("decode") if one.address is not None}
                await worker.meet(addresses - known)
                known = addresses
            await asyncio.sleep(self._config.report_s)


class DecodeReplica(WorkerReplica):
    """One `DecodeWorker`."""

    async def __init__(self, config: ClusterConfig, directory: DeploymentHandle, verbose: bool = False):  # type: ignore[misc]
        async with start_failures_reported(DECODE, directory):
            given = self._open(config, directory, verbose)
            from sparsevila_cluster.cluster.workers.decode_worker import DecodeWorker

            worker = DecodeWorker(replica_name(), placed(config), **given)
            await worker.warm()
        self._api: DecodeWorkerApi = worker
        self._begin(worker, DecodeWorkerApi)

    async def _close_conversation(self, conversation_id: str) -> None:
        await self._api.close_conversation(conversation_id)
