"""What a kind of link must offer: messages both ways, bulk tensors from a sender to a receiver.

prefill worker                                                                decode worker
KVSender -> SendLane (owner thread) -> Channel -> Link ~~~~~ Link -> Channel -> ReceiveLane -> KVReceiver -> PrefixSink
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.cluster_config import TransportConfig

MAX_MESSAGE_BYTES = 64 * 2**20


class PendingBulk(Protocol):
    """Bulk tensors on their way."""

    def wait(self, within_s: float, num: int | None = None) -> None:
        """Return when the first `num` of them, None = all, have left, or arrived. Links that cannot tell wait for all.

        Raises LaneLost; a wait that takes too long ends the link.
        """


class Link(Protocol):
    """Two ends of one connection: ordered messages both ways, ordered bulk tensors from the sender to the receiver.

    `straight`: whether bulk may be several tensors per chunk; else one is better. `send`, `send_bulk` and `close` may be called
    from any thread, `receive` and `receive_bulk` from the reader's thread alone, `PendingBulk.wait` from one thread at a time.
    Whatever goes wrong is a LaneLost, and the link is of no use after it.
    """

    kind: str
    straight: bool

    @property
    def can_send(self) -> bool:
        """Whether a short message would leave at once. False for as long as the peer does not read what was sent."""

    def device_for(self, device: torch.device) -> torch.device:
        """Where bulk tensors must lie, if an arena is on `device`."""

    def send(self, message: bytes) -> None:
        """Post a message of at most MAX_MESSAGE_BYTES. Does not wait for the peer."""

    def receive(self, within_s: float) -> bytes:
        """The next message. Raises LaneLost when none comes within that time, or the link is closed or broken."""

    def send_bulk(self, parts: Sequence[Tensor]) -> PendingBulk:
        """Post contiguous uint8 tensors, which stay as they are until `wait` says that they have left."""

    def receive_bulk(self, parts: Sequence[Tensor]) -> PendingBulk:
        """Take the next bulk tensors into these, of exactly the sizes that were sent."""

    def close(self) -> None:
        """End both directions; the peer learns of it. Idempotent. Nothing is read from or written to bulk tensors afterwards."""


class Listener(Protocol):
    """Waits for links of one kind. Hands every new link to the function that it was made with, each from its own thread."""

    host: str
    port: int

    def close(self) -> None:
        """Take no more links. Idempotent; links that stand are not touched."""


Accept = Callable[[Link], None]


class ObjectStore(Protocol):
    """An object store and a way to call a receiver, handed in by whoever has one. Used by the `objectstore` kind.

    Raises LaneLost (or WorkerLost, Unavailable) when the other side is gone.
    """

    def put(self, array: Any) -> Any:
        """Store a uint8 numpy array; what `get` over there needs. The object lives as long as this token does here."""

    def get(self, token: Any, within_s: float) -> Any:
        """The array, readable."""

    def exchange(
        self, address: ReceiverAddress, lane_id: str, messages: list[tuple[str, Any]], wait_s: float
    ) -> list[tuple[str, Any]]:
        """Call `KVReceiver.exchange(lane_id, messages, wait_s)` of the receiver at `address` and return its reply."""


@dataclass(frozen=True)
class Endpoint:
    """What a worker brings to its links: the device of its KV, and an object store if it has one."""

    config: TransportConfig
    device: torch.device
    object_store: ObjectStore | None = None


def lacks_nothing(endpoint: Endpoint) -> str:
    """Of a kind that works everywhere."""
    return ""


@dataclass(frozen=True)
class Transport:
    """One kind of link, as a row of `TRANSPORTS`.

    Attributes:
        listen: a listener (for this token) that hands links to `accept`; None where links come through `KVReceiver.exchange`.
        dial: a new link to a receiver, for a lane of this id. Blocks for up to config.dial_timeout_s. Raises LaneLost.
        lacks: what this kind needs and a worker does not have, "" = nothing.
        instead: the kind by which a worker that lacks something still reaches a receiver of this kind, "" = none.
    """

    listen: Callable[[str, Endpoint, Accept], Listener | None]
    dial: Callable[[ReceiverAddress, str, Endpoint], Link]
    lacks: Callable[[Endpoint], str] = lacks_nothing
    instead: str = ""
