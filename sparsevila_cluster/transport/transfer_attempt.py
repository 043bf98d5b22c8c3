"""What a route keeps of each lane and of each shipment on it, and whom it tells.

Knows: counters, buffers under way. Does not know: messages or threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import Internal, SparseVilaError
from sparsevila_cluster.transport.chunks import ChunkBuffers, checksum
from sparsevila_cluster.transport.link import Handle, Link
from sparsevila_cluster.transport.manifest import Chunk, Manifest
from sparsevila_cluster.transport.messages import Channel
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer


class AttemptListener(Protocol):
    """What a shipper hears from its routes, in their threads."""

    def broken(self, route: Any, shipment: OutgoingTransfer, error: SparseVilaError) -> None:
        """No lane, or the lane that it was on is gone: send it another way, or fail it."""

    def refused(self, shipment: OutgoingTransfer, error: SparseVilaError) -> bool:
        """Whether to offer it again once the dock has ended it; else it has failed."""

    def acked(self, shipment: OutgoingTransfer, num_bytes: int, transfer_s: float, kind: str, epoch: int) -> None: ...

    def ended(self, shipment: OutgoingTransfer, error: SparseVilaError) -> None: ...

    def sent(self, num_bytes: int, kind: str) -> None: ...

    def lanes(self, change: int) -> None: ...

    def expired(self) -> None: ...


class TransferAttempt:
    """One go of a shipment over one lane: chunks granted, sent, landed."""

    def __init__(self, shipment: OutgoingTransfer, manifest: Manifest, device: torch.device):
        self.shipment = shipment
        self.manifest = manifest
        self.cargo = ChunkBuffers(manifest, shipment.prefix.extent, device)
        self.under_way: deque[tuple[Handle, Sequence[Any]]] = deque()
        self.granted = self.sent = self.landed = self.num_bytes = 0
        self.committed = False
        self.ending = False
        self.again = False
        self.offered_s = self.heard_s = time.monotonic()

    @property
    def next_is_ready(self) -> bool:
        """Whether another chunk is granted and final."""
        free = not self.ending and self.sent < self.granted
        return free and self.shipment.is_final(self.manifest.chunks[self.sent])

    def sum_of(self, chunk: Chunk, parts: Sequence[Tensor]) -> int:
        """The checksum of a chunk, reckoned once in the life of its prefix: a copy that rots before it is sent again shows, too."""
        sums, name = self.shipment.prefix.checksums, (chunk, self.manifest.quantization, len(parts))
        if name not in sums:
            sums[name] = checksum(parts)
        return sums[name]

    def release(self, landed: int) -> None:
        """Chunks below `landed` have arrived: let go of their handles and buffers."""
        if not self.landed <= landed <= self.sent:
            raise Internal(f"chunk {landed} was acknowledged; {self.landed} to {self.sent} are under way")
        for _ in range(landed - self.landed):
            handle, _parts = self.under_way.popleft()
            handle.wait(1.0)
        self.landed = landed
        chunks = self.manifest.chunks[:landed]
        self.shipment.landed_bytes = sum(sum(self.cargo.sizes(chunk)) for chunk in chunks)


class Lane:
    """One epoch of a route."""

    def __init__(self, link: Link, lane_id: str, epoch: int):
        self.link, self.lane_id, self.epoch = link, lane_id, epoch
        self.channel = Channel(link)
        self.attempts: dict[str, TransferAttempt] = {}
        self.reader: threading.Thread | None = None
