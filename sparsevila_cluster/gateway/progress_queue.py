"""Reports of progress on their way from whoever works to a client who may read slowly.

Knows: the newest report of each stage. Does not know: what the stages do. ProgressQueue in between are skipped: nothing waits and
nothing piles up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress


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

    async def __aiter__(self) -> AsyncIterator[tuple[str, int, int]]:
        while True:
            with self._lock:
                newest, self._newest = self._newest, {}
            for stage, (done, total) in newest.items():
                yield stage, done, total
            if newest:
                continue
            if self._closed:
                return
            await self._wake.wait()
            self._wake.clear()

    def _rouse(self) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads
            self._loop.call_soon_threadsafe(self._wake.set)
