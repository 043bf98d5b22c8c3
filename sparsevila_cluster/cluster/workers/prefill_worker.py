"""A worker that makes media prefixes, keeps a copy of each and sends them to decode workers.

Knows: one engine and its thread, the host copies, what is under way. Does not know: Ray, other workers beyond the tickets that it
is given, questions or conversations. Create and use it within one event loop.

    make: sources -> [PrefillEngine] -> rows in the host copy, and onto the lane while later rows are still computed
    ship: the host copy -> a lane
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from sparsevila_cluster.cluster.messages import Load, WorkerReport
from sparsevila_cluster.cluster.workers.host_copies import HostCopies
from sparsevila_cluster.cluster.workers.prefill_job import PrefillJob, ProgressChannel
from sparsevila_cluster.cluster.workers.stage_metrics import tell_memory, tell_prefill
from sparsevila_cluster.cluster.workers.transfer_tasks import TransferTasks
from sparsevila_cluster.cluster.workers.warm_up import tiny_picture
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, NotFound, QueueFull, SparseVilaError, WorkerLost
from sparsevila_cluster.core.metrics import MetricsSink, Tally
from sparsevila_cluster.core.requests import MediaHandle, MediaSource, PrepareRequest
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.engine.prompt_rows import chunk_bounds
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import PREFILL_PARTS, Model
from sparsevila_cluster.transport import KVSender, ObjectStore, ReceiverAddress, TransferTicket

log = logging.getLogger(__name__)

R = TypeVar("R")


class PrefillWorker:
    def __init__(
        self,
        name: str,
        config: ClusterConfig,
        *,
        model: Model | None = None,
        object_store: ObjectStore | None = None,
        sink: MetricsSink | None = None,
        node: str = "",
    ):
        """name: of this worker, as others know it. model: loaded with the parts that a prefill needs if None."""
        engine = config.engine
        self.name, self.config, self.node = name, config, node
        self.sink: MetricsSink = Tally() if sink is None else sink
        self.model = model or load_model(engine.model_dir, PREFILL_PARTS, **engine.loading)
        self.engine = PrefillEngine(self.model, engine, wire=config.transport.quantization)
        spec, device = self.model.spec, self.model.device
        self.copies = HostCopies(spec, config.prefill.copy_bytes)
        # On a CPU the prefill writes into the copy itself.
        self.staging = None if device.type == "cpu" else HostCopies(spec, engine.prefix_bytes, device)
        self.sender = KVSender(name, spec, config.transport, object_store=object_store, sink=self.sink)
        self.num_prefills = 0
        self._sending = TransferTasks(self.sender, config.transport.dial_timeout_s)
        self._prefill_thread = ThreadPoolExecutor(1, thread_name_prefix="prefill")
        self._key_thread = ThreadPoolExecutor(1, thread_name_prefix="key")
        self._making: dict[asyncio.Task, PrefillJob] = {}
        self._running: ProgressChannel | None = None
        self._reported: int | None = None
        self._closed = False

    # ---- media prefixes ----------------------------------------------------------------------------------------------------

    async def key_of(self, request: PrepareRequest) -> str:
        """The content key of what `make` would make. Raises BadMedia, BadRequest, TooLarge, DeadlineExceeded, WorkerLost."""
        within_s = self._within_s(request)
        return await wait_within(self._in(self._key_thread, self.engine.key_of, request), within_s, "reading the sources")

    async def make(
        self, request: PrepareRequest, key: str, ticket: TransferTicket
    ) -> AsyncGenerator[tuple[str, str, int, int] | tuple[str, MediaHandle, dict[str, Any]], None]:
        """Make the prefix of `key` and send it; ("progress", stage, done, total) now and then, last ("made", handle, report).

        report: the TransferReport as a dict. A copy that is there already is sent as it is. Leaving the iteration early ends the
        prefill at its next report of progress and aborts the shipment.

        Raises:
            BadMedia, BadRequest, TooLarge: media that cannot be used. QueueFull: too many wait, or no room for the copy or at the
            other end. LaneLost: the worker of the ticket is gone; the copy stays, to be shipped to another one. DataLoss,
            Incompatible, NotFound (the ticket): as `ship`. DeadlineExceeded, WorkerLost (closed), Internal.
        """
        self._check_open()
        if self._num_waiting >= self.config.engine.max_waiting:
            raise QueueFull(f"{self._num_waiting} preparations wait already; the limit is {self.config.engine.max_waiting}")
        deadline = Deadline(self._within_s(request))
        words = ProgressChannel(deadline)
        preparation = Preparation(request, self._guarded(words))
        making = PrefillJob(preparation, key, ticket, self.copies, self.staging, self.sender)
        # A task of its own: who leaves early does not wait until the prefill has noticed.
        task = asyncio.ensure_future(self._make(making, deadline, words, ticket))
        self._making[task] = making
        task.add_done_callback(self._made)
        try:
            async with aclosing(words.until(task)) as progress:
                async for stage, done, total in progress:
                    yield "progress", stage, done, total
            handle, report = await task
            yield "made", handle, report
        finally:
            deadline.cancel()
            self._end(task, making, "the caller left")

    def _end(self, task: asyncio.Task, making: PrefillJob, reason: str) -> None:
        """Have a preparation end soon. One that is in the prefill thread cannot be cancelled: it ends at its next report."""
        if making.done:
            task.cancel()
        elif not task.done() and making.shipment is not None:
            self._sending.abort(making.shipment, reason)

    @property
    def _num_waiting(self) -> int:
        """Preparations in line: neither in the prefill thread nor on their lanes."""
        return max(0, sum(not making.done for making in self._making.values()) - (self._running is not None))

    def _made(self, task: asyncio.Task) -> None:
        del self._making[task]
        if not task.cancelled():
            task.exception()  # it may be that nobody waits for it any more

    async def _make(
        self, making: PrefillJob, deadline: Deadline, words: ProgressChannel, ticket: TransferTicket
    ) -> tuple[MediaHandle, dict[str, Any]]:
        def run(engine: PrefillEngine) -> MediaPrefix:
            self._running, words.heard_s = words, time.perf_counter()
            try:
                return making.run(engine)
            finally:
                self._running = None

        facts = {"transfer_id": ticket.transfer_id, "media_id": making.key, "worker": self.name}
        try:
            prefix = making.kept()
            if prefix is None:
                prefix = await self._in(self._prefill_thread, run, self.engine)
            making.done = True
            ms = self._tell(making, prefix, facts)
            deadline.check("sending media")
            if making.refusal is not None:
                raise making.refusal
        except BaseException:
            self._sending.undo(making.shipment, making.release)
            raise
        within_s, made_s = min(deadline.left_s, ticket.deadline_s), time.perf_counter()
        if making.shipment is None:
            bounds = chunk_bounds(prefix.length, self.config.engine.prefill_chunk)
            report = await self._sending.ship(prefix, bounds, ticket, making.release)
        else:
            report = await self._sending.finish(making.shipment, ticket, within_s, making.release)
        log.info("media prefix sent", extra={**facts, **report})
        # What the transfer adds behind the prefill; the rest of it was hidden.
        ms["transfer"] = round((time.perf_counter() - made_s) * 1e3, 3)
        return prefix.handle(reused=making.reused, ms=ms), report

    def _tell(self, making: PrefillJob, prefix: MediaPrefix, facts: dict[str, str]) -> dict[str, float]:
        """Count a finished prefill; milliseconds of its stages."""
        if making.reused:
            return {}
        ms = making.preparation.stage_ms()
        self.num_prefills += 1
        tell_prefill(self.sink, ms, prefix)
        self.sink.observe("queue_wait_seconds", making.waited_s, pool="prefill")
        log.info("media prefix made", extra={**facts, "tokens": prefix.length, "ms": ms})
        return ms

    async def ship(self, key: str, ticket: TransferTicket) -> dict[str, Any]:
        """Send the copy of a prefix; the TransferReport as a dict. Cancelling it aborts the shipment.

        Raises:
            NotFound: no copy, or no such ticket. LaneLost: names the worker that is gone. QueueFull, TooLarge, Incompatible: the
            other end cannot take it. DataLoss, DeadlineExceeded, WorkerLost (closed).
        """
        self._check_open()
        prefix = self.copies.hold(key)
        if prefix is None:
            raise NotFound(f"worker {self.name} has no copy of media {key!r}")
        bounds = chunk_bounds(prefix.length, self.config.engine.prefill_chunk)
        return await self._sending.ship(prefix, bounds, ticket, lambda: self.copies.release(key))

    async def drop(self, key: str) -> bool:
        """Forget a copy. False if there is none, or it is being sent."""
        return self.copies.drop(key)

    # ---- what others see ---------------------------------------------------------------------------------------------------

    def report(self, full: bool) -> WorkerReport:
        """How this worker stands; the copies only if they have changed since the last report, or `full`."""
        version = self.copies.version
        changed, self._reported = full or version != self._reported, version
        used_bytes, kept = self.copies.used_bytes, self.copies.all()
        kinds = {"copies": (used_bytes, self.copies.budget_bytes)}
        if self.staging is not None:
            kinds["staging"] = (self.staging.used_bytes, self.staging.budget_bytes)
        tell_memory(self.sink, "prefill", len(kept), kinds)
        return WorkerReport(
            worker=self.name,
            pool="prefill",
            node=self.node,
            address=None,
            load=Load(
                num_running=int(self._running is not None),
                num_waiting=self._num_waiting,
                prefix_bytes=used_bytes,
                prefix_budget_bytes=self.copies.budget_bytes,
                turn_bytes=0,
                turn_budget_bytes=0,
            ),
            residents=tuple(prefix.handle() for prefix in kept) if changed else None,
            records=None,
        )

    async def info(self) -> dict[str, Any]:
        """Plain data, for people."""
        return {
            "worker": self.name,
            "pool": "prefill",
            "node": self.node,
            "pid": os.getpid(),
            "model": self.config.engine.model,
            "fingerprint": self.model.fingerprint,
            "device": str(self.model.device),
            "prefills": self.num_prefills,
            "preparations": len(self._making),
            "copies": [prefix.key for prefix in self.copies.all()],
            "copy_bytes": self.copies.used_bytes,
            "copy_budget_bytes": self.copies.budget_bytes,
            "lanes": self._sending.lanes(),
        }

    async def check(self) -> None:
        """Raises WorkerLost (closed) or Internal (a prefill that has said nothing for longer than any may take)."""
        self._check_open()
        running = self._running
        most_s = self.config.engine.prepare_timeout_s
        if running is not None and (silent_s := time.perf_counter() - running.heard_s) > most_s:
            raise Internal(f"worker {self.name}: a prefill has made no progress for {silent_s:.0f} s, over {most_s:g} s")

    async def warm(self, docks: Iterable[ReceiverAddress] = ()) -> None:
        """Make a tiny prefix and drop it, so that the first real one finds everything loaded; build lanes to `docks`."""
        request = PrepareRequest((MediaSource(tiny_picture(), "image"),))
        making = PrefillJob(Preparation(request), "warm", None, self.copies, self.staging, self.sender)

        def run() -> None:
            try:
                making.run(self.engine)
            finally:
                making.release()
                self.copies.drop("warm")

        await wait_within(self._in(self._prefill_thread, run), self.config.engine.prepare_timeout_s, "warming up")
        await self.meet(docks)

    async def meet(self, docks: Iterable[ReceiverAddress]) -> None:
        """Build lanes to `docks` ahead of the first shipment. One that cannot be built now is built with that shipment."""
        await self._sending.warm(docks)

    # ---- threads -----------------------------------------------------------------------------------------------------------

    def _within_s(self, request: PrepareRequest) -> float:
        return self.config.engine.prepare_timeout_s if request.deadline_s is None else request.deadline_s

    def _guarded(self, words: ProgressChannel) -> Callable[[str, int, int], None]:
        def report(stage: str, done: int, total: int) -> None:
            self._check_open()
            words.tell(stage, done, total)

        return report

    async def _in(self, thread: ThreadPoolExecutor, call: Callable[..., R], *args: Any) -> R:
        self._check_open()
        try:
            return await asyncio.wrap_future(thread.submit(call, *args))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WorkerLost(f"worker {self.name} is closed") from None  # `close` emptied the queue
        except SparseVilaError:
            raise
        except Exception as error:
            log.exception("preparation failed")
            raise Internal(f"{type(error).__name__}: {error}") from error

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerLost(f"worker {self.name} is closed")

    async def close(self) -> None:
        """End what is under way and free everything, which takes at most three times `close_timeout_s`. Idempotent.

        Raises:
            DeadlineExceeded: something did not end in time.
        """
        if self._closed:
            return
        self._closed = True
        within_s = self.config.engine.close_timeout_s
        for task, making in self._making.items():
            self._end(task, making, "the worker closes")
        self._prefill_thread.shutdown(wait=False, cancel_futures=True)
        self._key_thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)
        pending = (await asyncio.wait(list(self._making), timeout=within_s))[1] if self._making else ()
        over = await asyncio.to_thread(self._sending.close, within_s)
        if pending or not over:
            raise DeadlineExceeded(f"worker {self.name} did not end what it did within {within_s:g} s")
