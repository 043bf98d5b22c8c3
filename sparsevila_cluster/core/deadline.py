"""Deadlines: for what is awaited, and for work in another thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import TypeVar

from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded

R = TypeVar("R")

# Work ends at its own deadline; a caller waits this much longer before it gives up on whoever does the work.
GRACE_S = 5.0


async def wait_within(work: Awaitable[R], within_s: float, what: str) -> R:
    """The result of `work`, which is cancelled when it takes longer.

    Raises:
        DeadlineExceeded: "`what` took longer than `within_s` s". Whatever `work` raises.
    """
    try:
        # Not asyncio.wait_for: before Python 3.12 it swallows a cancellation that comes together with the result.
        async with asyncio.timeout(within_s):
            return await work
    except TimeoutError as error:
        raise DeadlineExceeded(f"{what} took longer than {within_s:g} s") from error


def outliving(work: Future[R]) -> asyncio.Future[R]:
    """`work` of another thread, to be awaited here. Cancelling the wait does not end it; its error is then ignored."""
    waited = asyncio.wrap_future(work)
    waited.add_done_callback(lambda done: done.cancelled() or done.exception())
    return asyncio.shield(waited)


class Deadline:
    """When work in another thread must end: `deadline_s` from now, or as soon as it is cancelled."""

    def __init__(self, deadline_s: float):
        self.deadline_s = deadline_s
        self._until_s = time.perf_counter() + deadline_s
        self._cancelled = threading.Event()

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, 0 once it is over."""
        return max(0.0, self._until_s - time.perf_counter())

    def cancel(self) -> None:
        """End the work at its next `check`. Idempotent, from any thread."""
        self._cancelled.set()

    def check(self, what: str) -> None:
        """Called by the work now and then; `what` names it in errors.

        Raises:
            Cancelled, DeadlineExceeded.
        """
        if self._cancelled.is_set():
            raise Cancelled(f"{what} was cancelled")
        if time.perf_counter() > self._until_s:
            raise DeadlineExceeded(f"{what} took longer than {self.deadline_s:g} s")

    def remaining_s(self, what: str) -> float:
        """Seconds until the deadline, more than 0. Raises as `check` does."""
        self.check(what)
        return max(1e-3, self._until_s - time.perf_counter())
