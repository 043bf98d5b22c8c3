"""The words of this folder: links, docks, tickets, states, and what a worker hands in.

Knows: the contracts between a lane, the link below it and the workers above it. Does not know: how any link works.

    prefill worker                                                     decode worker
    Shipper -> Route (owner thread) -> Channel -> Link ~~~~~ Link -> Channel -> ReceiveLane (reader, lander) -> Dock -> PrefixSink
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.transport.manifest import Manifest


class Handle(Protocol):
    """Bulk tensors on their way."""

    def wait(self, within_s: float, num: int | None = None) -> None:
        """Return when the first `num` of them, None = all, have left, or landed. Links that cannot tell wait for all.

        Raises LaneLost; a wait that takes too long ends the link.
        """


class Link(Protocol):
    """Two ends of one connection: ordered messages both ways, ordered bulk tensors from the dialer to the dock.

    `straight`: whether bulk may be several tensors per chunk; else one is better. `send`, `ship` and `close` may be called from any
    thread, `receive` and `land` from the reader's thread alone, a handle's `wait` from one thread at a time. Whatever goes wrong
    is a LaneLost, and the link is of no use after it.
    """

    kind: str
    straight: bool

    def device_for(self, device: torch.device) -> torch.device:
        """Where bulk tensors must lie, if an arena is on `device`."""

    def send(self, message: bytes) -> None:
        """Post a message of at most MAX_MESSAGE_BYTES. Does not wait for the peer."""

    def receive(self, within_s: float) -> bytes:
        """The next message. Raises LaneLost when none comes within that time, or the link is closed or broken."""

    def ship(self, parts: Sequence[Tensor]) -> Handle:
        """Post contiguous uint8 tensors, which stay as they are until the handle says that they have left."""

    def land(self, parts: Sequence[Tensor]) -> Handle:
        """Take the next bulk tensors into these, of exactly the sizes that were shipped."""

    def close(self) -> None:
        """End both directions; the peer learns of it. Idempotent. Nothing is read from or written to bulk tensors afterwards."""


MAX_MESSAGE_BYTES = 64 * 2**20


class Listener(Protocol):
    """The door of one kind of link. Hands every new link to the function that it was made with, each from its own thread."""

    host: str
    port: int

    def close(self) -> None:
        """Take no more links. Idempotent; links that stand are not touched."""


Accept = Callable[[Link], None]


class TransferState(StrEnum):
    """How far a transfer is, as its receiver sees it. The last four never change again."""

    RESERVED = "reserved"
    GRANTED = "granted"
    SENDING = "sending"
    LANDED = "landed"
    VERIFIED = "verified"
    ACKED = "acked"
    FAILED = "failed"
    ABORTED = "aborted"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return self in (TransferState.ACKED, TransferState.FAILED, TransferState.ABORTED, TransferState.EXPIRED)


@dataclass(frozen=True)
class TransferReport:
    """A transfer that was acknowledged: the prefix is resident over there.

    transfer_s: from the offer of the last attempt to the acknowledgement; hidden_share: of the bytes, what had landed when the last
    row was written; kind, epoch: of the lane that it went over in the end; attempts: 1 when nothing went wrong.
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
        return asdict(self)


class PrefixSink(Protocol):
    """The worker behind a dock. Called from the dock's threads, one call at a time per lane; must return within its deadline."""

    def allocate(self, manifest: Manifest, deadline_s: float) -> Extent:
        """An extent of `manifest.length` rows. Raises QueueFull, TooLarge, Incompatible, or any other error of ours."""

    def publish(self, manifest: Manifest, extent: Extent) -> None:
        """Take over an extent whose every row has been verified. If it raises, the extent is cancelled."""

    def cancel(self, extent: Extent) -> None:
        """Take back an extent that will not be published and that nothing writes to any more."""


class ObjectStore(Protocol):
    """An object store and a way to call a dock, handed in by whoever has one. Used by the `objectstore` kind.

    Raises LaneLost (or WorkerLost, Unavailable) when the other side is gone.
    """

    def put(self, array: Any) -> Any:
        """Store a uint8 numpy array; what `get` over there needs. The object lives as long as this token does here."""

    def get(self, token: Any, within_s: float) -> Any:
        """The array, readable."""

    def exchange(
        self, dock: ReceiverAddress, lane_id: str, messages: list[tuple[str, Any]], wait_s: float
    ) -> list[tuple[str, Any]]:
        """Call `Dock.exchange(lane_id, messages, wait_s)` of that dock and return its reply."""
