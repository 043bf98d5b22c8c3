"""One media prefix on its way in: its state, its extent, the checksums of its chunks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.transport.chunks import Checksum, ChunkBuffers
from sparsevila_cluster.transport.link import PendingBulk
from sparsevila_cluster.transport.manifest import Manifest


class TransferState(StrEnum):
    """How far a transfer is, as its receiver sees it. The last four never change again."""

    RESERVED = "reserved"
    GRANTED = "granted"
    SENDING = "sending"
    RECEIVED = "received"
    VERIFIED = "verified"
    ACKED = "acked"
    FAILED = "failed"
    ABORTED = "aborted"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        """Whether it never changes again."""
        return self in (TransferState.ACKED, TransferState.FAILED, TransferState.ABORTED, TransferState.EXPIRED)


@dataclass(eq=False)
class IncomingTransfer:
    """One transfer on one lane. `lock` is held by whoever writes to the extent or gives it away.

    granted, announced, received: chunks [0, n) that may come, that the sender said come next, that are verified and in the extent;
    refused: by this side; aborted: the sender said that no more comes; ended: the extent has been published or given back.
    """

    manifest: Manifest
    begin_within_s: float
    buffers: ChunkBuffers | None = None
    extent: Extent | None = None
    granted: int = 0
    announced: int = 0
    received: int = 0
    checksums: dict[int, Future[int]] = field(default_factory=dict)
    state: TransferState = TransferState.RESERVED
    refused: bool = False
    aborted: bool = False
    ended: bool = False
    publishing: bool = False
    heard_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def transfer_id(self) -> str:
        """That of the sender's ticket."""
        return self.manifest.transfer_id

    def wait_for_chunk(self, index: int, pending: PendingBulk, parts: Sequence[Tensor], within_s: float) -> bool:
        """Wait until a chunk has arrived in `parts`; whether it is what was sent. Raises LaneLost."""
        total = Checksum()
        for number, part in enumerate(parts, 1):
            pending.wait(within_s, number)
            if self.manifest.checksum and not self.refused:  # while it is in the cache, and the next part is arriving
                total.add(part)
        if not self.manifest.checksum:
            return True
        try:
            return self.checksums[index].result(within_s) == total.value
        except TimeoutError:
            raise LaneLost(f"no checksum came for chunk {index} of transfer {self.transfer_id}") from None
        finally:
            del self.checksums[index]

    def expect_checksum(self, index: int) -> None:
        """The chunk comes, and then its checksum."""
        self.checksums[index] = Future()

    def set_checksum(self, index: int, checksum: int) -> bool:
        """What the sender says of a chunk that it announced. False if it said so before, or announced none."""
        expected = self.checksums.get(index)
        if expected is None or expected.done():
            return False
        expected.set_result(checksum)
        return True

    def fail_checksums(self) -> None:
        """No checksum comes any more: `wait_for_chunk` raises LaneLost."""
        for expected in list(self.checksums.values()):
            if not expected.done():
                expected.set_exception(LaneLost("the lane is closed"))


class IncomingTransfers:
    """The transfers of one lane, by id. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, IncomingTransfer] = {}
        self._closed = False

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, incoming: IncomingTransfer) -> None:
        """Raises LaneLost: it is here already, or the lane is closed."""
        with self._lock:
            if self._closed or incoming.transfer_id in self._by_id:
                raise LaneLost(f"transfer {incoming.transfer_id} was offered " + ("too late" if self._closed else "twice"))
            self._by_id[incoming.transfer_id] = incoming

    def get(self, transfer_id: str) -> IncomingTransfer | None:
        """None if it is unknown or over."""
        with self._lock:
            return self._by_id.get(transfer_id)

    def remove(self, incoming: IncomingTransfer) -> None:
        """Harmless when repeated."""
        with self._lock:
            self._by_id.pop(incoming.transfer_id, None)

    def take_all(self) -> list[IncomingTransfer]:
        """All of them; none can be added from here on."""
        with self._lock:
            self._closed = True
            left, self._by_id = list(self._by_id.values()), {}
            return left

    def all(self) -> list[IncomingTransfer]:
        """All of them."""
        with self._lock:
            return list(self._by_id.values())

    @property
    def kv_bytes(self) -> int:
        """Of extents that are being filled."""
        return sum(one.manifest.metadata.kv_bytes for one in self.all() if one.extent is not None)
