"""What a lane's receiving end keeps of each transfer, and what it asks of its dock.

Knows: counters, locks, states. Does not know: messages or threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.transport.chunks import Checksum, ChunkBuffers
from sparsevila_cluster.transport.link import Handle, TransferState
from sparsevila_cluster.transport.manifest import Manifest


class TransferRegistry(Protocol):
    """What a dock does for its lanes. All of it may be called from any thread."""

    def welcome(self, lane: Any, hello: dict[str, Any]) -> None:
        """Raises PermissionDenied, Incompatible, QueueFull."""

    def admit(self, lane: Any, transfer_id: str, key: str, attempt: int) -> float | None:
        """Seconds within which the transfer must have begun; None if it was acknowledged before.

        Raises NotFound. LaneLost: a later attempt has come before this one.
        """

    def moved(self, lane: Any, transfer_id: str, state: TransferState) -> None:
        """A transfer of this lane is in another state now."""

    def landed(self, num_bytes: int, kind: str) -> None: ...

    def gone(self, lane: Any) -> None:
        """The lane is closed and holds nothing any more."""


@dataclass(eq=False)
class IncomingTransfer:
    """One transfer on this lane. `lock` is held by whoever writes to the extent or gives it away."""

    manifest: Manifest
    begin_within_s: float
    cargo: ChunkBuffers | None = None
    extent: Extent | None = None
    granted: int = 0
    announced: int = 0
    landed: int = 0
    sums: dict[int, Future[int]] = field(default_factory=dict)
    state: TransferState = TransferState.RESERVED
    refused: bool = False
    ended: bool = False
    publishing: bool = False
    heard_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def arrived(self, index: int, handle: Handle, berths: Sequence[Tensor], within_s: float) -> bool:
        """Wait until a chunk has landed; whether it is what was sent. Raises LaneLost."""
        total = Checksum()
        for number, berth in enumerate(berths, 1):
            handle.wait(within_s, number)
            if self.manifest.checksum and not self.refused:  # while it is in the cache, and the next part is landing
                total.add(berth)
        if not self.manifest.checksum:
            return True
        try:
            return self.sums[index].result(within_s) == total.value
        except TimeoutError:
            raise LaneLost(f"no checksum came for chunk {index} of transfer {self.transfer_id}") from None
        finally:
            del self.sums[index]

    def announce_sum(self, index: int) -> None:
        """The chunk comes, and then its checksum."""
        self.sums[index] = Future()

    def take_sum(self, index: int, checksum: int) -> bool:
        """What the sender says of a chunk that it announced. False if it said so before, or announced none."""
        due = self.sums.get(index)
        if due is None or due.done():
            return False
        due.set_result(checksum)
        return True

    def forget_sums(self) -> None:
        """No checksum comes any more: whoever waits for one hears so."""
        for due in list(self.sums.values()):
            if not due.done():
                due.set_exception(LaneLost("the lane is closed"))

    @property
    def transfer_id(self) -> str:
        return self.manifest.transfer_id


class IncomingTransfers:
    """The transfers of one lane, by id. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, IncomingTransfer] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, one: IncomingTransfer) -> None:
        """Raises LaneLost: it is here already, or the lane is closed."""
        with self._lock:
            if self._closed or one.transfer_id in self._by_id:
                raise LaneLost(f"transfer {one.transfer_id} was offered " + ("too late" if self._closed else "twice"))
            self._by_id[one.transfer_id] = one

    def get(self, transfer_id: str) -> IncomingTransfer | None:
        with self._lock:
            return self._by_id.get(transfer_id)

    def remove(self, one: IncomingTransfer) -> None:
        with self._lock:
            self._by_id.pop(one.transfer_id, None)

    def take_all(self) -> list[IncomingTransfer]:
        """All of them, and none from here on."""
        with self._lock:
            self._closed = True
            left, self._by_id = list(self._by_id.values()), {}
            return left

    def all(self) -> list[IncomingTransfer]:
        with self._lock:
            return list(self._by_id.values())

    @property
    def kv_bytes(self) -> int:
        """Of extents that are being filled."""
        return sum(one.manifest.metadata.kv_bytes for one in self.all() if one.extent is not None)
