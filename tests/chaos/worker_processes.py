"""Workers in processes of their own, spoken to over Unix sockets: what dies here dies as a real process does.

`ProcessPool` is a `WorkerPool`, so that a router runs over it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from sparsevila_cluster.core.errors import DeadlineExceeded, WorkerLost, from_failure
from tests.chaos.unix_socket_rpc import LIMIT_BYTES, receive, send
from tests.processes import is_stopped

ROOT = Path(__file__).parent.parent.parent
START_S = 60.0
LOST = ("lost", None)


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
        path = self.folder / f"{name}.sock"
        path.unlink(missing_ok=True)
        job = {
            "kind": kind, "name": name, "config": config, "socket": str(path), "log": str(self.folder / f"{name}.log"),
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
    """One worker process, and the connection to it."""

    def __init__(self, kind: str, name: str, pid: int, path: Path, log: Path):
        self.kind, self.name, self.pid, self.path, self.log = kind, name, pid, path, log
        self._pidfd = os.pidfd_open(pid)
        self._answers: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._numbers = itertools.count()
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        """Wait until it listens."""
        until_s = time.monotonic() + START_S
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self.path), limit=LIMIT_BYTES)
                break
            except OSError:
                assert self.lives, f"{self.name} died at once: {self.log_tail()}"
                assert time.monotonic() < until_s, f"{self.name} did not start: {self.log_tail()}"
                await asyncio.sleep(0.01)
        self._reading = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, envelope = await receive(reader)
                if number in self._answers:
                    self._answers[number].put_nowait(envelope)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._writer = None
            for queue in self._answers.values():
                queue.put_nowait(LOST)

    async def envelopes(
        self, whom: str, method: str, args: tuple[Any, ...], within_s: float, silence_s: float
    ) -> AsyncGenerator[tuple[str, Any], None]:
        """What an `RpcServer` answers. Raises WorkerLost: gone, or silent for `silence_s`. DeadlineExceeded."""
        number = next(self._numbers)
        queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._answers[number] = queue
        until_s, over = time.monotonic() + within_s, False
        try:
            if self._writer is None:
                raise WorkerLost(f"worker {self.name} is gone")
            send(self._writer, (number, whom, method, args))
            while not over:
                left_s = until_s - time.monotonic()
                try:
                    async with asyncio.timeout(min(left_s, silence_s)):
                        kind, value = await queue.get()
                except TimeoutError:
                    if left_s <= silence_s:
                        raise DeadlineExceeded(f"{method} of {self.name} took longer than {within_s:g} s") from None
                    raise WorkerLost(f"worker {self.name} has not been heard of for {silence_s:g} s") from None
                over = whom != "stream" or kind in ("end", "failure", "lost")
                if kind == "lost":
                    raise WorkerLost(f"worker {self.name} is gone")
                if kind == "failure":
                    raise from_failure(value)
                yield kind, value
        finally:
            del self._answers[number]
            if not over and self._writer is not None:
                send(self._writer, (number, "cancel", "", ()))

    async def ask(self, whom: str, method: str, *args: Any, within_s: float = 20.0) -> Any:
        async for _, value in self.envelopes(whom, method, args, within_s, within_s):
            return value
        raise AssertionError("a call has one answer")

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
        if self._reading is not None:
            self._reading.cancel()
        os.close(self._pidfd)


class ProcessPool:
    """The workers of one kind: a `WorkerPool` over their sockets. `silence_s`: of a stream that has lost its worker."""

    def __init__(self, silence_s: float):
        self.processes: dict[str, Process] = {}
        self._silence_s = silence_s

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        return await self._of(worker).ask("worker", method, *args, within_s=within_s)

    async def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        envelopes = self._of(worker).envelopes("stream", method, args, within_s, self._silence_s)
        try:
            async for kind, value in envelopes:
                if kind == "value":
                    yield value
        finally:
            await envelopes.aclose()

    def _of(self, worker: str | None) -> Process:
        process = self.processes.get(worker) if worker is not None else next(iter(self.processes.values()), None)
        if process is None:
            raise WorkerLost(f"worker {worker} is gone")
        return process
