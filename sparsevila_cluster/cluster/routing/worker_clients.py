"""The workers as one router sees them: how to call them, who failed just now, and what it has under way at each.

Knows: pools, the breaker, the registry, and which failures are a worker's and not the caller's. Does not know: what is asked of
them, or why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any, Literal

from sparsevila_cluster.cluster.messages import WorkerReport
from sparsevila_cluster.cluster.routing.directory_client import DirectoryClient
from sparsevila_cluster.cluster.routing.placement import CircuitBreaker, PlacementContext
from sparsevila_cluster.cluster.worker_pool import WorkerPool
from sparsevila_cluster.core.background_tasks import BackgroundTasks
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import DeadlineExceeded, LaneLost, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.requests import PrepareRequest

log = logging.getLogger(__name__)

Kind = Literal["prefill", "decode"]
PAUSE_S = 0.1


class WorkerClients:
    """Both pools and the registry. Create and use it within one event loop."""

    def __init__(self, config: ClusterConfig, prefill: WorkerPool, decode: WorkerPool, registry: WorkerPool):
        self.config = config
        self.pools: dict[Kind, WorkerPool] = {"prefill": prefill, "decode": decode}
        self.registry = DirectoryClient(registry, config.router.call_timeout_s)
        self.breaker = CircuitBreaker()
        self.under_way: Counter[str] = Counter()
        self.errands = BackgroundTasks()

    def scene(self, tried: Collection[str] = (), about: str = "") -> PlacementContext:
        """What placement may know now."""
        return PlacementContext(self.under_way, self.breaker.cooling(time.monotonic()), tried, about)

    @contextmanager
    def busy(self, worker: str) -> Iterator[None]:
        """Something runs at `worker` for the length of the block."""
        self.under_way[worker] += 1
        try:
            yield
        finally:
            self.under_way[worker] -= 1
            if not self.under_way[worker]:
                del self.under_way[worker]

    # ---- calls -------------------------------------------------------------------------------------------------------------

    async def call(self, kind: Kind, worker: str, method: str, *args: Any, deadline: Deadline) -> Any:
        """A method of one worker that takes milliseconds, within the caller's time and `call_timeout_s`.

        Raises:
            WorkerLost, also for a worker that does not answer within `call_timeout_s`. Whatever the method raises.
        """
        left_s = deadline.remaining_s(f"{method} of {worker}")
        most_s = self.config.router.call_timeout_s
        try:
            result = await self.pools[kind].call(worker, method, *args, within_s=min(left_s, most_s))
        except DeadlineExceeded as error:
            if left_s <= most_s:
                raise
            self.failed(worker, WorkerLost(str(error)))
            raise WorkerLost(f"worker {worker} did not answer: {error}") from error
        except LaneLost:
            raise  # of the way to another worker
        except Unavailable as error:
            self.failed(worker, error)
            raise
        self.breaker.succeeded(worker)
        return result

    async def work(self, kind: Kind, worker: str, method: str, *args: Any, deadline: Deadline) -> Any:
        """A method of one worker that may take as long as the caller has: a stream of one item, which tells whether it lives.

        Raises:
            WorkerLost, also for a worker that has fallen silent. Whatever the method raises.
        """
        async with aclosing(self.stream(kind, worker, method, *args, deadline=deadline)) as items:
            async for item in items:
                return item
        raise WorkerLost(f"worker {worker} ended {method} without a word")

    async def key_of(self, worker: str, request: PrepareRequest, deadline: Deadline) -> str:
        """The content key of what a request asks for, from one prefill worker, which reads the sources once."""
        request = replace(request, deadline_s=deadline.remaining_s(f"key_of of {worker}"))
        key: str = await self.work("prefill", worker, "key_of", request, deadline=deadline)
        return key

    async def stream(self, kind: Kind, worker: str, method: str, *args: Any, deadline: Deadline) -> AsyncGenerator[Any, None]:
        """What a method of one worker yields. Raises as the pool's `stream`."""
        within_s = deadline.remaining_s(f"{method} of {worker}")
        try:
            async with aclosing(self.pools[kind].stream(worker, method, *args, within_s=within_s)) as items:
                async for item in items:
                    self.breaker.succeeded(worker)
                    yield item
        except WorkerLost as error:
            self.failed(worker, error)
            raise

    def failed(self, worker: str, error: SparseVilaError) -> None:
        """`worker` did not do what it was asked: avoid it for a while; one that is gone is gone for every router."""
        log.warning("worker %s failed: %s", worker, error, extra={"at": worker})
        self.breaker.failed(worker, time.monotonic())
        if isinstance(error, WorkerLost):
            self.later(self.registry.tell("forget_worker", worker), f"forgetting {worker}")

    def later(self, work: Any, what: str, **extra: str) -> None:
        """Have a call made that nobody waits for."""
        self.errands.run(work, what, **extra)

    def tell_later(self, kind: Kind, worker: str, method: str, *args: Any, **extra: str) -> None:
        """Call a method of one worker that nobody waits for. A worker that is gone has nothing left to be told."""
        call = self.pools[kind].call(worker, method, *args, within_s=self.config.router.call_timeout_s)
        self.errands.run(call, f"{method} of {worker}", **extra)

    # ---- who is there ------------------------------------------------------------------------------------------------------

    async def workers(self, kind: Kind, deadline: Deadline) -> tuple[WorkerReport, ...]:
        """The workers of a pool that report. That there are none is believed only when they had time to.

        Raises Unavailable (the registry does not answer), DeadlineExceeded, Cancelled.
        """
        while True:
            snapshot = await self.registry.snapshot(deadline)
            self.breaker.forget({one.worker for one in snapshot.workers}, time.monotonic())
            if snapshot.of(kind) or snapshot.settled:
                return snapshot.of(kind)
            await asyncio.sleep(min(PAUSE_S, deadline.remaining_s(f"waiting for {kind} workers")))
