"""Tasks that nobody waits for: their owner keeps them, logs their errors, and ends them when it is closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from sparsevila_cluster.core.errors import SparseVilaError

log = logging.getLogger(__name__)


class BackgroundTasks:
    """Used within one event loop. Every task has a deadline of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def run(self, work: Coroutine[Any, Any, Any], what: str, **extra: str) -> asyncio.Task[None]:
        """Start it; the task, which raises nothing. extra: fields of the log record should it fail."""
        task = asyncio.get_running_loop().create_task(_logged(work, what, extra))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def settle(self, within_s: float) -> None:
        """Wait for what is under way, but no longer than `within_s`; cancel the rest."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=within_s)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _logged(work: Coroutine[Any, Any, Any], what: str, extra: dict[str, str]) -> None:
    try:
        await work
    except SparseVilaError as error:
        log.info("%s failed: %s", what, error, extra=extra)
    except Exception:
        log.exception("%s failed", what, extra=extra)
