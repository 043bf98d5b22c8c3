"""Every error that a user, a client or an operator can meet, with its status on each protocol.

An error message names the offending value and the legal range.
"""

from __future__ import annotations

from typing import Any


class SparseVilaError(Exception):
    """Root of the tree. Anything else that escapes an engine is a bug and becomes `Internal` for clients."""

    grpc_status: str = "INTERNAL"
    http_status: int = 500


class UserError(SparseVilaError, ValueError):
    """The caller can fix it by sending something else."""

    grpc_status = "INVALID_ARGUMENT"
    http_status = 400


class BadRequest(UserError):
    """A parameter of a call is outside its legal range."""


class BadMedia(UserError):
    """Bytes that do not decode to at least one frame, or a source that cannot be read."""


class BadConfig(UserError):
    """An unknown key, or a configuration value outside its legal range."""


class BadCheckpoint(UserError):
    """A directory that is no checkpoint, or one of an architecture or a variant that this engine does not serve."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 412


class TooLarge(UserError):
    """Over a configured limit (bytes, pixels, duration, tokens), or larger than a whole budget could ever hold."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 413


class NotFound(UserError):
    """An unknown or expired media or conversation."""

    grpc_status = "NOT_FOUND"
    http_status = 404


class Unauthenticated(UserError):
    """No API key, or one that nobody has."""

    grpc_status = "UNAUTHENTICATED"
    http_status = 401


class PermissionDenied(UserError):
    """A key, a URL or a path that may not be used for this."""

    grpc_status = "PERMISSION_DENIED"
    http_status = 403


class PoisonRequest(UserError):
    """Workers died with this request in hand, the last one with nothing else to blame. It is refused for a while."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 422


class QueueFull(SparseVilaError):
    """No room now; the same call may succeed after `retry_after_s`."""

    grpc_status = "RESOURCE_EXHAUSTED"
    http_status = 429

    def __init__(self, message: str, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(SparseVilaError):
    """A wait reached its deadline."""

    grpc_status = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(SparseVilaError):
    """The caller went away or aborted."""

    grpc_status = "CANCELLED"
    http_status = 499


class Unavailable(SparseVilaError):
    """No healthy worker, or the engine is closed."""

    grpc_status = "UNAVAILABLE"
    http_status = 503


class _WorkerError(Unavailable):
    """Unavailable because of one worker, whose name is `worker` where it is known."""

    def __init__(self, message: str, worker: str = ""):
        super().__init__(message)
        self.worker = worker


class WorkerLost(_WorkerError):
    """The worker that this was asked of is gone. Another one may do it."""


class WorkerClosed(WorkerLost):
    """The worker says itself that it is closing: nothing that it was asked killed it."""


class LaneLost(_WorkerError):
    """The lane to another worker broke, or that worker sent no heartbeat. A lane at a new epoch may do it."""


class Incompatible(SparseVilaError):
    """Two workers that do not mean the same by the same bytes: another model, layout or wire version."""

    grpc_status = "FAILED_PRECONDITION"
    http_status = 412


class DataLoss(SparseVilaError):
    """Bytes that arrived are not those that were sent. Nothing was made of them."""

    grpc_status = "DATA_LOSS"
    http_status = 500


class Internal(SparseVilaError):
    """A bug of ours. The cause is logged once, with the turn's id."""


# What errors carry besides their message.
DATA = ("retry_after_s", "worker")


def to_failure(error: Exception) -> dict[str, Any]:
    """An error as plain data for another process; what is not ours counts as Internal and keeps its class name in the message."""
    if not isinstance(error, SparseVilaError):
        return {"error": "Internal", "message": f"{type(error).__name__}: {error}"}
    failure: dict[str, Any] = {"error": type(error).__name__, "message": str(error)}
    failure.update((name, getattr(error, name)) for name in DATA if hasattr(error, name))
    return failure


def from_failure(failure: dict[str, Any]) -> SparseVilaError:
    """The error that `to_failure` described; a class unknown here becomes Internal."""
    kinds = {kind.__name__: kind for kind in _tree(SparseVilaError)}
    kind, message = kinds.get(str(failure.get("error")), Internal), str(failure.get("message", ""))
    if issubclass(kind, QueueFull):
        return kind(message, float(failure.get("retry_after_s", 1.0)))
    if issubclass(kind, _WorkerError):
        return kind(message, str(failure.get("worker", "")))
    return kind(message)


def _tree(root: type[SparseVilaError]) -> list[type[SparseVilaError]]:
    return [root, *(kind for child in root.__subclasses__() for kind in _tree(child))]
