"""One prefill or decode worker in this process, which answers until SIGTERM."""

from __future__ import annotations

import asyncio
import faulthandler
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from sparsevila_cluster.cluster.messages import WorkerReport
from sparsevila_cluster.cluster.rpc.rpc_server import RpcServer
from sparsevila_cluster.cluster.worker_api import DecodeWorkerApi, PrefillWorkerApi
from sparsevila_cluster.cluster.workers.decode_worker import DecodeWorker
from sparsevila_cluster.cluster.workers.prefill_job import PrefillJob
from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models.adapter import Model
from tests.chaos.kill_points import PLACES, set_trap

APIS = {"prefill": PrefillWorkerApi, "decode": DecodeWorkerApi}


class HostApi(Protocol):
    """What a test asks beside what routers ask."""

    async def report(self, full: bool, /) -> WorkerReport: ...

    async def arm(self, place: str, number: int, mark: str, token: str, /) -> None: ...

    async def disarm(self) -> None: ...

    async def memory(self) -> dict[str, Any]: ...


class CountedPrefillWorker(PrefillWorker):
    """Writes the key of everything that it made to a file, which outlives this process."""

    prefills = os.devnull

    def _record(self, job: PrefillJob, prefix: MediaPrefix, facts: dict[str, str]) -> dict[str, float]:
        if not job.reused and job.key != "warm":
            with open(self.prefills, "a") as file:
                file.write(f"{prefix.key}\n")
        return super()._record(job, prefix, facts)


class Host:
    """See `HostApi`."""

    def __init__(self, kind: str, worker: PrefillWorker | DecodeWorker):
        self.kind, self.worker = kind, worker
        self._traps: list[Any] = []

    def report(self, full: bool) -> WorkerReport:
        return self.worker.report(full)

    def arm(self, place: str, number: int, mark: str, token: str) -> None:
        self._traps.append(set_trap(self.worker.name, PLACES[self.kind, place], number, mark, token))

    def disarm(self) -> None:
        while self._traps:
            self._traps.pop()()

    async def memory(self) -> dict[str, Any]:
        """Bytes by owner. `is_idle`: nothing is under way, and every slot has exactly one owner."""
        worker = self.worker
        if isinstance(worker, PrefillWorker):
            kept = worker.copies.all()
            lanes = worker.sender.info()["lanes"]
            books: dict[str, Any] = {
                "used_bytes": worker.copies.used_bytes,
                "owned_bytes": sum(prefix.kv_bytes for prefix in kept),
                "media": sorted(prefix.key for prefix in kept),
                "turn_bytes": 0,
                "in_flight": 0,
                "busy": len(worker._jobs) + len(worker._transfers._transfers) + sum(len(lane["transfers"]) for lane in lanes),
            }
            check: Any = worker.copies.check_integrity
        else:
            books = await worker.async_engine.call(self._books)
            receiver = worker.receiver.info()
            open_states = ("granted", "sending", "landed", "verified")
            books["in_flight"] = receiver["bytes_in_flight"]
            books["transfers"] = receiver["transfers"]
            books["busy"] += sum(receiver["transfers"].get(state, 0) for state in open_states) + len(worker._transfers._transfers)

            def check() -> None:
                return None

            if not books["busy"]:
                await worker.async_engine.call(lambda engine: engine.check_integrity())
        books["is_idle"] = not books["busy"] and not books["in_flight"] and books["used_bytes"] == books["owned_bytes"]
        if books["is_idle"]:
            check()
        return books

    @staticmethod
    def _books(engine: Any) -> dict[str, Any]:
        return {
            "used_bytes": engine.prefixes.arena.used_bytes,
            "owned_bytes": sum(prefix.kv_bytes for prefix in engine.prefixes),
            "media": sorted(prefix.key for prefix in engine.prefixes),
            "turn_bytes": engine.conversations.arena.used_bytes,
            "conversations": len(engine.conversations),
            "busy": len(engine.turns),
        }


async def serve(kind: str, name: str, path: str, config: ClusterConfig, model: Model, prefills: str) -> None:
    """Answer calls and streams until SIGTERM; then close the worker. path: of the file that will say where."""
    faulthandler.enable()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    CountedPrefillWorker.prefills = prefills
    made = CountedPrefillWorker if kind == "prefill" else DecodeWorker
    worker = made(name, config, model=model)
    await worker.warm()
    servers = {
        "worker": RpcServer(name, worker, APIS[kind], config.transport.beat_s),
        "host": RpcServer(name, Host(kind, worker), HostApi),
    }
    endpoints = {whom: asdict(await server.listen()) for whom, server in servers.items()}
    Path(f"{path}.new").write_text(json.dumps(endpoints))
    os.rename(f"{path}.new", path)
    await stop.wait()
    for server in servers.values():
        await server.leave(0.0)
    await worker.close()
