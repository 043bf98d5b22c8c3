"""Workers in processes of their own, called as routers call replicas: what dies here dies as a real process does.

`ProcessPool` is a `WorkerPool`, so that a router runs over it.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from sparsevila_cluster.cluster.rpc.endpoint import WorkerEndpoint
from sparsevila_cluster.cluster.rpc.rpc_worker_pool import RpcWorkerPool
from sparsevila_cluster.core.errors import WorkerLost
from tests.chaos.worker_main import APIS, HostApi
from tests.processes import is_stopped

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0


class WorkerForker:
    """The process that forks workers."""

    def __init__(self, checkpoint: Path, folder: Path):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
        self.folder = folder
        self.prefills = folder / "prefills"
        self.prefills.touch()
        command = [sys.executable, "-m", "tests.chaos.worker_forker", str(checkpoint)]
        self._popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")

    def _read(self, name: str) -> int:
        assert self._popen.stdout is not None
        line = self._popen.stdout.readline()
        assert line, "the forker is gone"
        return int(json.loads(line)[name])

    def spawn(self, kind: str, name: str, config: dict[str, Any], port: int = 0) -> Process:
        assert self._popen.stdin is not None
        path = self.folder / f"{name}.json"
        path.unlink(missing_ok=True)
        job = {
            "kind": kind, "name": name, "config": config, "endpoints": str(path), "log": str(self.folder / f"{name}.log"),
            "prefills": str(self.prefills), "port": port,
        }  # fmt: skip
        self._popen.stdin.write(json.dumps(job) + "\n")
        self._popen.stdin.flush()
        return Process(kind, name, self._read("pid"), path, Path(job["log"]))

    def num_prefills(self, key: str = "") -> int:
        """Media prefixes made so far, of this key or of all, by all workers that ever were."""
        return sum(key in ("", made) for made in self.prefills.read_text().splitlines())

    def close(self) -> None:
        """End it, and with it every worker that is left."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(30)


class Process:
    """One worker process, and the connections to it. path: of the file that says where it answers, once it does."""

    def __init__(self, kind: str, name: str, pid: int, path: Path, log: Path):
        self.kind, self.name, self.pid, self.path, self.log = kind, name, pid, path, log
        self._pidfd = os.pidfd_open(pid)
        self.pools: dict[str, RpcWorkerPool] = {}

    async def connect(self, silence_s: float) -> None:
        """Wait until it listens. silence_s: of a stream that has lost its worker."""
        until_s = time.monotonic() + START_S
        while not self.path.exists():
            assert self.lives, f"{self.name} died at once: {self.log_tail()}"
            assert time.monotonic() < until_s, f"{self.name} did not start: {self.log_tail()}"
            await asyncio.sleep(0.01)
        endpoints = {whom: WorkerEndpoint(**fields) for whom, fields in json.loads(self.path.read_text()).items()}
        for whom, api in {"worker": APIS[self.kind], "host": HostApi}.items():
            self.pools[whom] = RpcWorkerPool(self.kind, api, partial(_known, endpoints[whom]), silence_s)

    async def ask(self, whom: str, method: str, *args: Any, within_s: float = 20.0) -> Any:
        return await self.pools[whom].call(self.name, method, *args, within_s=within_s)

    # ---- signals -----------------------------------------------------------------------------------------------------------

    @property
    def lives(self) -> bool:
        return not select.select([self._pidfd], [], [], 0)[0]

    @property
    def stopped(self) -> bool:
        return self.lives and is_stopped(self.pid)

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    async def wait_for_signal(self, number: int, within_s: float = 10.0) -> None:
        """Wait until a signal has done what it does."""
        until_s = time.monotonic() + within_s
        while self.lives if number == signal.SIGKILL else not self.stopped:
            assert time.monotonic() < until_s, f"{self.name} did not react to signal {number}"
            await asyncio.sleep(0.002)

    def log_tail(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    async def close(self, within_s: float = 30.0) -> None:
        """SIGTERM; kill it, and say so, if it does not end by itself."""
        if self.lives:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            ended = await asyncio.to_thread(select.select, [self._pidfd], [], [], within_s)
            if not ended[0]:
                self.signal(signal.SIGKILL)
                raise AssertionError(f"{self.name} did not end: {self.log_tail()}")
        for pool in self.pools.values():
            await pool.close()
        os.close(self._pidfd)


async def _known(endpoint: WorkerEndpoint, worker: str | None, within_s: float) -> WorkerEndpoint:
    return endpoint


class ProcessPool:
    """The workers of one kind: a `WorkerPool` over their processes. `silence_s`: of a stream that has lost its worker."""

    def __init__(self, silence_s: float):
        self.processes: dict[str, Process] = {}
        self.silence_s = silence_s

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        return await self._of(worker).call(worker, method, *args, within_s=within_s)

    async def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        async with aclosing(self._of(worker).stream(worker, method, *args, within_s=within_s)) as items:
            async for item in items:
                yield item

    def _of(self, worker: str | None) -> RpcWorkerPool:
        process = self.processes.get(worker) if worker is not None else next(iter(self.processes.values()), None)
        if process is None:
            raise WorkerLost(f"worker {worker} is gone")
        return process.pools["worker"]
