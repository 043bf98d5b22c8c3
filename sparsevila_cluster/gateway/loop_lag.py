"""How late the event loop is: what is due now waits that long, and each further call makes it later."""

from __future__ import annotations

import asyncio

from sparsevila_cluster.core.errors import QueueFull

PERIOD_S = 0.1
# What is left of a lag one period after it was over: half of it after 0.3 s.
DECAY = 0.8


class LoopLag:
    """Measures the loop it is made in. `close` ends it."""

    def __init__(self, max_lag_s: float):
        self._max_lag_s = max_lag_s
        self._loop = asyncio.get_running_loop()
        self._recent_s = 0.0
        self._schedule()

    def close(self) -> None:
        """Measure no longer. Idempotent."""
        self._timer.cancel()

    @property
    def lag_s(self) -> float:
        """Seconds that the loop is late, now or lately."""
        return max(self._recent_s, self._loop.time() - self._due_s)

    def check(self) -> None:
        """Raises QueueFull: the loop is later than `max_lag_s`."""
        if (lag_s := self.lag_s) > self._max_lag_s:
            most = f"max_loop_lag_s = {self._max_lag_s:g}"
            raise QueueFull(f"the server is {lag_s:.2f} s late, more than {most}", retry_after_s=round(max(1.0, lag_s), 1))

    def _schedule(self) -> None:
        self._due_s = self._loop.time() + PERIOD_S
        self._timer = self._loop.call_at(self._due_s, self._tick)

    def _tick(self) -> None:
        self._recent_s = max(self._loop.time() - self._due_s, self._recent_s * DECAY)
        self._schedule()
