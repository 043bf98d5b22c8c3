"""One thread that owns an engine: others post functions, which it calls between steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from sparsevila_cluster.core.errors import Unavailable

log = logging.getLogger(__name__)


class Steppable(Protocol):
    """An engine that works step by step."""

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        ...

    def step(self) -> None:
        """Do some work."""
        ...


E = TypeVar("E", bound=Steppable)
R = TypeVar("R")


class EngineThread(Generic[E]):
    """Runs `engine.step()` while it is not idle, and posted calls between steps, all in one thread."""

    def __init__(self, engine: E, name: str):
        self._engine = engine
        self._inbox: queue.SimpleQueue[tuple[Callable[[E], object], Future] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._busy_since_s: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def stuck_s(self) -> float:
        """How long the step or the call that runs now has taken; 0 between them. From any thread."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.perf_counter() - since_s

    def post(self, call: Callable[[E], R]) -> Future[R]:
        """Have `call(engine)` run in the engine's thread. The future fails with Unavailable after `close`."""
        future: Future[R] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(Unavailable("the engine is closed"))
            else:
                self._inbox.put((call, future))
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop after the current step; calls still in the inbox fail with Unavailable."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            try:
                # An idle engine sleeps until a call arrives; a busy one only takes what is there already.
                item = self._inbox.get(block=self._engine.idle)
            except queue.Empty:
                self._busy_since_s = time.perf_counter()
                self._step()
                self._busy_since_s = None
                continue
            if item is None:
                break
            self._busy_since_s = time.perf_counter()
            self._call(*item)
            self._busy_since_s = None
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None:
                item[1].set_exception(Unavailable("the engine is closed"))

    def _call(self, call: Callable[[E], object], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(call(self._engine))
        except BaseException as error:
            future.set_exception(error)

    def _step(self) -> None:
        try:
            self._engine.step()
        except Exception:
            # step() handles the failures of turns; whatever else happens must not end the thread that all turns wait for.
            log.exception("engine step failed")
