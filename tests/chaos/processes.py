"""Workers in processes of their own, spoken to over a Unix socket: what dies here dies as a real process does.

Knows: frames of pickled calls, streams, and what it looks like when the other side is gone. Does not know: what workers do. The
pool has the interface of `cluster.pool.Pool`, so that a router runs over it without noticing.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

from sparsevila_cluster.errors import DeadlineExceeded, SparseVilaError, WorkerLost, from_failure, to_failure
from sparsevila_cluster.patience import wait_within

ROOT = Path(__file__).parent.parent.parent
HEAD = struct.Struct("<I")
START_S = 60.0


async def send(writer: asyncio.StreamWriter, value: object) -> None:
    data = pickle.dumps(value)
    writer.write(HEAD.pack(len(data)) + data)
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> Any:
    return pickle.loads(await reader.readexactly(HEAD.unpack(await reader.readexactly(HEAD.size))[0]))


# ---- the worker's side ---------------------------------------------------------------------------------------------------------


async def serve(worker: object, path: str) -> None:
    """Answer calls and streams of `worker`'s methods until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks: dict[int, asyncio.Task[None]] = {}
        try:
            while True:
                number, kind, method, args = await receive(reader)
                if kind == "cancel":
                    if number in tasks:
                        tasks[number].cancel()
                    continue
                task = asyncio.ensure_future(_work(worker, writer, number, kind, method, args))
                tasks[number] = task
                task.add_done_callback(lambda _, number=number: tasks.pop(number, None))
        except asyncio.IncompleteReadError:
            pass
        finally:
            for task in tasks.values():
                task.cancel()
            writer.close()

    server = await asyncio.start_unix_server(connected, path, limit=1 << 26)
    await stop.wait()
    server.close()
    await worker.close()  # type: ignore[attr-defined]


async def _work(worker: object, writer: asyncio.StreamWriter, number: int, kind: str, method: str, args: Sequence[Any]) -> None:
    try:
        called = getattr(worker, method)(*args)
        if kind == "stream":
            try:
                async for item in called:
                    await send(writer, (number, "item", item))
            finally:
                await called.aclose()
            await send(writer, (number, "end", None))
        else:
            await send(writer, (number, "end", await called if hasattr(called, "__await__") else called))
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:
        if not isinstance(error, SparseVilaError):
            import traceback

            traceback.print_exc()
        await send(writer, (number, "error", to_failure(error)))


# ---- the router's side ---------------------------------------------------------------------------------------------------------


class Process:
    """One worker process. `kill`, `stop` and `resume` are signals; `close` ends it in order and asserts that it could."""

    def __init__(self, kind: str, name: str, folder: Path, config_json: str, pause: str = ""):
        self.kind, self.name = kind, name
        self.path = str(folder / f"{name}.sock")
        self.marker = folder / f"{name}.paused"
        self.log = folder / f"{name}.log"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.chaos.worker", kind, name, self.path, config_json, pause, str(self.marker)]
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
        self._pending: dict[int, asyncio.Queue[tuple[str, Any]]] = {}
        self._numbers = itertools.count()
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self) -> None:
        until_s = time.monotonic() + START_S
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self.path, limit=1 << 26)
                break
            except OSError:
                assert self.popen.poll() is None, self.log.read_text()
                assert time.monotonic() < until_s, f"{self.name} did not start: {self.log.read_text()}"
                await asyncio.sleep(0.02)
        self._reading = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, kind, value = await receive(reader)
                if number in self._pending:
                    self._pending[number].put_nowait((kind, value))
        except (asyncio.IncompleteReadError, ConnectionError):
            for queue in self._pending.values():
                queue.put_nowait(("lost", None))
            self._writer = None

    async def converse(self, kind: str, method: str, args: Sequence[Any], within_s: float) -> AsyncGenerator[Any, None]:
        """Items of a stream, or the one result of a call. Ends after `within_s` with DeadlineExceeded."""
        if self._writer is None:
            raise WorkerLost(f"{self.name} is gone")
        number = next(self._numbers)
        queue = self._pending[number] = asyncio.Queue()
        until_s, over = time.monotonic() + within_s, False
        try:
            try:
                await send(self._writer, (number, kind, method, args))
            except ConnectionError:
                raise WorkerLost(f"{self.name} is gone") from None
            while not over:
                what, value = await wait_within(queue.get(), max(0.0, until_s - time.monotonic()), f"{method} of {self.name}")
                over = what != "item"
                if what == "lost":
                    raise WorkerLost(f"{self.name} is gone")
                if what == "error":
                    raise from_failure(value)
                if kind == "call" or what == "item":
                    yield value
        finally:
            del self._pending[number]
            if not over and self._writer is not None:
                try:
                    await send(self._writer, (number, "cancel", "", ()))
                except ConnectionError:
                    pass

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def stop(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    async def paused(self, within_s: float = 30.0) -> None:
        """Wait until the process stands at its pause."""
        until_s = time.monotonic() + within_s
        while not self.marker.exists():
            assert time.monotonic() < until_s, f"{self.name} never came to its pause: {self.log.read_text()[-2000:]}"
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        if self.popen.poll() is None:
            self.resume()
            self.popen.terminate()
            try:
                await asyncio.to_thread(self.popen.wait, 20)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"{self.name} did not end: {self.log.read_text()[-2000:]}") from None
        if self._reading is not None:
            self._reading.cancel()


class ProcessPool:
    """The workers of one kind: `cluster.pool.Pool` over their sockets."""

    def __init__(self, processes: Sequence[Process] = ()):
        self.processes = {process.name: process for process in processes}

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        async for value in self._of(worker).converse("call", method, args, within_s):
            return value
        raise WorkerLost(f"{worker} said nothing")

    async def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        conversation = self._of(worker).converse("stream", method, args, within_s)
        try:
            async for value in conversation:
                yield value
        finally:
            await conversation.aclose()

    def _of(self, worker: str | None) -> Process:
        if worker is None:
            alive = [process for process in self.processes.values() if process.popen.poll() is None]
            if not alive:
                raise WorkerLost("no worker is left")
            return alive[0]
        if worker not in self.processes:
            raise WorkerLost(f"{worker} is gone")
        return self.processes[worker]


__all__ = ["DeadlineExceeded", "Process", "ProcessPool", "serve"]
