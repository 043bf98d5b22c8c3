"""Where a media prefix is sent, as plain data that anybody may hold.

Knows: addresses of docks and tickets to them. Does not know: lanes or tensors; routers and the registry pass these on.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ReceiverAddress:
    """Where a dock is found. Plain data; `token` is a secret between workers: without it nobody joins."""

    worker: str
    kind: str
    host: str
    port: int
    token: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TransferTicket:
    """Leave to send one media prefix to a dock, which expects `transfer_id`. deadline_s: how long the sending may take."""

    transfer_id: str
    dock: ReceiverAddress
    deadline_s: float
