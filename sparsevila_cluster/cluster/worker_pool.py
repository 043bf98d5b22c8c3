"""How one part of the cluster speaks to the workers of another: method calls and streams, by worker's name.

Knows: what a call promises. Does not know: Ray, processes, or what the methods do.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol


class WorkerPool(Protocol):
    """The workers of one kind. `worker` names one of them; None lets the pool choose."""

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        """What the method returns. Cancelling the call cancels it in the worker.

        Raises:
            WorkerLost: no such worker, or it died meanwhile. DeadlineExceeded: no answer within `within_s` seconds. Whatever the
            method raises, of the classes in errors.py; anything else arrives as Internal.
        """
        ...

    def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        """What the method yields, in order. Leaving the iteration early, or cancelling it, cancels it in the worker.

        `within_s` bounds the whole stream. Raises as `call` does, also between two items.
        """
        ...
