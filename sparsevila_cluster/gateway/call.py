"""One call in progress, whatever protocol it came by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded
from sparsevila_cluster.gateway.authenticator import Principal

# Deadline of calls that start no work, where a client names none.
SHORT_CALL_S = 30.0

R = TypeVar("R")


class Call:
    """Who calls, and how long they wait.

    client_left_s: seconds until the client's own deadline, None without one; asked again each time. max_deadline_s: from arrival,
    whatever the client names. arrived_s: of `time.perf_counter`. method, peer: what was called from where, for logs.
    """

    def __init__(
        self,
        principal: Principal,
        client_left_s: Callable[[], float | None],
        max_deadline_s: float,
        method: str = "",
        peer: str = "",
    ):
        self.principal, self.method, self.peer = principal, method, peer
        self.arrived_s = time.perf_counter()
        self._client_left_s = client_left_s
        self._max_deadline_s = max_deadline_s

    def left_s(self, default_s: float) -> float:
        """Seconds until the client's deadline, or `default_s` after arrival without one. Raises DeadlineExceeded: none left."""
        waited_s = time.perf_counter() - self.arrived_s
        client_s = self._client_left_s()
        left_s = min(default_s - waited_s if client_s is None else client_s, self._max_deadline_s - waited_s)
        if left_s <= 0:
            raise DeadlineExceeded("the call's deadline has passed")
        return left_s

    @property
    def is_late(self) -> bool:
        """Whether the client's deadline has passed."""
        client_s = self._client_left_s()
        return client_s is not None and client_s <= 0

    async def wait_shortly(self, work: Awaitable[R], what: str) -> R:
        """The result of what should take milliseconds. Raises DeadlineExceeded."""
        try:
            within_s = self.left_s(SHORT_CALL_S)
        except DeadlineExceeded:
            if asyncio.iscoroutine(work):
                work.close()  # never begun
            raise
        return await wait_within(work, within_s, what)
