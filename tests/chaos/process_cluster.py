"""A whole cluster of real worker processes, with the router and the directory in the test's own process."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from sparsevila_cluster.cluster.directory import Directory
from sparsevila_cluster.cluster.routing.router import ClusterPipeline
from sparsevila_cluster.core.cluster_config import build_cluster_config
from sparsevila_cluster.core.errors import SparseVilaError, WorkerLost
from sparsevila_cluster.core.metrics import Tally
from tests.chaos.worker_processes import Process, ProcessPool, WorkerForker

SILENCE_S = 2.0
LEASE_S = 3.0
# What a loaded machine may take on top of a lease before bytes that are not back count as lost.
SLACK_S = 5.0


def config_of(checkpoint: Path) -> dict[str, Any]:
    return {
        "engine": {
            "model": str(checkpoint), "device": "cpu", "fps": 4.0, "prefill_chunk": 16, "prefix_bytes": 2 * 2**20,
            "turn_bytes": 2 * 2**20, "close_timeout_s": 10.0, "prepare_timeout_s": 60.0, "turn_timeout_s": 60.0,
            "sparsity": {"prune_keep": 0.6, "retrieve_keep": 0.4},
        },
        "transport": {
            "kind": "gloo", "host": "127.0.0.1", "chunk_bytes": 64 * 1024, "op_timeout_s": 3.0, "dial_timeout_s": 1.5,
            "beat_s": 0.2, "silence_s": 1.5, "lease_s": LEASE_S,
        },
        "prefill": {"copy_bytes": 2 * 2**20},
        "decode": {"replicate_after": 0},
        "router": {"call_timeout_s": 6.0, "refuse_s": 2.0},
        "report_s": 0.1,
        "content_secret": "of all workers, which are made from these fields one by one",
    }  # fmt: skip


class LocalDirectoryPool:
    """`WorkerPool` of the one directory, which can be lost and comes back empty."""

    def __init__(self, report_s: float):
        self._report_s = report_s
        self.directory: Directory | None = Directory(report_s)

    def lose(self) -> None:
        self.directory = None

    def come_back(self) -> None:
        self.directory = Directory(self._report_s)

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        await asyncio.sleep(0)
        if self.directory is None:
            raise WorkerLost("the directory is gone")
        return getattr(self.directory, method)(*args)

    def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        raise AssertionError("the directory has no streams")


class ProcessCluster:
    def __init__(self, forker: WorkerForker, fields: dict[str, Any]):
        self.forker, self.fields = forker, fields
        self.config = build_cluster_config(**fields)
        self.pools = {"prefill": ProcessPool(SILENCE_S), "decode": ProcessPool(SILENCE_S)}
        self.directory_pool = LocalDirectoryPool(self.config.report_s)
        self.sink = Tally()
        self.pipeline = ClusterPipeline(
            self.config,
            self.pools["prefill"],
            self.pools["decode"],
            self.directory_pool,
            self.sink,  # type: ignore[arg-type]
        )
        self._numbers = itertools.count()
        self._traps = itertools.count()
        self._reports: dict[str, asyncio.Task[None]] = {}

    # ---- workers -----------------------------------------------------------------------------------------------------------

    @property
    def processes(self) -> list[Process]:
        return [process for pool in self.pools.values() for process in pool.processes.values()]

    async def fill(self, prefill: int = 2, decode: int = 2) -> None:
        """Replace what is missing, and wait until the directory knows everybody who is there."""
        for kind, num in (("prefill", prefill), ("decode", decode)):
            for name in [name for name, one in self.pools[kind].processes.items() if not one.lives]:
                await self.remove(name)
            for _ in range(num - len(self.pools[kind].processes)):
                await self.spawn(kind)
        await self.until(lambda: self.reported == {one.name for one in self.processes}, "a report of everybody")

    @property
    def reported(self) -> set[str]:
        directory = self.directory_pool.directory
        return set() if directory is None else {one.worker for one in directory.snapshot().workers}

    async def spawn(self, kind: str, name: str = "", port: int = 0) -> Process:
        name = name or f"{kind}-{next(self._numbers)}"
        process = self.forker.spawn(kind, name, self.fields, port)
        await process.connect(self.pools[kind].silence_s)
        self.pools[kind].processes[name] = process
        self._reports[name] = asyncio.ensure_future(self._report(process))
        return process

    async def _report(self, process: Process) -> None:
        """What a replica does by itself: report to the directory, everything if asked."""
        full = True
        while process.lives:
            try:
                report = await process.ask("host", "report", full)
                answer = await self.directory_pool.call(None, "report", report, within_s=1.0)
                full = answer.send_all
                for conversation_id in answer.close:
                    await process.ask("worker", "close_conversation", conversation_id)
            except SparseVilaError:
                full = True
            await asyncio.sleep(self.config.report_s)

    async def remove(self, name: str) -> None:
        """Take a worker that is dead, or to be killed now, out of its pool."""
        pool = next(pool for pool in self.pools.values() if name in pool.processes)
        process = pool.processes.pop(name)
        if process.lives:
            process.signal(signal.SIGKILL)
            await process.wait_for_signal(signal.SIGKILL)
        self._reports.pop(name).cancel()
        await process.close()

    # ---- traps -------------------------------------------------------------------------------------------------------------

    async def arm(self, kind: str, place: str, number: int, mark: str) -> Path:
        """Set a trap in every worker of a pool; the token says who was caught."""
        token = self.forker.folder / f"trap-{next(self._traps)}"
        processes = [one for one in self.pools[kind].processes.values() if one.lives]
        await asyncio.gather(*(one.ask("host", "arm", place, number, mark, str(token)) for one in processes))
        return token

    async def caught(self, token: Path, number: int, within_s: float = 20.0) -> Process:
        """Wait until a worker is in the trap, and dead or stopped."""
        await self.until(lambda: token.exists() and bool(token.read_text()), "a worker in the trap", within_s)
        name = token.read_text()
        process = next(one for one in self.processes if one.name == name)
        await process.wait_for_signal(number)
        return process

    async def disarm(self) -> None:
        await asyncio.gather(*(one.ask("host", "disarm") for one in self.processes if one.lives and not one.stopped))

    # ---- at rest -----------------------------------------------------------------------------------------------------------

    async def memory_of_all(self) -> dict[str, dict[str, Any]]:
        """The memory of every worker that can answer."""
        awake = [one for one in self.processes if one.lives and not one.stopped]
        answers = await asyncio.gather(*(one.ask("host", "memory") for one in awake))
        return {one.name: memory for one, memory in zip(awake, answers, strict=True)}

    async def wait_until_idle(self, media: set[str], within_s: float = LEASE_S + SLACK_S) -> None:
        """Wait until every byte is back: no turn, no conversation, no transfer, no media but these. AssertionError: it is not."""

        def free(memory: dict[str, Any]) -> bool:
            return memory["is_idle"] and memory["turn_bytes"] == 0 and set(memory["media"]) <= media

        until_s = time.monotonic() + within_s
        while True:
            memory_of_all = await self.memory_of_all()
            if all(free(memory) for memory in memory_of_all.values()):
                return
            held = {name: memory for name, memory in memory_of_all.items() if not free(memory)}
            assert time.monotonic() < until_s, f"bytes are not back after {within_s:g} s: {held}"
            await asyncio.sleep(0.02)

    async def until(self, holds: Any, what: str, within_s: float = 20.0) -> None:
        until_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < until_s, f"{what}: not within {within_s:g} s"
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        await self.pipeline.close()
        for task in self._reports.values():
            task.cancel()
        failures = []
        for process in self.processes:
            try:
                await process.close()
            except AssertionError as error:
                failures.append(str(error))
        assert not failures, failures
