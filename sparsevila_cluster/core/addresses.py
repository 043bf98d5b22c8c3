"""Where a media prefix is sent, as plain data that routers and the directory pass on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ReceiverAddress:
    """Where the KV receiver of `worker` listens, and by which kind of link it is reached.

    `token` is a secret between workers: without it nobody may open a lane.
    """

    worker: str
    kind: str
    host: str
    port: int
    token: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class TransferTicket:
    """Leave to send one media prefix to `receiver`, which expects `transfer_id`. deadline_s: how long the sending may take."""

    transfer_id: str
    receiver: ReceiverAddress
    deadline_s: float
