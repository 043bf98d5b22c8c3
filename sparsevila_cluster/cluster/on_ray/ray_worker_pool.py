"""A `WorkerPool` over the replicas of one Serve deployment: method calls and streams, by worker's name.

A worker's name is the id of its replica, which is never used again. Replicas answer in the envelopes of `RpcServer`.

Errors of methods come as values, so that no exception crosses Ray. One call is one message there and one back: the request names
its addressee, and a replica that is not meant says so. (Choosing first and dispatching then, as Serve offers it, costs 3 ms more.)
A stream sends a beat when it has arrived and whenever its worker has nothing to send: silence means that the worker is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from sparsevila_cluster.cluster.on_ray.replica_pinning import PIN
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, QueueFull, SparseVilaError, WorkerLost, from_failure

GONE = (RayActorError, DeploymentUnavailableError, RequestCancelledError)


class RayWorkerPool:
    """The replicas behind `handle`.

    silence_s: a stream that nothing comes from for this long has lost its worker. by_reference: through Ray's actor calls, which
    keep count of the object references that arguments hold; otherwise an answer is bytes on a connection between two replicas.
    """

    def __init__(self, handle: DeploymentHandle, silence_s: float = 5.0, by_reference: bool = False):
        self.name = handle.deployment_name
        self._calls = handle.options(method_name="call", _by_reference=by_reference)
        self._streams = handle.options(method_name="stream", stream=True, _by_reference=by_reference)
        self._silence_s = silence_s

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        """See `WorkerPool.call`."""
        who, answered = self._name(worker), False
        response = _at(self._calls, worker).remote(worker, method, args)
        try:
            kind, item = await _ray(wait_within(response, within_s, f"{method} of {who}"), who)
            answered = True
        finally:
            if not answered:
                response.cancel()
        if kind == "failure":
            raise from_failure(item)
        return item

    async def stream(self, worker: str | None, method: str, *args: Any, within_s: float) -> AsyncGenerator[Any, None]:
        """See `WorkerPool.stream`. Raises WorkerLost also when nothing is heard of the worker for `silence_s`."""
        who, until_s = self._name(worker), time.perf_counter() + within_s
        response: Any = _at(self._streams, worker).remote(worker, method, args)
        last: tuple[str, Any] | None = None
        over = False
        try:
            # To the very end, also behind the last envelope: a call that is not read to its end counts as under way.
            while not over:
                left_s = until_s - time.perf_counter()
                try:
                    async with asyncio.timeout(min(left_s, self._silence_s)):
                        kind, item = await _ray(response.__anext__(), who)
                except StopAsyncIteration:
                    over = True
                except TimeoutError:
                    if left_s <= self._silence_s:
                        raise DeadlineExceeded(f"{method} of {who} took longer than {within_s:g} s") from None
                    raise WorkerLost(f"{who} has not been heard of for {self._silence_s:g} s") from None
                else:
                    if kind == "value":
                        yield item
                    elif kind != "beat":
                        last = kind, item
        finally:
            if not over:
                response.cancel()
        if last is None:
            raise WorkerLost(f"{who} ended a stream of {method} without its end")
        if last[0] == "failure":
            raise from_failure(last[1])

    def _name(self, worker: str | None) -> str:
        return f"worker {worker} of {self.name}" if worker else f"a worker of {self.name}"


def _at(handle: DeploymentHandle, worker: str | None) -> DeploymentHandle:
    return handle.options(session_id=PIN + worker) if worker else handle


async def _ray(answer: Awaitable[Any], who: str) -> Any:
    """`answer`, with Ray's errors about replicas as ours."""
    try:
        return await answer
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise WorkerLost(f"{who} was stopped") from None  # it is the replica's call that was cancelled, not ours
    except (SparseVilaError, TimeoutError, StopAsyncIteration):
        raise
    except GONE as error:
        raise WorkerLost(f"{who} is gone ({type(error).__name__})") from error
    except BackPressureError as error:
        raise QueueFull(f"{who} has too many waiting calls") from error
    except (RayError, RayServeException) as error:
        raise Internal(f"{who}: {type(error).__name__}: {error}") from error
    except Exception as error:
        # Serve lets the errors of its gRPC connections through as they are; only gateway/grpc and client import grpc.
        code = str(getattr(getattr(error, "code", lambda: None)(), "name", ""))
        if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN"):
            raise WorkerLost(f"{who} is gone ({code})") from error
        raise Internal(f"{who}: {type(error).__name__}: {error}") from error
