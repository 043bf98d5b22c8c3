"""Transfers to other workers as coroutines: threads do the waiting, and rows are released when nothing reads them any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from sparsevila_cluster.core.deadline import GRACE_S, outliving, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, LaneLost, SparseVilaError, WorkerClosed
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport import KVSender, OutgoingTransfer, ReceiverAddress, TransferTicket

log = logging.getLogger(__name__)

# Transfers that are waited for at once; more of them wait for a thread, within their deadline.
MAX_WAITED = 64


class TransferTasks:
    """What a worker sends. A transfer that nobody waits for is aborted.

    Create and use it within one event loop; `undo` may be called from any thread.
    """

    def __init__(self, worker: str, sender: KVSender, dial_s: float):
        """worker: the name of the one that sends. dial_s: how long `warm` tries to build one lane."""
        self.worker, self.sender = worker, sender
        self._dial_s = dial_s
        self._finishers = ThreadPoolExecutor(MAX_WAITED, thread_name_prefix="finish")
        # Of its own: an abort must not queue behind the waits that it is to end.
        self._aborters = ThreadPoolExecutor(4, thread_name_prefix="abort")
        self._pending: set[Future[Any]] = set()
        self._transfers: set[OutgoingTransfer] = set()
        self._closing = False

    async def send(
        self, prefix: MediaPrefix, bounds: Sequence[int], ticket: TransferTicket, release: Callable[[], object]
    ) -> dict[str, Any]:
        """Send a prefix all of whose rows are there. The rest as `finish`."""
        try:
            transfer = self.sender.begin(prefix, bounds, ticket)
            transfer.wrote_all()
        except BaseException:
            release()
            raise
        return await self.finish(transfer, ticket, ticket.deadline_s, release)

    async def warm(self, receivers: Iterable[ReceiverAddress]) -> None:
        """Build lanes ahead, one after the other. One that cannot be built now is built with the first transfer."""
        for receiver in receivers:
            try:
                await asyncio.wrap_future(self._finishers.submit(self.sender.warm, receiver, self._dial_s))
            except SparseVilaError as error:
                log.warning("no lane yet", extra={"to": receiver.worker, "why": str(error)})

    def lanes(self) -> list[dict[str, Any]]:
        """Lanes to other workers, as plain data."""
        return [{"direction": "out", "peer": lane.pop("receiver"), **lane} for lane in self.sender.info()["lanes"]]

    async def finish(
        self, transfer: OutgoingTransfer, ticket: TransferTicket, within_s: float, release: Callable[[], object]
    ) -> dict[str, Any]:
        """The report of a transfer when all of it has arrived. Cancelling this aborts the transfer.

        release: called exactly once, from another thread, when nothing reads the rows any more.

        Raises:
            LaneLost: its `worker` is the one that it was for. DataLoss, QueueFull, TooLarge, Incompatible, DeadlineExceeded,
            NotFound: as `OutgoingTransfer.finish`.
        """
        future = self._finish_soon(transfer, within_s, release)
        try:
            # Shielded: only the thread that waits may release the rows, so it is told to stop and not left alone.
            return await wait_within(outliving(future), within_s + GRACE_S, "sending a media prefix")
        except (asyncio.CancelledError, DeadlineExceeded):
            self.abort(transfer, "nobody waits for it any more")
            raise
        except LaneLost as error:
            receiver = ticket.receiver.worker
            if error.worker == receiver:
                raise
            raise LaneLost(f"the lane to {receiver} is lost: {error}", receiver) from error

    def _finish_soon(self, transfer: OutgoingTransfer, within_s: float, release: Callable[[], object]) -> Future[dict[str, Any]]:
        def work() -> dict[str, Any]:
            self._transfers.add(transfer)
            try:
                if self._closing:
                    transfer.abort("the worker closes")
                return transfer.finish(within_s).as_dict()
            except BaseException:
                transfer.abort("it did not arrive")
                raise
            finally:
                self._transfers.discard(transfer)
                release()

        try:
            return self._track(self._finishers.submit(work))
        except RuntimeError as error:
            self.undo(transfer, release)
            raise WorkerClosed(f"worker {self.worker} is closed", self.worker) from error

    def abort(self, transfer: OutgoingTransfer, reason: str) -> None:
        """Have it end soon; does not wait."""
        try:
            self._track(self._aborters.submit(transfer.abort, reason))
        except RuntimeError:  # closed: there is nothing left to spare from waiting
            transfer.abort(reason)

    def undo(self, transfer: OutgoingTransfer | None, release: Callable[[], object]) -> None:
        """End a transfer whose rows will not all be written, then `release`; does not wait."""

        def work() -> None:
            try:
                if transfer is not None:
                    transfer.abort("the prefix was not made")
            finally:
                release()

        try:
            self._track(self._aborters.submit(work))
        except RuntimeError:
            work()

    def _track(self, future: Future[Any]) -> Future[Any]:
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def close(self, within_s: float) -> bool:
        """End all transfers, the lanes and the threads. False if something did not end in time."""
        self._closing = True
        for transfer in list(self._transfers):
            self.abort(transfer, "the worker closes")
        ended = not wait(list(self._pending), within_s).not_done
        self.sender.close()
        self._finishers.shutdown(wait=False, cancel_futures=True)
        self._aborters.shutdown(wait=False)
        return ended
