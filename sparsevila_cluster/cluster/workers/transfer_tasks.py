"""Shipments as coroutines: the waiting is done in threads, and rows are let go exactly once, when nothing reads them any more.

Knows: that a shipment that nobody waits for is aborted. Does not know: lanes, or why a prefix is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from sparsevila_cluster.core.deadline import GRACE_S, outliving, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, LaneLost, SparseVilaError, WorkerLost
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport import KVSender, OutgoingTransfer, ReceiverAddress, TransferTicket

log = logging.getLogger(__name__)

# Shipments that are waited for at once; more of them wait for a thread, within their deadline.
MAX_WAITED = 64


class TransferTasks:
    """What a worker sends. Create and use it within one event loop; `undo` may be called from any thread."""

    def __init__(self, sender: KVSender, dial_s: float):
        """dial_s: how long `warm` tries to build one lane."""
        self.sender = sender
        self._dial_s = dial_s
        self._finishers = ThreadPoolExecutor(MAX_WAITED, thread_name_prefix="finish")
        # Of its own: an abort must not stand in line behind the waits that it is to end.
        self._aborters = ThreadPoolExecutor(4, thread_name_prefix="abort")
        self._going: set[Future[Any]] = set()
        self._shipments: set[OutgoingTransfer] = set()
        self._closing = False

    async def ship(
        self, prefix: MediaPrefix, bounds: Sequence[int], ticket: TransferTicket, release: Callable[[], object]
    ) -> dict[str, Any]:
        """Send a prefix all of whose rows are there. The rest as `finish`."""
        try:
            shipment = self.sender.begin(prefix, bounds, ticket)
            shipment.wrote_all()
        except BaseException:
            release()
            raise
        return await self.finish(shipment, ticket, ticket.deadline_s, release)

    async def warm(self, docks: Iterable[ReceiverAddress]) -> None:
        """Build lanes ahead, one after the other. One that cannot be built now is built with the first shipment."""
        for dock in docks:
            try:
                await asyncio.wrap_future(self._finishers.submit(self.sender.warm, dock, self._dial_s))
            except SparseVilaError as error:
                log.warning("no lane yet", extra={"to": dock.worker, "why": str(error)})

    def lanes(self) -> list[dict[str, Any]]:
        """Lanes to other workers, as plain data."""
        return [{"direction": "out", "peer": lane.pop("receiver"), **lane} for lane in self.sender.info()["lanes"]]

    async def finish(
        self, shipment: OutgoingTransfer, ticket: TransferTicket, within_s: float, release: Callable[[], object]
    ) -> dict[str, Any]:
        """The report of a shipment when all of it has arrived. Cancelling this aborts the shipment.

        release: called exactly once, from another thread, when nothing reads the rows any more.

        Raises:
            LaneLost: with the name of the worker that it was for. DataLoss, QueueFull, TooLarge, Incompatible, DeadlineExceeded,
            NotFound: as `OutgoingTransfer.finish`.
        """
        future = self._finish_soon(shipment, within_s, release)
        try:
            # Shielded: the rows may only be let go by the thread that waits, so it is told to stop, not left alone.
            return await wait_within(outliving(future), within_s + GRACE_S, "sending a media prefix")
        except (asyncio.CancelledError, DeadlineExceeded):
            self.abort(shipment, "nobody waits for it any more")
            raise
        except LaneLost as error:
            if ticket.receiver.worker in str(error):
                raise
            raise LaneLost(f"the lane to {ticket.receiver.worker} is lost: {error}") from error

    def _finish_soon(self, shipment: OutgoingTransfer, within_s: float, release: Callable[[], object]) -> Future[dict[str, Any]]:
        def work() -> dict[str, Any]:
            self._shipments.add(shipment)
            try:
                if self._closing:
                    shipment.abort("the worker closes")
                return shipment.finish(within_s).as_dict()
            except BaseException:
                shipment.abort("it did not arrive")
                raise
            finally:
                self._shipments.discard(shipment)
                release()

        try:
            return self._track(self._finishers.submit(work))
        except RuntimeError as error:
            self.undo(shipment, release)
            raise WorkerLost("the worker is closed") from error

    def abort(self, shipment: OutgoingTransfer, reason: str) -> None:
        """Have it end soon; does not wait."""
        try:
            self._track(self._aborters.submit(shipment.abort, reason))
        except RuntimeError:  # closed: there is nothing left to spare from waiting
            shipment.abort(reason)

    def undo(self, shipment: OutgoingTransfer | None, release: Callable[[], object]) -> None:
        """End a shipment whose rows will not all be written, then `release`; does not wait."""

        def work() -> None:
            try:
                if shipment is not None:
                    shipment.abort("the prefix was not made")
            finally:
                release()

        try:
            self._track(self._aborters.submit(work))
        except RuntimeError:
            work()

    def _track(self, future: Future[Any]) -> Future[Any]:
        self._going.add(future)
        future.add_done_callback(self._going.discard)
        return future

    def close(self, within_s: float) -> bool:
        """End what is under way, the lanes and the threads. False if something did not end in time."""
        self._closing = True
        for shipment in list(self._shipments):
            self.abort(shipment, "the worker closes")
        over = not wait(list(self._going), within_s).not_done
        self.sender.close()
        self._finishers.shutdown(wait=False, cancel_futures=True)
        self._aborters.shutdown(wait=False)
        return over
