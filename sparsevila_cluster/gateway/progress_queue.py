"""Reports of progress on their way from a worker thread to a client who may read slowly.

Only the newest report of each stage is kept: nothing waits and nothing piles up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple


class StageProgress(NamedTuple):
    """`done` of `total` steps of a stage of preparing media."""

    stage: str
    done: int
    total: int


class ProgressQueue:
    """Made in the event loop that iterates over it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._lock = threading.Lock()
        self._newest: dict[str, tuple[int, int]] = {}
        self._closed = False

    def put(self, stage: str, done: int, total: int) -> None:
        """From any thread; never waits and never raises."""
        with self._lock:
            sleeping, self._newest[stage] = not self._newest, (done, total)
        if sleeping:
            self._rouse()

    def close(self) -> None:
        """No more reports: the iteration ends behind those that wait."""
        self._closed = True
        self._rouse()

    async def __aiter__(self) -> AsyncIterator[StageProgress]:
        while True:
            with self._lock:
                newest, self._newest = self._newest, {}
            for stage, (done, total) in newest.items():
                yield StageProgress(stage, done, total)
            if newest:
                continue
            if self._closed:
                return
            await self._wake.wait()
            self._wake.clear()

    def _rouse(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads
            self._loop.call_soon_threadsafe(self._wake.set)
