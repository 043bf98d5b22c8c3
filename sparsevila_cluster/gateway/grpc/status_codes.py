"""Errors on their way to a gRPC client: status code, message and trailing metadata, translated here and nowhere else.

Knows: our error tree, gRPC's codes, and how much room a status has. Does not know: methods, or who calls them.

The message is for people. The trailer `sparsevila-failure-bin` holds msgpack of `to_failure(error)`, so that a client raises the
class that was raised here; `retry-after` (seconds) comes with QueueFull.
"""

from __future__ import annotations

import logging
from typing import Any

import grpc
import msgpack

from sparsevila_cluster.core.errors import Internal, QueueFull, SparseVilaError, from_failure, to_failure
from sparsevila_cluster.media.media_source import short_name

log = logging.getLogger(__name__)

FAILURE_TRAILER = "sparsevila-failure-bin"
RETRY_TRAILER = "retry-after"
# Clients refuse metadata above 8 KiB. A message stands there twice, once percent-encoded (up to three times as long) and once in
# base64 (4/3 as long).
MAX_MESSAGE_BYTES = 1500


def as_known(error: Exception, what: str) -> SparseVilaError:
    """`error` if it is one of ours. Anything else is a bug: logged once, with `what` failed, and told without its details."""
    if isinstance(error, SparseVilaError):
        return error
    log.error("%s failed", what, exc_info=error)
    return Internal(f"{what} failed: {type(error).__name__}; the server's log has the cause")


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


def renamed(error: SparseVilaError, names: dict[str, str]) -> SparseVilaError:
    """The same error, with every path of `names` (as it is, quoted, or shortened) called what the client calls it."""
    message = str(error)
    for path, name in names.items():
        for written in (short_name(path), repr(path), path):
            message = message.replace(written, name)
    if message == str(error):
        return error
    failure: dict[str, Any] = {**to_failure(error), "message": message}
    return from_failure(failure)
