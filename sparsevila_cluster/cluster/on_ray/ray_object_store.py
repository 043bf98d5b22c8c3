"""The object store of the `objectstore` transport: Ray's, and calls to the receiver of a decode worker."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, RayError

from sparsevila_cluster.cluster.on_ray.serve_caller import ServeCaller
from sparsevila_cluster.cluster.worker_api import DecodeWorkerApi
from sparsevila_cluster.cluster.worker_pool import stub
from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import DeadlineExceeded, QueueFull, WorkerLost


class RayObjectStore:
    """A `transport.ObjectStore`. `decode` hands references on (`by_reference`), in the event loop that this is made in."""

    def __init__(self, decode: ServeCaller):
        self._decode = decode
        self._loop = asyncio.get_running_loop()

    def put(self, array: Any) -> Any:
        """A reference to a copy of `array`, which lives as long as the reference. Raises QueueFull: no room in the store."""
        try:
            return ray.put(array)
        except ObjectStoreFullError as error:
            raise QueueFull(f"Ray's object store has no room for {array.nbytes} bytes") from error

    def get(self, token: Any, within_s: float) -> Any:
        """The array, read-only and not copied. Raises DeadlineExceeded, WorkerLost (its owner is gone)."""
        try:
            return ray.get(token, timeout=within_s)
        except GetTimeoutError as error:
            raise DeadlineExceeded(f"an object of Ray's store did not arrive within {within_s:g} s") from error
        except RayError as error:
            raise WorkerLost(f"an object of Ray's store is gone: {type(error).__name__}") from error

    def exchange(
        self, address: ReceiverAddress, lane_id: str, messages: list[tuple[str, Any]], wait_s: float
    ) -> list[tuple[str, Any]]:
        """What that receiver replies. Raises WorkerLost, DeadlineExceeded."""
        receiver = stub(DecodeWorkerApi, partial(self._decode.call, address.worker, within_s=wait_s + GRACE_S))
        replies = asyncio.run_coroutine_threadsafe(receiver.exchange(lane_id, messages, wait_s), self._loop)
        try:
            return replies.result(wait_s + 2 * GRACE_S)
        except TimeoutError as error:
            replies.cancel()
            raise DeadlineExceeded(f"worker {address.worker} did not answer within {wait_s + 2 * GRACE_S:g} s") from error
