"""Every error that a user, a client or an operator can meet, with its status on each protocol.

Knows: which kind of failure maps to which gRPC status name and HTTP code (plain data, so that this file imports nothing).
Does not know: protocols. The doors in `gateway/` translate; the command line prints the message and exits with 2 for `UserError`.

An error message names the offending value and the legal range.
"""

from __future__ import annotations


class SparseVilaError(Exception):
    """Root of the tree. Anything else that escapes an engine is a bug and becomes `Internal` at the door."""

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


class Internal(SparseVilaError):
    """A bug of ours. The cause is logged once, with the turn's id."""
