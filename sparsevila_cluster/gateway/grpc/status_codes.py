"""Errors on their way to a gRPC client: status code, message and trailing metadata.

The message is for people. The trailer `sparsevila-failure-bin` holds msgpack of `to_failure(error)`, so that a client raises the
class that was raised here; `retry-after` (seconds) comes with QueueFull.
"""

from __future__ import annotations

import grpc
import msgpack

from sparsevila_cluster.core.errors import QueueFull, SparseVilaError, to_failure

FAILURE_TRAILER = "sparsevila-failure-bin"
RETRY_TRAILER = "retry-after"
# Clients refuse metadata above 8 KiB. A message stands there twice, once percent-encoded (up to three times as long) and once in
# base64 (4/3 as long).
MAX_MESSAGE_BYTES = 1500


def status_of(error: SparseVilaError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """(code, details, trailing metadata)."""
    message = clipped(str(error))
    trailers: list[tuple[str, str | bytes]] = [(FAILURE_TRAILER, msgpack.packb({**to_failure(error), "message": message}))]
    if isinstance(error, QueueFull):
        trailers.append((RETRY_TRAILER, f"{error.retry_after_s:g}"))
    return grpc.StatusCode[error.grpc_status], message, tuple(trailers)


def clipped(message: str) -> str:
    """`message` as legal UTF-8 of at most MAX_MESSAGE_BYTES bytes, cut at the end."""
    data = message.encode("utf-8", "backslashreplace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return data.decode()
    return data[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."
