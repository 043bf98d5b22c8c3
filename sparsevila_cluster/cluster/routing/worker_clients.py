"""The workers as one router calls them: typed stubs with deadlines, who failed just now, and what runs at each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from sparsevila_cluster.cluster.messages import PoolName, WorkerReport
from sparsevila_cluster.cluster.routing.directory_client import DirectoryClient
from sparsevila_cluster.cluster.routing.placement import CircuitBreaker, PlacementContext
from sparsevila_cluster.cluster.routing.suspects import Suspects
from sparsevila_cluster.cluster.worker_api import DecodeWorkerApi, PrefillWorkerApi, WorkerApi
from sparsevila_cluster.cluster.worker_pool import WorkerPool, stub
from sparsevila_cluster.core.background_tasks import BackgroundTasks
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import DeadlineExceeded, LaneLost, SparseVilaError, Unavailable, WorkerClosed, WorkerLost
from sparsevila_cluster.core.requests import PrepareRequest

log = logging.getLogger(__name__)

Api = TypeVar("Api")
PAUSE_S = 0.1
# A turn that is taken up again waits this long until its former run is aborted.
ABORT_WITHIN_S = 2.0


class WorkerClients:
    """Both pools and the directory. Create and use it within one event loop."""

    def __init__(self, config: ClusterConfig, prefill: WorkerPool, decode: WorkerPool, directory: WorkerPool):
        self.config = config
        self._pools: dict[PoolName, WorkerPool] = {"prefill": prefill, "decode": decode}
        self.directory = DirectoryClient(directory, config.router.call_timeout_s)
        self.breaker = CircuitBreaker()
        self.suspects = Suspects(config.router.refuse_s)
        self.num_under_way: Counter[str] = Counter()
        self.background = BackgroundTasks()

    def placement(self, excluded: Collection[str] = (), subject: str = "") -> PlacementContext:
        """What placement may use now."""
        avoided = self.breaker.cooling_down(time.monotonic()) | self.suspects.watched_workers()
        return PlacementContext(self.num_under_way, avoided, excluded, subject)

    @contextmanager
    def busy(self, worker: str) -> Iterator[None]:
        """Something runs at `worker` for the length of the block."""
        self.num_under_way[worker] += 1
        try:
            yield
        finally:
            self.num_under_way[worker] -= 1
            if not self.num_under_way[worker]:
                del self.num_under_way[worker]

    # ---- stubs -------------------------------------------------------------------------------------------------------------

    def prefill(self, worker: str, deadline: Deadline) -> PrefillWorkerApi:
        """A prefill worker, called as `at` says."""
        return self._stub(PrefillWorkerApi, "prefill", worker, deadline)

    def decode(self, worker: str, deadline: Deadline, trips_breaker: bool = True) -> DecodeWorkerApi:
        """A decode worker, called as `at` says. trips_breaker: whether calls that fail count against it."""
        return self._stub(DecodeWorkerApi, "decode", worker, deadline, trips_breaker)

    def worker(self, pool: PoolName, worker: str, deadline: Deadline, trips_breaker: bool = True) -> WorkerApi:
        """What the workers of both pools have in common, called as `at` says."""
        return self._stub(WorkerApi, pool, worker, deadline, trips_breaker)

    def at(self, one: WorkerReport, deadline: Deadline) -> WorkerApi:
        """A worker of either pool.

        Short calls end within the caller's time and `call_timeout_s`, long ones and streams within the caller's time. Each raises
        WorkerLost, also for a worker that does not answer in time or falls silent, besides what the method raises.
        """
        return self.worker(one.pool, one.worker, deadline)

    def _stub(self, api: Callable[..., Api], pool: PoolName, worker: str, deadline: Deadline, trips_breaker: bool = True) -> Api:
        call = self._call if trips_breaker else self._call_once
        return stub(api, partial(call, pool, worker, deadline), partial(self._stream, pool, worker, deadline))

    async def _call(self, pool: PoolName, worker: str, deadline: Deadline, method: str, *args: Any) -> Any:
        left_s = deadline.remaining_s(f"{method} of {worker}")
        try:
            result = await self._call_once(pool, worker, deadline, method, *args)
        except DeadlineExceeded as error:
            if left_s <= self.config.router.call_timeout_s:
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

    async def _call_once(self, pool: PoolName, worker: str, deadline: Deadline, method: str, *args: Any) -> Any:
        within_s = min(deadline.remaining_s(f"{method} of {worker}"), self.config.router.call_timeout_s)
        return await self._pools[pool].call(worker, method, *args, within_s=within_s)

    async def _stream(self, pool: PoolName, worker: str, deadline: Deadline, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        within_s = deadline.remaining_s(f"{method} of {worker}")
        try:
            async with aclosing(self._pools[pool].stream(worker, method, *args, within_s=within_s)) as items:
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
        if isinstance(error, WorkerLost) and not isinstance(error, WorkerClosed):
            self.suspects.worker_died(worker, time.monotonic())
        if isinstance(error, WorkerLost):
            self.in_background(self.directory.once().forget_worker(worker), f"forgetting worker {worker}")

    def in_background(self, call: Coroutine[Any, Any, Any], what: str, **extra: str) -> asyncio.Task[None]:
        """Have a call made that nobody has to wait for. extra: fields of the log record should it fail."""
        return self.background.run(call, what, **extra)

    # ---- calls that several use --------------------------------------------------------------------------------------------

    async def workers(self, pool: PoolName, deadline: Deadline) -> tuple[WorkerReport, ...]:
        """The workers of a pool that report. None is an answer only after every worker has had time to report.

        Raises Unavailable (the directory does not answer), DeadlineExceeded, Cancelled.
        """
        while True:
            snapshot = await self.directory.snapshot(deadline)
            present = {one.worker for one in snapshot.workers}
            self.breaker.forget(present, time.monotonic())
            if snapshot.settled:
                self.suspects.workers_left(present, time.monotonic())
            if snapshot.of(pool) or snapshot.settled:
                return snapshot.of(pool)
            await asyncio.sleep(min(PAUSE_S, deadline.remaining_s(f"waiting for {pool} workers")))

    async def key_of(self, worker: str, request: PrepareRequest, deadline: Deadline) -> str:
        """The content key of what a request asks for, from one prefill worker, which reads the sources once."""
        request = replace(request, deadline_s=deadline.remaining_s(f"key_of of {worker}"))
        return await self.prefill(worker, deadline).key_of(request)

    async def abort_turn(self, turn_id: str, workers: Collection[str], deadline: Deadline) -> bool:
        """Whether any of these decode workers ran the turn. Those that do not answer soon have lost it."""
        soon = Deadline(min(ABORT_WITHIN_S, deadline.remaining_s(f"turn {turn_id}")))
        calls = (self.decode(worker, soon, trips_breaker=False).abort(turn_id) for worker in workers)
        return any(answer is True for answer in await asyncio.gather(*calls, return_exceptions=True))

    async def close_conversation(self, base: str, worker: str, tenant: str, is_present: bool, deadline: Deadline) -> bool:
        """Whether a decode worker had the conversation of this tenant. One that is out of reach is told when it reports again."""
        try:
            if is_present:
                return await self.decode(worker, deadline).close_conversation(base, tenant)
        except Unavailable as error:
            log.info("conversation %s was not closed at worker %s: %s", base, worker, error)
        await self.directory.once().mark_stale(base, worker, "")
        return False
