"""gRPC errors as typed errors, and when the same call may be made again."""

from __future__ import annotations

import asyncio
import random
import time

import grpc.aio
import msgpack

from sparsevila_cluster.core.errors import (
    BadRequest,
    DataLoss,
    DeadlineExceeded,
    Incompatible,
    Internal,
    NotFound,
    PermissionDenied,
    QueueFull,
    SparseVilaError,
    TooLarge,
    Unauthenticated,
    Unavailable,
    from_failure,
)

FAILURE_KEY = "sparsevila-failure-bin"
# Since the first of several failures in a row: how long a server that nobody reaches is looked for.
RETRY_FOR_S = 20.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
MAX_REFUSALS = 5
# What gRPC itself says of a stream whose other end went away, under codes that servers use for other things.
SYNTHETIC_STATUS = "Internal error from Core"
BROKEN = (
    SYNTHETIC_STATUS.lower(), "rst_stream", "stream terminated", "stream removed", "goaway", "connection reset", "socket closed",
)  # fmt: skip
OF_CODE: dict[str, type[SparseVilaError]] = {
    "INVALID_ARGUMENT": BadRequest,
    "OUT_OF_RANGE": BadRequest,
    "ALREADY_EXISTS": BadRequest,
    "NOT_FOUND": NotFound,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
    "RESOURCE_EXHAUSTED": QueueFull,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAVAILABLE": Unavailable,
    "ABORTED": Unavailable,
    "FAILED_PRECONDITION": Incompatible,
    "UNIMPLEMENTED": Incompatible,
    "DATA_LOSS": DataLoss,
}


def to_error(error: grpc.aio.AioRpcError, target: str, what: str) -> SparseVilaError:
    """The error that the server meant, or the one that its status code says. Its message begins with the target."""
    failure = _failure(error)
    if failure is not None:
        return from_failure({**failure, "message": f"{target}: {failure.get('message', '')}"})
    code, details = error.code().name, error.details() or error.code().name
    message = f"{target}: {what}: {details}"
    if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
        return TooLarge(message)
    # A server says in its failure who cancelled; without one, the stream was cut.
    if code == "CANCELLED" or (code in ("INTERNAL", "UNKNOWN") and any(sign in details.lower() for sign in BROKEN)):
        return Unavailable(message)
    return OF_CODE.get(code, Internal)(message)


def is_silence(error: grpc.aio.AioRpcError) -> bool:
    """Whether the server was not reached, broke off or kept silent, as opposed to one that says what is wrong."""
    return _failure(error) is None and isinstance(to_error(error, "", ""), Unavailable | DeadlineExceeded)


def _failure(error: grpc.aio.AioRpcError) -> dict[str, object] | None:
    for key, value in error.trailing_metadata() or ():
        if key == FAILURE_KEY and isinstance(value, bytes):
            try:
                failure = msgpack.unpackb(value)
            except (ValueError, msgpack.UnpackException):  # the status code has to do
                return None
            return failure if isinstance(failure, dict) else None
    return None


class RetryPolicy:
    """The deadline of one call, and the pauses before it is made again.

    Unavailable is tried again for RETRY_FOR_S since the last success, QueueFull MAX_REFUSALS times when the server expects room,
    both only inside the deadline.
    """

    def __init__(self, within_s: float, what: str):
        self.within_s, self.what = within_s, what
        self._until_s = time.monotonic() + within_s
        self._failing_since_s: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._num_refusals = 0

    def left_s(self) -> float:
        """Seconds until the deadline. Raises DeadlineExceeded at it."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded(f"{self.what} took longer than {self.within_s:g} s")
        return left_s

    def worked(self) -> None:
        """Something came of the last attempt: the next failure is a first one."""
        self._failing_since_s, self._pause_s = None, FIRST_PAUSE_S

    async def pause(self, error: SparseVilaError) -> None:
        """Wait until the call may be made again after `error`, or raise it."""
        pause_s = self._next_pause_s(error)
        if pause_s is None or time.monotonic() + pause_s >= self._until_s:
            raise error
        await asyncio.sleep(pause_s)

    def _next_pause_s(self, error: SparseVilaError) -> float | None:
        if isinstance(error, QueueFull):
            self._num_refusals += 1
            # All who were refused together must not come back together.
            return error.retry_after_s * random.uniform(1.0, 1.25) if self._num_refusals <= MAX_REFUSALS else None
        if not isinstance(error, Unavailable):
            return None
        now_s = time.monotonic()
        self._failing_since_s = self._failing_since_s or now_s
        if now_s - self._failing_since_s >= RETRY_FOR_S:
            return None
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.5, 1.0)


def closed_error(target: str) -> Unavailable:
    """What every call on a closed client raises."""
    return Unavailable(f"this client of {target} is closed")


def is_cancelled() -> bool:
    """Whether the running task was cancelled, as opposed to the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
