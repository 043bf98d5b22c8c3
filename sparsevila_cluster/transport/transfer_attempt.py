"""One attempt to send a media prefix over one connection: chunks granted, sent, received."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import Internal
from sparsevila_cluster.transport.chunks import ChunkBuffers, checksum
from sparsevila_cluster.transport.link import PendingBulk
from sparsevila_cluster.transport.manifest import Chunk, Manifest
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer


class TransferAttempt:
    """How far an attempt is. granted, sent, received: chunks [0, n) that may be sent, were sent, are verified over there."""

    def __init__(self, transfer: OutgoingTransfer, manifest: Manifest, device: torch.device):
        self.transfer = transfer
        self.manifest = manifest
        self.buffers = ChunkBuffers(manifest, transfer.prefix.extent, device)
        self.under_way: deque[tuple[PendingBulk, Sequence[Any]]] = deque()
        self.granted = self.sent = self.received = self.num_bytes = 0
        self.committed = False
        self.ending = False
        self.again = False
        self.offered_s = self.heard_s = time.monotonic()

    @property
    def next_is_ready(self) -> bool:
        """Whether another chunk is granted and final."""
        free = not self.ending and self.sent < self.granted
        return free and self.transfer.is_final(self.manifest.chunks[self.sent])

    def checksum_of(self, chunk: Chunk, parts: Sequence[Tensor]) -> int:
        """Computed once in the life of the prefix: damage to a copy in memory before it is sent again shows, too."""
        known, name = self.transfer.prefix.checksums, (chunk, self.manifest.quantization, len(parts))
        if name not in known:
            known[name] = checksum(parts)
        return known[name]

    def release(self, received: int) -> None:
        """Chunks below `received` have arrived: let go of their buffers. Raises Internal: more than were sent."""
        if not self.received <= received <= self.sent:
            raise Internal(f"chunk {received} was acknowledged; {self.received} to {self.sent} are under way")
        for _ in range(received - self.received):
            pending, _parts = self.under_way.popleft()
            pending.wait(1.0)
        self.received = received
        chunks = self.manifest.chunks[:received]
        self.transfer.received_bytes = sum(sum(self.buffers.sizes(chunk)) for chunk in chunks)
