"""Calls of the replicas of one Serve deployment through Serve itself: slow, but Serve knows where they are.

Used to find out where a replica answers (`RpcWorkerPool` does the rest), by whoever starts and watches a cluster, and for what
holds references of Ray's object store. A worker's name is the id of its replica, which is never used again. One call is one message
there and one back: the request names its addressee, and a replica that is not meant says so. (Choosing first and dispatching then,
as Serve offers it, costs 3 ms more.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from sparsevila_cluster.cluster.on_ray.replica_pinning import PIN
from sparsevila_cluster.cluster.rpc.endpoint import WorkerEndpoint
from sparsevila_cluster.cluster.rpc.rpc_worker_pool import RpcWorkerPool
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import Internal, QueueFull, SparseVilaError, WorkerLost, from_failure

GONE = (RayActorError, DeploymentUnavailableError, RequestCancelledError)


class ServeCaller:
    """The replicas behind `handle`, which answer as `RpcServer.call` does.

    by_reference: through Ray's actor calls, which keep count of the object references that arguments hold; otherwise an answer is
    bytes on a connection between two replicas.
    """

    def __init__(self, handle: DeploymentHandle, by_reference: bool = False):
        self.name = handle.deployment_name
        self._calls = handle.options(method_name="call", _by_reference=by_reference)
        self._endpoints = handle.options(method_name="endpoint", _by_reference=by_reference)

    async def call(self, worker: str | None, method: str, *args: Any, within_s: float) -> Any:
        """See `WorkerPool.call`."""
        return await self._answer(self._calls, worker, method, (worker, method, args), within_s)

    async def endpoint(self, worker: str | None, within_s: float) -> WorkerEndpoint:
        """Where a replica answers by itself. Raises as `call`."""
        found: WorkerEndpoint = await self._answer(self._endpoints, worker, "endpoint", (worker,), within_s)
        return found

    async def _answer(self, handle: DeploymentHandle, worker: str | None, what: str, args: tuple[Any, ...], within_s: float) -> Any:
        who, answered = f"worker {worker} of {self.name}" if worker else f"a worker of {self.name}", False
        response = (handle.options(session_id=PIN + worker) if worker else handle).remote(*args)
        try:
            kind, item = await _ray(wait_within(response, within_s, f"{what} of {who}"), who)
            answered = True
        finally:
            if not answered:
                response.cancel()
        if kind == "failure":
            raise from_failure(item)
        return item


def worker_pool(handle: DeploymentHandle, api: Callable[..., object], silence_s: float = 5.0) -> RpcWorkerPool:
    """The replicas behind `handle`, which answer `api`, over connections to them that Serve knows the way of."""
    return RpcWorkerPool(handle.deployment_name, api, ServeCaller(handle).endpoint, silence_s)


async def _ray(answer: Awaitable[Any], who: str) -> Any:
    """`answer`, with Ray's errors about replicas as ours."""
    try:
        return await answer
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise WorkerLost(f"{who} was stopped") from None  # it is the replica's call that was cancelled, not ours
    except (SparseVilaError, TimeoutError):
        raise
    except GONE as error:
        raise WorkerLost(f"{who} is gone ({type(error).__name__})") from error
    except BackPressureError as error:
        raise QueueFull(f"{who} has too many waiting calls") from error
    except (RayError, RayServeException) as error:
        raise Internal(f"{who}: {type(error).__name__}: {error}") from error
    except Exception as error:
        # Serve lets the errors of its gRPC connections through as they are; only cluster/rpc, gateway/grpc and client import grpc.
        code = str(getattr(getattr(error, "code", lambda: None)(), "name", ""))
        if code in ("UNAVAILABLE", "CANCELLED", "UNKNOWN"):
            raise WorkerLost(f"{who} is gone ({code})") from error
        raise Internal(f"{who}: {type(error).__name__}: {error}") from error
