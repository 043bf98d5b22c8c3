"""A worker that makes media prefixes, keeps a copy of each and sends them to decode workers.

Its two kinds of work:

make: sources -> [PrefillEngine] -> rows in the host copy, and onto the lane while later rows are still computed
ship: the host copy -> a lane
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

from sparsevila_cluster.cluster.messages import Load, WorkerReport
from sparsevila_cluster.cluster.workers.host_copies import HostCopies
from sparsevila_cluster.cluster.workers.prefill_job import PrefillJob, ProgressChannel
from sparsevila_cluster.cluster.workers.stage_metrics import record_memory, record_prefill
from sparsevila_cluster.cluster.workers.transfer_tasks import TransferTasks
from sparsevila_cluster.cluster.workers.warm_up import tiny_picture
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, NotFound, WorkerClosed
from sparsevila_cluster.core.metrics import MetricsSink, Tally
from sparsevila_cluster.core.requests import MediaHandle, MediaSource, PrepareRequest
from sparsevila_cluster.engine.async_engine import AsyncPrefillEngine
from sparsevila_cluster.engine.prefill_engine import PrefillEngine
from sparsevila_cluster.engine.prompt_rows import chunk_bounds
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import PREFILL_PARTS, Model
from sparsevila_cluster.transport import KVSender, ObjectStore, ReceiverAddress, TransferTicket

log = logging.getLogger(__name__)

# The task that makes and sends one prefix, and gives its handle and the report of the transfer.
Sending = asyncio.Task[tuple[MediaHandle, dict[str, Any]]]


class PrefillWorker:
    """One prefill engine, the host copies of what it made, and its transfers. Create and use it within one event loop."""

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
        """name: of this worker, as others know it. model: loaded with the parts that a prefill needs if None.

        object_store: of the transport "objectstore". sink: where metrics go. node: where it runs, for placement.
        """
        engine = config.engine
        self.name, self.config, self.node = name, config, node
        self.sink: MetricsSink = Tally() if sink is None else sink
        self.model = model or load_model(engine.model_dir, PREFILL_PARTS, **engine.loading)
        self.engine = PrefillEngine(self.model, engine, config.transport.quantization, config.secret)
        self.async_engine = AsyncPrefillEngine(self.engine, f"worker {name}", partial(WorkerClosed, worker=name))
        spec, device = self.model.spec, self.model.device
        self.copies = HostCopies(spec, config.prefill.copy_bytes, max_share=engine.max_share)
        # On a CPU the prefill writes into the copy itself.
        self.staging = None if device.type == "cpu" else HostCopies(spec, engine.prefix_bytes, device, engine.max_share)
        self.sender = KVSender(name, config.transport, object_store=object_store, sink=self.sink)
        self.num_prefills = 0
        self._transfers = TransferTasks(name, self.sender, config.transport.dial_timeout_s)
        self._jobs: dict[Sending, PrefillJob] = {}
        self._reported: int | None = None
        self._closed = False

    # ---- media prefixes ----------------------------------------------------------------------------------------------------

    async def key_of(self, request: PrepareRequest) -> str:
        """The content key of what `make` would make. Raises BadMedia, BadRequest, TooLarge, DeadlineExceeded, WorkerClosed."""
        return await self.async_engine.key_of(request)

    async def make(
        self, request: PrepareRequest, key: str, ticket: TransferTicket
    ) -> AsyncGenerator[tuple[str, str, int, int] | tuple[str, MediaHandle, dict[str, Any]], None]:
        """Make the prefix of `key` and send it; ("progress", stage, done, total) now and then, last ("made", handle, report).

        report: the TransferReport as a dict. A copy that is there already is sent as it is. Leaving the iteration early ends the
        prefill at its next report of progress and aborts the transfer.

        Raises:
            BadMedia, BadRequest, TooLarge: media that cannot be used. QueueFull: too many wait, or no room for the copy or at the
            other end. LaneLost: the worker of the ticket is gone; the copy stays, to be shipped to another one. DataLoss,
            Incompatible, NotFound (the ticket): as `ship`. DeadlineExceeded, WorkerClosed, Internal.
        """
        self._check_open()
        deadline, channel = self.async_engine.deadline(request), ProgressChannel()
        preparation = self.async_engine.preparation(request, deadline, channel.report)
        job = PrefillJob(preparation, key, ticket, self.copies, self.staging, self.sender)
        # A task of its own: who leaves early does not wait until the prefill has noticed.
        task = asyncio.ensure_future(self._make(job, deadline, ticket))
        self._jobs[task] = job
        task.add_done_callback(self._ended)
        try:
            async with aclosing(channel.until(task, deadline.deadline_s)) as progress:
                async for stage, done, total in progress:
                    yield "progress", stage, done, total
            handle, report = await task
            yield "made", handle, report
        finally:
            deadline.cancel()
            if preparation.queued:
                task.cancel()
            self._abort(task, job, "the caller left")

    def _abort(self, task: Sending, job: PrefillJob, reason: str) -> None:
        """Have a job end soon. One that a prefill thread has cannot be cancelled: it ends at its next report."""
        if job.done:
            task.cancel()
        elif not task.done() and job.transfer is not None:
            self._transfers.abort(job.transfer, reason)

    def _ended(self, task: Sending) -> None:
        del self._jobs[task]
        if not task.cancelled():
            task.exception()  # it may be that nobody waits for it any more

    async def _make(self, job: PrefillJob, deadline: Deadline, ticket: TransferTicket) -> tuple[MediaHandle, dict[str, Any]]:
        facts = {"transfer_id": ticket.transfer_id, "media_id": job.key, "worker": self.name}
        try:
            prefix = job.find_copy()
            if prefix is None:
                prefix = await self.async_engine.run(job.run, job.preparation)
            job.done = True
            ms = self._record(job, prefix, facts)
            deadline.check("sending media")
            if job.send_error is not None:
                raise job.send_error
        except BaseException:
            self._transfers.undo(job.transfer, job.release)
            raise
        timeout_s, made_s = min(deadline.left_s, ticket.deadline_s), time.perf_counter()
        if job.transfer is None:
            bounds = chunk_bounds(prefix.length, self.config.engine.prefill_chunk)
            report = await self._transfers.send(prefix, bounds, ticket, job.release)
        else:
            report = await self._transfers.finish(job.transfer, ticket, timeout_s, job.release)
        log.info("media prefix sent", extra={**facts, **report})
        # What the transfer adds behind the prefill; the rest of it was hidden.
        ms["transfer"] = round((time.perf_counter() - made_s) * 1e3, 3)
        return prefix.handle(reused=job.reused, ms=ms), report

    def _record(self, job: PrefillJob, prefix: MediaPrefix, facts: dict[str, str]) -> dict[str, float]:
        """Count a finished prefill; milliseconds of its stages."""
        if job.reused:
            return {}
        ms = job.preparation.stage_ms()
        self.num_prefills += 1
        record_prefill(self.sink, ms, prefix)
        self.sink.observe("queue_wait_seconds", job.waited_s or 0.0, pool="prefill")
        log.info("media prefix made", extra={**facts, "tokens": prefix.length, "ms": ms})
        return ms

    async def ship(self, key: str, ticket: TransferTicket) -> dict[str, Any]:
        """Send the copy of a prefix; the TransferReport as a dict. Cancelling it aborts the transfer.

        Raises:
            NotFound: no copy, or no such ticket. LaneLost: its `worker` is gone. QueueFull, TooLarge, Incompatible: the
            other end cannot take it. DataLoss, DeadlineExceeded, WorkerClosed.
        """
        self._check_open()
        prefix = self.copies.hold(key)
        if prefix is None:
            raise NotFound(f"worker {self.name} has no copy of media {key!r}")
        bounds = chunk_bounds(prefix.length, self.config.engine.prefill_chunk)
        return await self._transfers.send(prefix, bounds, ticket, lambda: self.copies.release(key))

    async def drop(self, key: str) -> bool:
        """Forget a copy. False if there is none, or it is being sent."""
        return self.copies.drop(key)

    # ---- what others see ---------------------------------------------------------------------------------------------------

    def report(self, full: bool) -> WorkerReport:
        """The state of this worker; the copies only if they have changed since the last report, or `full`."""
        version = self.copies.version
        changed, self._reported = full or version != self._reported, version
        used_bytes, kept = self.copies.used_bytes, self.copies.all()
        kinds = {"copies": (used_bytes, self.copies.budget_bytes)}
        if self.staging is not None:
            kinds["staging"] = (self.staging.used_bytes, self.staging.budget_bytes)
        record_memory(self.sink, "prefill", len(kept), kinds)
        return WorkerReport(
            worker=self.name,
            pool="prefill",
            node=self.node,
            address=None,
            load=Load(
                num_running=self.async_engine.num_running,
                num_waiting=self.async_engine.num_waiting,
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
            "preparations": len(self._jobs),
            "copies": [prefix.key for prefix in self.copies.all()],
            "copy_bytes": self.copies.used_bytes,
            "copy_budget_bytes": self.copies.budget_bytes,
            "lanes": self._transfers.lanes(),
        }

    async def check(self) -> None:
        """Raises WorkerClosed or Internal (a prefill that has said nothing for longer than any may take)."""
        self._check_open()
        self.async_engine.check()

    async def warm(self, receivers: Iterable[ReceiverAddress] = ()) -> None:
        """Make a tiny prefix and drop it, so that the first real one finds everything loaded; build lanes to `receivers`."""
        request = PrepareRequest((MediaSource(tiny_picture(), "image"),))
        deadline = self.async_engine.deadline(request)
        preparation = self.async_engine.preparation(request, deadline)
        job = PrefillJob(preparation, "warm", None, self.copies, self.staging, self.sender)

        def run(engine: PrefillEngine) -> None:
            try:
                job.run(engine)
            finally:
                job.release()
                self.copies.drop("warm")

        await wait_within(self.async_engine.run(run, preparation), deadline.deadline_s, "warming up")
        await self.meet(receivers)

    async def meet(self, receivers: Iterable[ReceiverAddress]) -> None:
        """Build lanes to `receivers` ahead of the first transfer. One that cannot be built now is built with that transfer."""
        await self._transfers.warm(receivers)

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerClosed(f"worker {self.name} is closed", self.name)

    async def close(self) -> None:
        """End what is under way and free everything, which takes at most three times `close_timeout_s`. Idempotent.

        Raises:
            DeadlineExceeded: something did not end in time.
        """
        if self._closed:
            return
        self._closed = True
        timeout_s = self.config.engine.close_timeout_s
        for task, job in self._jobs.items():
            self._abort(task, job, "the worker closes")
        await self.async_engine.close()
        pending = (await asyncio.wait(list(self._jobs), timeout=timeout_s))[1] if self._jobs else ()
        ended = await asyncio.to_thread(self._transfers.close, timeout_s)
        if pending or not ended:
            raise DeadlineExceeded(f"worker {self.name} did not end its work within {timeout_s:g} s")
