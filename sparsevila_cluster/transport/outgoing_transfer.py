"""One media prefix on its way out: what is written, how far it is, how it ended."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparsevila_cluster.core.addresses import TransferTicket
from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, SparseVilaError
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport.manifest import Chunk, Manifest


@dataclass(frozen=True)
class TransferReport:
    """A transfer that was acknowledged: the prefix is resident over there.

    transfer_s: from the offer of the last attempt to the acknowledgement; hidden_share: of the bytes, those that had arrived when
    the last row was written; kind, epoch: of the lane that it went over in the end; attempts: 1 when nothing went wrong.
    """

    transfer_id: str
    key: str
    num_bytes: int
    transfer_s: float
    hidden_share: float
    kind: str
    epoch: int
    attempts: int

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class OutgoingTransfer:
    """What `KVSender.begin` returns. `wrote` is called by whoever prefills, `finish` or `abort` by whoever holds the prefix.

    Rows are read until `finish` or `abort` has returned; the caller keeps them until then.
    """

    def __init__(self, prefix: MediaPrefix, manifest: Manifest, ticket: TransferTicket, wake: Callable[[], None]):
        """wake: has the lane look again at what may be sent."""
        self.prefix = prefix
        self.manifest = manifest
        self.ticket = ticket
        self.until_s = time.monotonic() + ticket.deadline_s
        self.aborted = ""
        self.num_attempts = 0
        self.num_breaks = 0
        self.num_damaged = 0
        self.received_bytes = 0
        self._hidden_bytes: int | None = None
        num_layers = manifest.metadata.spec.num_layers
        self._announced = [0] * num_layers  # rows of each layer that `wrote` told of
        self._rows = [0] * num_layers  # those of them that the device has come to
        self._events: deque[tuple[int, int, Any]] = deque()
        home = prefix.extent.arena.k[0].device
        self._device = home if home.type == "cuda" else None
        self.wake = wake
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._error: SparseVilaError | None = None
        self._report: TransferReport | None = None

    @property
    def transfer_id(self) -> str:
        """That of its ticket."""
        return self.ticket.transfer_id

    @property
    def done(self) -> bool:
        """Whether it has succeeded or failed."""
        return self._done.is_set()

    def wrote(self, layer: int, start: int, stop: int) -> None:
        """Rows [start, stop) of a layer are final. Per layer, pieces come in order. Never blocks, never raises."""
        if start > self._announced[layer]:
            return  # a hole: `finish` will say so
        self._announced[layer] = max(self._announced[layer], stop)
        if self._device is not None:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))  # not that of the thread's current device, which may be another
            self._events.append((layer, stop, event))
        else:
            self._rows[layer] = max(self._rows[layer], stop)
        if min(self._announced) == self.prefix.length:
            self._hidden_bytes = self.received_bytes
        self.wake()

    def wrote_all(self) -> None:
        """Everything is final: a prefix that was made before."""
        for layer in range(len(self._rows)):
            self.wrote(layer, 0, self.prefix.length)

    def finish(self, deadline_s: float) -> TransferReport:
        """Wait until the prefix is resident over there.

        Raises:
            LaneLost: the other worker, which it names, is gone, or every lane to it broke. DataLoss: damaged on the way, twice.
            QueueFull, TooLarge, Incompatible, NotFound: what the other worker said. DeadlineExceeded. Cancelled: aborted on either
            side.
        """
        until_s = time.monotonic() + deadline_s
        left_s = min(until_s, self.until_s) - time.monotonic()
        if not self._done.wait(max(0.0, left_s)):
            self.overdue(deadline_s if until_s <= self.until_s else None)
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report

    def abort(self, reason: str) -> None:
        """Stop sending; the other side gives its bytes back. Idempotent; nothing happens to a transfer that is over."""
        self.aborted = self.aborted or reason
        self.fail(Cancelled(f"transfer {self.transfer_id} was aborted: {reason}"))
        self.wake()

    def overdue(self, deadline_s: float | None = None) -> None:
        """Fail because the waiter's deadline is over, or that of the ticket."""
        which = f"{deadline_s:g} s" if deadline_s is not None else f"the {self.ticket.deadline_s:g} s of its ticket"
        rows, length = min(self._announced), self.prefix.length
        text = f"transfer {self.transfer_id} took longer than {which}"
        if rows < length:
            text += f"; {rows} of {length} rows were written"
        self.fail(DeadlineExceeded(text))
        self.wake()

    # ---- for the lane --------------------------------------------------------------------------------------------------------

    def is_final(self, chunk: Chunk) -> bool:
        """Whether all its rows are written, as far as the device has come."""
        while self._events and self._events[0][2].query():
            layer, stop, _ = self._events.popleft()
            self._rows[layer] = max(self._rows[layer], stop)
        return min(self._rows[chunk.first_layer : chunk.stop_layer]) >= chunk.stop

    @property
    def waits_for_device(self) -> bool:
        """Whether rows were announced that the device has not come to yet."""
        return bool(self._events)

    def fail(self, error: SparseVilaError) -> bool:
        """End it with an error. False if it had ended before."""
        return self._settle(error, None)

    def succeed(self, num_bytes: int, transfer_s: float, kind: str, epoch: int) -> bool:
        """End it well; the numbers as in TransferReport. False if it had ended before."""
        hidden = num_bytes if self._hidden_bytes is None else self._hidden_bytes
        share = min(1.0, hidden / max(1, num_bytes))
        report = TransferReport(
            self.transfer_id, self.prefix.key, num_bytes, transfer_s, share, kind, epoch, max(1, self.num_attempts)
        )
        return self._settle(None, report)

    def _settle(self, error: SparseVilaError | None, report: TransferReport | None) -> bool:
        with self._lock:
            if self._done.is_set():
                return False
            self._error, self._report = error, report
            self._done.set()
            return True
