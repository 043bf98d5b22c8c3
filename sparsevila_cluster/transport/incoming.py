"""What a lane's receiving end keeps of each transfer, and what it asks of its dock.

Knows: counters, locks, states. Does not know: messages or threads.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from sparsevila_cluster.kv import Extent
from sparsevila_cluster.transport.chunks import Cargo
from sparsevila_cluster.transport.link import TransferState
from sparsevila_cluster.wire import Manifest


class Desk(Protocol):
    """What a dock does for its lanes. All of it may be called from any thread."""

    def welcome(self, lane: Any, hello: dict[str, Any]) -> None:
        """Raises PermissionDenied, Incompatible, QueueFull."""

    def admit(self, lane: Any, transfer_id: str, key: str) -> float | None:
        """Seconds within which the transfer must have begun; None if it was acknowledged before. Raises NotFound."""

    def moved(self, lane: Any, transfer_id: str, state: TransferState) -> None:
        """A transfer of this lane is in another state now."""

    def landed(self, num_bytes: int, kind: str) -> None: ...

    def gone(self, lane: Any) -> None:
        """The lane is closed and holds nothing any more."""


@dataclass(eq=False)
class Incoming:
    """One transfer on this lane. `lock` is held by whoever writes to the extent or gives it away."""

    manifest: Manifest
    begin_within_s: float
    cargo: Cargo | None = None
    extent: Extent | None = None
    granted: int = 0
    announced: int = 0
    landed: int = 0
    state: TransferState = TransferState.RESERVED
    refused: bool = False
    ended: bool = False
    publishing: bool = False
    heard_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def transfer_id(self) -> str:
        return self.manifest.transfer_id
