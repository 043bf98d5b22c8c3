"""One attempt to send a media prefix over one connection: chunks granted, sent, received."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import LaneLost
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
        self.granted = self.sent = self.received = self.num_bytes = self._received_bytes = 0
        self.committed = False
        self.ending = False
        self.again = False
        self.offered_s = self.heard_s = time.monotonic()

    @property
    def _receiver(self) -> str:
        return self.transfer.ticket.receiver.worker

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

    def grant(self, granted: int, received: int) -> None:
        """What the receiver allows, and what has arrived, whose buffers are let go.

        Raises LaneLost: more than there is, or more than was sent.
        """
        if granted > len(self.manifest.chunks):
            raise LaneLost(f"{granted} of {len(self.manifest.chunks)} chunks were granted", self._receiver)
        if not self.received <= received <= self.sent:
            text = f"{received} chunks were said to have arrived; {self.received} had, and {self.sent} were sent"
            raise LaneLost(text, self._receiver)
        self.granted = max(self.granted, granted)
        for chunk in self.manifest.chunks[self.received : received]:
            pending, _parts = self.under_way.popleft()
            pending.wait(1.0)
            self._received_bytes += sum(self.buffers.sizes(chunk))
        self.received = received
        self.transfer.received_bytes = self._received_bytes
