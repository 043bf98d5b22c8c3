"""Where a media prefix is sent, as plain data without tensors or connections."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ReceiverAddress:
    """Where a KV receiver listens. `token` is a secret between workers: without it no connection is accepted."""

    worker: str
    kind: str
    host: str
    port: int
    token: str

    def as_dict(self) -> dict[str, Any]:
        """Its fields, to be sent as data."""
        return asdict(self)


@dataclass(frozen=True)
class TransferTicket:
    """Permission to send one media prefix to `receiver`, which expects `transfer_id`. deadline_s: for the whole transfer."""

    transfer_id: str
    receiver: ReceiverAddress
    deadline_s: float
