"""Decoding where it can do no harm: in processes of their own, with limits on memory and time.

idle -> a caller takes it -> job and open file -> reply and shared memory -> idle
                               '-> no reply in time, a crash, nonsense: killed; the next caller gets a fresh one
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from math import prod
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded, Internal, SparseVilaError, TooLarge, Unavailable
from sparsevila_cluster.media.cost import MediaCost
from sparsevila_cluster.media.decoder_process import START_TIMEOUT_S, DecoderProcess
from sparsevila_cluster.media.fd_channel import Message
from sparsevila_cluster.media.frames import Decoded
from sparsevila_cluster.media.media_source import Blob, DecodeDeadline

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

log = logging.getLogger(__name__)

R = TypeVar("R")

# A decoder checks its own deadline between packets; this is how much later it is killed.
GRACE_S = 0.5
TYPED = {error.__name__: error for error in (BadMedia, TooLarge, DeadlineExceeded, Internal)}


class DecoderSandbox:
    """Owns the decoding processes: as many as there are callers at once, of which `max_idle` stay warm in between.

    Safe to use from many threads. `close()` it; forgotten, or with its own process gone, it leaves nothing behind either.
    """

    def __init__(self, max_idle: int = 2):
        self.max_idle = max_idle
        self.num_started = 0
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._idle: list[DecoderProcess] = []
        self._all: set[DecoderProcess] = set()
        # The kernel ends a process with the thread that started it: this thread lives as long as the sandbox.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="decode-sandbox")
        self._finalizer = weakref.finalize(self, _end_all, self._all, self._pid)

    def warm(self) -> None:
        """Have a process ready, or on its way, for the next caller. Does not wait for it."""
        self._after_fork()
        with self._lock:
            needed = not self._idle and not self._closed
        if needed:
            self._give_back(self._start())

    def decode(self, blob: Blob, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline) -> Decoded:
        """`decoding.decode` in a process of its own. The frames are memory that was shared with it and is now the caller's alone.

        A process that has to start first does so on its own time, not on the deadline's.

        Raises:
            BadMedia, TooLarge, DeadlineExceeded: as `open_media`; also for bytes that crash, exhaust or stop their decoder.
            Internal: a bug of ours in there. Unavailable: the sandbox is closed, or no process starts.
        """
        return self._run(blob, _read_frames, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)

    def measure(self, blob: Blob, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline) -> MediaCost:
        """`decoding.measure` in a process of its own. Raises as `decode`."""
        return self._run(blob, _read_cost, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)

    def _run(
        self, blob: Blob, read: Callable[[Message, int | None, str], R], *, fps: float, max_frames: int, limits: MediaLimits,
        deadline: DecodeDeadline,
    ) -> R:  # fmt: skip
        deadline.check()
        job: Message = {
            "name": blob.name, "kind": blob.kind, "fps": fps, "max_frames": max_frames, "timeout_s": deadline.timeout_s,
            "left_s": deadline.left_s(), "limits": {name: _small(value) for name, value in limits.model_dump().items()},
            "measure": read is _read_cost,
        }  # fmt: skip
        process = self._submit(job, blob.file.fileno())
        try:
            reply, fd = process.receive(job["left_s"] + GRACE_S)
            outcome = _read(reply, fd, blob.name, read)
        except (EOFError, OSError, ValueError, LookupError, TypeError) as error:  # a timeout is an OSError
            raise self._explain(process, error, blob.name, limits) from error
        except BaseException:  # the caller was interrupted; nobody will ask for this reply any more
            self._discard(process)
            raise
        if reply.get("retire") or isinstance(outcome, Internal):
            self._discard(process)
        else:
            self._give_back(process)
        if isinstance(outcome, Internal):
            log.error("decoding %s failed:\n%s", blob.name, process.stderr_text())
        if isinstance(outcome, SparseVilaError):
            raise outcome
        return outcome

    def pids(self) -> list[int]:
        """The processes there are now."""
        with self._lock:
            return sorted(process.pid for process in self._all)

    def close(self) -> None:
        """Kill all processes; callers that wait for one get Unavailable. Idempotent."""
        self._after_fork()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = self._all.difference(idle)
        for process in busy:
            process.kill()  # the thread that waits for it does the rest
        for process in idle:
            self._discard(process)
        self._starter.shutdown(wait=False)

    def __enter__(self) -> DecoderSandbox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _submit(self, job: Message, fd: int) -> DecoderProcess:
        """A process that has got the job. One that died while it was idle is nobody's fault: another one gets it."""
        for _ in range(2 + self.max_idle):
            process = self._take()
            try:
                process.wait_ready()
                process.send(job, fd)
                return process
            except SparseVilaError:
                self._discard(process)
                self._check_open()
                raise
            except OSError:
                self._discard(process)
            except BaseException:
                self._discard(process)
                raise
        raise Unavailable("decoding processes die before they get any work")

    def _take(self) -> DecoderProcess:
        self._after_fork()
        while True:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            if process is None:
                return self._start()
            if process.alive:
                return process
            self._discard(process)

    def _start(self) -> DecoderProcess:
        self._check_open()
        starting: Future[DecoderProcess] | None = None
        try:
            starting = self._starter.submit(DecoderProcess)
            process = starting.result(START_TIMEOUT_S)
        except (OSError, RuntimeError) as error:  # of the system; of an interpreter that shuts down
            if starting is not None:
                starting.add_done_callback(_end_late)
            raise Unavailable(f"cannot start a process to decode in: {error}") from error
        with self._lock:
            self._all.add(process)
            self.num_started += 1
            closed = self._closed
        if closed:
            self._discard(process)
        self._check_open()
        return process

    def _give_back(self, process: DecoderProcess) -> None:
        with self._lock:
            keep = not self._closed and len(self._idle) < self.max_idle
            if keep:
                self._idle.append(process)
        if not keep:
            self._discard(process)

    def _discard(self, process: DecoderProcess) -> None:
        process.end()
        with self._lock:
            self._all.discard(process)

    def _explain(self, process: DecoderProcess, error: Exception, name: str, limits: MediaLimits) -> SparseVilaError:
        """What to tell the caller of a process that did not answer well; ends it."""
        hung = isinstance(error, TimeoutError)
        died = None if hung else process.wait_for_exit() if isinstance(error, EOFError | OSError) else "answered nonsense"
        self._discard(process)
        if self._closed:
            return Unavailable("decoding was ended: its sandbox is closed")
        if words := process.stderr_text():
            log.warning("decoding %s: %s", name, words)
        if hung:
            return DeadlineExceeded(
                f"{name}: decoding hung and was killed; it did not end within decode_timeout_s = {limits.decode_timeout_s:g} s"
            )
        if died == "SIGKILL":  # and not by us: so ends who takes the system's last memory
            return TooLarge(
                f"{name}: the process that decoded it was killed by the system (SIGKILL), as happens when memory runs out; "
                f"decode_memory_bytes = {limits.decode_memory_bytes}"
            )
        return BadMedia(f"{name} is broken in a way that crashes its decoder ({died})")

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the decode sandbox is closed")

    def _after_fork(self) -> None:
        """A forked copy of this process has none of its children and threads: it begins anew."""
        if self._pid != os.getpid():
            self._begin()


