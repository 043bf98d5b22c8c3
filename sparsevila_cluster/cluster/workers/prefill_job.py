"""One media prefix in the making on a prefill worker: into its extent, into the host copy, onto the lane.

Knows: in which order rows are written, copied and sent, and what is given back when it ends early. Does not know: who asked, or
what happens to the prefix later. `run` is called in the prefill thread.

    reserve -> begins -> [wrote: (copy to the host) -> leaves on the lane]* -> published: the copy stays
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence

from sparsevila_cluster.cluster.workers.host_copies import HostCopies, in_host_memory
from sparsevila_cluster.core.deadline import GRACE_S, Deadline, wait_within
from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport import KVSender, OutgoingTransfer, TransferTicket


class PrefillJob:
    """The watch of one prefill. Owns its extents, and the hold on the finished copy, until `release`."""

    def __init__(
        self,
        preparation: Preparation,
        key: str,
        ticket: TransferTicket | None,
        copies: HostCopies,
        staging: HostCopies | None,
        sender: KVSender,
    ):
        """ticket: where to send it, None: nowhere. staging: where rows are computed if not in the copy itself."""
        self.preparation, self.key, self.ticket = preparation, key, ticket
        self._copies, self._staging, self._sender = copies, staging, sender
        self.shipment: OutgoingTransfer | None = None
        self.refusal: SparseVilaError | None = None  # of the lane, which does not end the prefill
        self.waited_s = 0.0
        self.reused = False
        self.done = False  # the copy is there: what is left is to send it
        self._asked_s = time.perf_counter()
        self._copy: Extent | None = None
        self._staged: Extent | None = None
        self._holds = False

    def run(self, engine: PrefillEngine) -> MediaPrefix:
        """The finished copy, held. Whatever ends it early, `release` is to follow once the shipment has ended."""
        self.waited_s = time.perf_counter() - self._asked_s
        if (kept := self.kept()) is not None:  # made meanwhile, for another caller
            return kept
        self.preparation.stage("decode")
        medias = engine.load(self.preparation.request)
        handed_over = (medias.pop(0) for _ in range(len(medias)))  # frames are large: nobody but the prefill holds them
        prefix = engine.prefill(self.preparation, handed_over, self.key, self.reserve, watch=self)
        assert self._copy is not None
        if self._staged is not None:
            prefix = in_host_memory(prefix, self._copy)
        prefix = self._copies.publish(prefix)
        self._copy, self._holds = None, True
        return prefix

    def kept(self) -> MediaPrefix | None:
        """The copy if it is there already, held: nothing has to be made."""
        prefix = self._copies.hold(self.key)
        self._holds = self.reused = prefix is not None
        return prefix

    def reserve(self, length: int) -> Extent:
        self._copy = self._copies.reserve(length)
        if self._staging is None:
            return self._copy
        self._staged = self._staging.reserve(length)
        return self._staged

    def begins(self, prefix: MediaPrefix, bounds: Sequence[int]) -> None:
        if self.ticket is None:
            return
        try:
            self.shipment = self._sender.begin(prefix, bounds, self.ticket)
        except SparseVilaError as error:
            self.refusal = error

    def wrote(self, layer: int, start: int, stop: int) -> None:
        if self._staged is not None:
            assert self._copy is not None
            # Also waits until the device has computed them: what is told to leave is final.
            for copy, rows in zip(self._copy.rows(layer), self._staged.rows(layer), strict=True):
                copy[start:stop].copy_(rows[start:stop])
        if self.shipment is not None:
            self.shipment.wrote(layer, start, stop)

    def release(self) -> None:
        """Give back what is not published, and let go of the copy. Harmless when repeated."""
        if self._staging is not None and self._staged is not None:
            self._staging.cancel(self._staged)
        if self._copy is not None:
            self._copies.cancel(self._copy)
        self._staged = self._copy = None
        if self._holds:
            self._holds = False
            self._copies.release(self.key)


class ProgressChannel:
    """Progress from a thread to one reader in an event loop: of each stage the last word that was not read yet."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._lock = threading.Lock()
        self._last: dict[str, tuple[int, int]] = {}
        self.heard_s = time.perf_counter()

    def tell(self, stage: str, done: int, total: int) -> None:
        """Called by the work, from any thread. Raises Cancelled or DeadlineExceeded once nobody waits."""
        self._deadline.check(f"preparing media (in stage {stage!r})")
        self.heard_s = time.perf_counter()
        with self._lock:
            self._last[stage] = (done, total)
        self._loop.call_soon_threadsafe(self._news.set)

    async def until(self, work: asyncio.Future) -> AsyncGenerator[tuple[str, int, int], None]:
        """(stage, done, total) until `work` is over. Raises DeadlineExceeded."""
        work.add_done_callback(lambda _: self._news.set())
        until_s = time.perf_counter() + self._deadline.deadline_s + GRACE_S
        while True:
            over = work.done()
            self._news.clear()
            with self._lock:
                words, self._last = self._last, {}
            for stage, (done, total) in words.items():
                yield stage, done, total
            if over:
                return
            await wait_within(self._news.wait(), max(0.0, until_s - time.perf_counter()), "preparing media")
