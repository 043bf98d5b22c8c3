"""Where a process answers calls, and what both ends of a connection agree on."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsevila_cluster.core.config import MIB

SERVICE = "sparsevila.Worker"
CALL, STREAM = "Call", "Stream"
TOKEN_KEY = "sparsevila-token"
# A report of everything that a worker holds is the largest message.
MAX_MESSAGE_BYTES = 256 * MIB
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class WorkerEndpoint:
    """Where `worker` answers. token: a secret of that process: whoever has it may call, and nobody else took its port."""

    worker: str
    host: str
    port: int
    token: str = field(repr=False)

    @property
    def target(self) -> str:
        """As gRPC names it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return ((TOKEN_KEY, self.token),)

    def admits(self, metadata: Sequence[tuple[str, str | bytes]]) -> bool:
        """Whether a call with this metadata has the token."""
        return any(key == TOKEN_KEY and hmac.compare_digest(str(value).encode(), self.token.encode()) for key, value in metadata)