def _end_all(processes: set[DecoderProcess], pid: int) -> None:
    if pid == os.getpid():
        for process in list(processes):
            process.end()


def _end_late(starting: Future[DecoderProcess]) -> None:
    if starting.exception() is None:
        starting.result().end()


def _small(value: Any) -> Any:
    return min(value, 2**63 - 1) if isinstance(value, int) else value


def _read(reply: Message, fd: int | None, name: str, read: Callable[[Message, int | None, str], R]) -> R | SparseVilaError:
    """What a reply tells of, or its error. Nothing in it is trusted: ValueError, LookupError, TypeError."""
    try:
        if "error" in reply:
            return TYPED[reply["error"]](str(reply["message"]))
        return read(reply, fd, name)
    except TooLarge as error:
        return error
    finally:
        if fd is not None:
            os.close(fd)


def _read_cost(reply: Message, fd: int | None, name: str) -> MediaCost:
    decoded, sampled = reply["decoded"], reply["sampled"]
    if type(decoded) is not int or type(sampled) is not int or min(decoded, sampled) < 0:
        raise ValueError(f"{decoded!r} pixels to decode, {sampled!r} of them sampled")
    return MediaCost(decoded, sampled)


def _read_frames(reply: Message, fd: int | None, name: str) -> Decoded:
    if fd is None:
        raise ValueError("no frames came")
    if hasattr(fcntl, "F_ADD_SEALS"):
        with suppress(OSError):  # not a memfd: a system without them
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    num, height, width, channels = shape = tuple(reply["shape"])
    times_s = np.frombuffer(reply["times_s"], np.float64).copy()
    if min(shape) < 1 or channels != 3 or times_s.shape != (num,) or os.fstat(fd).st_size < prod(shape):
        raise ValueError(f"{num} frames of {width} x {height} x {channels} at {len(times_s)} times")
    try:
        memory = mmap.mmap(fd, prod(shape))
    except OSError as error:
        raise TooLarge(f"{name}: {num} frames of {width} x {height} pixels do not fit into memory: {error.strerror}") from error
    return Decoded(np.frombuffer(memory, np.uint8).reshape(shape), times_s, float(reply["duration_s"]))
