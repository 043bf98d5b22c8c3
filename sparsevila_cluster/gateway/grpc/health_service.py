"""`grpc.health.v1`: the empty name tells whether the server takes calls, the service's name whether it can answer them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sparsevila_cluster.gateway.audit_log import host_of
from sparsevila_cluster.gateway.grpc.call_interceptor import SERVICE
from sparsevila_cluster.gateway.refusal_pace import RefusalPace

# How soon a watcher learns of a change.
POLL_S = 0.2
ANSWER_S = 2.0
# Streams of Watch at a time, which need no key; load balancers hold one each.
MAX_WATCHERS = 100

Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):
    """ready: asked once per POLL_S at most, however many want to know. An error, or no answer within ANSWER_S twice: not ready.

    One answer that does not come may be the lateness of our own event loop, and a server that is late must not leave its
    balancer for it.
    """

    def __init__(self, ready: Callable[[], Awaitable[bool]], refusals: RefusalPace):
        self._ready, self._refusals = ready, refusals
        self._leaving, self._changed = False, asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._known, self._silent = (-POLL_S, False), False
        self._asking: asyncio.Future[None] | None = None
        self._num_watchers = 0

    def leave(self) -> None:
        """From now on nothing is serving. Those who watch are told, and their streams end."""
        self._leaving = True
        self._wake()

    async def Check(self, request: Any, context: Any) -> Any:
        """The status of one service. NOT_FOUND: an unknown name."""
        status = await self._status(request.service)
        if status == Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service[:200]!r}; there are '' and {SERVICE!r}")
        return Status(status=status)

    async def List(self, request: Any, context: Any) -> Any:
        """The status of both names."""
        statuses = {name: Status(status=await self._status(name)) for name in ("", SERVICE)}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(self, request: Any, context: Any) -> None:
        """The status of one service, again after each change. RESOURCE_EXHAUSTED: MAX_WATCHERS watch already."""
        if self._num_watchers >= MAX_WATCHERS:
            await self._refusals.hold(host_of(context.peer()))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} streams watch already; that is the limit")
        self._num_watchers += 1
        try:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look())
            await self._watch(request.service, context)
        finally:
            self._num_watchers -= 1

    async def _watch(self, service: str, context: Any) -> None:
        sent = None
        while True:
            changed, leaving, status = self._changed, self._leaving, await self._status(service)
            if status != sent:
                await context.write(Status(status=status))
                sent = status
            if leaving:
                return
            await changed.wait()

    async def _look(self) -> None:
        """Ask again and again, as long as anybody watches."""
        while self._num_watchers and not self._leaving:
            await self._is_ready()
            await asyncio.sleep(POLL_S)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _status(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(Status.SERVICE_UNKNOWN)
        serves = not self._leaving and (service == "" or await self._is_ready())
        return int(Status.SERVING if serves and not self._leaving else Status.NOT_SERVING)

    async def _is_ready(self) -> bool:
        if time.monotonic() - self._known[0] > POLL_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.ensure_future(self._ask())
            await asyncio.shield(self._asking)
        return self._known[1]

    async def _ask(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                ready, self._silent = await self._ready(), False
        except TimeoutError:
            ready, self._silent = self._known[1] and not self._silent, True
        except Exception:
            ready = False
        before, self._known = self._known[1], (time.monotonic(), ready)
        if ready != before:  # whoever asked: one who watches may have heard what was true in between
            self._wake()
