"""One prefill on a prefill worker: its rows go into the host copy, and onto the lane while later rows are still computed.

The life of a job:

reserve -> on_start -> [on_rows: (copy to the host) -> send]* -> published: the copy stays
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from sparsevila_cluster.cluster.workers.host_copies import HostCopies, in_host_memory
from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport import KVSender, OutgoingTransfer, TransferTicket


class PrefillJob:
    """The `PrefillObserver` of one prefill. Owns its extents, and the hold on the finished copy, until `release`."""

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
        self.transfer: OutgoingTransfer | None = None
        self.send_error: SparseVilaError | None = None  # of the sender, which does not end the prefill
        self.waited_s: float | None = None  # until a prefill thread took it; None while it waits
        self.reused = False
        self.done = False  # the copy is there: what is left is to send it
        self._created_s = time.perf_counter()
        self._copy: Extent | None = None
        self._staged: Extent | None = None
        self._holds = False

    def run(self, engine: PrefillEngine) -> MediaPrefix:
        """The finished copy, held. In the prefill thread.

        Whatever ends it early, `release` is to follow once the transfer has ended.
        """
        self.waited_s = time.perf_counter() - self._created_s
        if (kept := self.find_copy()) is not None:  # made meanwhile, for another caller
            return kept
        prefix = engine.prepare(self.preparation, self.key, self.reserve, observer=self)
        assert self._copy is not None
        if self._staged is not None:
            prefix = in_host_memory(prefix, self._copy)
        prefix = self._copies.publish(prefix)
        self._copy, self._holds = None, True
        return prefix

    def find_copy(self) -> MediaPrefix | None:
        """The copy if it is there already, held: nothing has to be made."""
        prefix = self._copies.hold(self.key)
        self._holds = self.reused = prefix is not None
        return prefix

    def reserve(self, length: int) -> Extent:
        """The extent of `length` rows that the prefill writes to."""
        self._copy = self._copies.reserve(length, self.preparation.request.owner)
        if self._staging is None:
            return self._copy
        self._staged = self._staging.reserve(length, self.preparation.request.owner)
        return self._staged

    def on_start(self, prefix: MediaPrefix, bounds: Sequence[int]) -> None:
        """Begin the transfer."""
        if self.ticket is None:
            return
        try:
            self.transfer = self._sender.begin(prefix, bounds, self.ticket)
        except SparseVilaError as error:
            self.send_error = error

    def on_rows(self, layer: int, start: int, stop: int) -> None:
        """Copy rows to the host if they lie elsewhere, and have them sent."""
        if self._staged is not None:
            assert self._copy is not None
            # Also waits until the device has computed them: rows that are announced to the transfer are final.
            for copy, rows in zip(self._copy.rows(layer), self._staged.rows(layer), strict=True):
                copy[start:stop].copy_(rows[start:stop])
        if self.transfer is not None:
            self.transfer.wrote(layer, start, stop)

    def release(self) -> None:
        """Give back what is not published, and end the hold on the copy. Harmless when repeated."""
        if self._staging is not None and self._staged is not None:
            self._staging.cancel(self._staged)
        if self._copy is not None:
            self._copies.cancel(self._copy)
        self._staged = self._copy = None
        if self._holds:
            self._holds = False
            self._copies.release(self.key)


class ProgressChannel:
    """Progress from a thread to one reader in an event loop: of each stage the last report that was not read yet."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._lock = threading.Lock()
        self._unread: dict[str, tuple[int, int]] = {}

    def report(self, stage: str, done: int, total: int) -> None:
        """A `Progress` callback, for any thread."""
        with self._lock:
            self._unread[stage] = (done, total)
        self._loop.call_soon_threadsafe(self._changed.set)

    async def until(self, work: asyncio.Future[Any], deadline_s: float) -> AsyncGenerator[tuple[str, int, int], None]:
        """(stage, done, total) until `work` is over. Raises DeadlineExceeded if it ends too late."""
        work.add_done_callback(lambda _: self._changed.set())
        until_s = time.perf_counter() + deadline_s + GRACE_S
        while True:
            over = work.done()
            self._changed.clear()
            with self._lock:
                unread, self._unread = self._unread, {}
            for stage, (done, total) in unread.items():
                yield stage, done, total
            if over:
                return
            await wait_within(self._changed.wait(), max(0.0, until_s - time.perf_counter()), "preparing media")
