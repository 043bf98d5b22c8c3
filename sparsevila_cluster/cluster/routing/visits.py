"""A request's visit to a worker: it waits to enter, alone if it is suspected, and is judged if the worker dies meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType

from sparsevila_cluster.cluster.messages import PoolName
from sparsevila_cluster.cluster.routing.claims import Claims
from sparsevila_cluster.cluster.routing.suspects import InHand
from sparsevila_cluster.cluster.routing.worker_clients import WorkerClients
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import (
    Cancelled,
    DeadlineExceeded,
    PoisonRequest,
    SparseVilaError,
    WorkerClosed,
    WorkerLost,
)

log = logging.getLogger(__name__)

# Tokens that a worker may have made, but not sent, when it died: one list of events.
LAG_TOKENS = 8
# A turn whose client does not read keeps a suspect from its worker for no longer than this.
ENTERING_S = 5.0


class Visits:
    """The visits of one router's requests."""

    def __init__(self, clients: WorkerClients, claims: Claims):
        self.clients = clients
        self._claims = claims

    async def enter(self, pool: PoolName, worker: str, names: Sequence[str], reach: int, deadline: Deadline) -> Visit:
        """Wait until a request may be sent to a worker; the visit is to be entered at once, by `async with`.

        names: its fingerprint, then others that it is refused by; reach: how far it has come, in tokens that were heard.

        Raises:
            PoisonRequest: it is refused. WorkerLost: it is suspected, and the worker does not answer. DeadlineExceeded, Cancelled.
        """
        suspects, fingerprint = self.clients.suspects, names[0]
        while True:
            suspects.check(fingerprint, time.monotonic())
            alone, gate = suspects.is_suspected(fingerprint, time.monotonic()), suspects.gate(worker)
            await gate.enter(alone, deadline, f"waiting for who is alone at worker {worker}")
            if alone == suspects.is_suspected(fingerprint, time.monotonic()):
                break
            gate.leave(alone)
        async with AsyncExitStack() as stack:
            stack.callback(gate.leave, alone)
            suspects.check(fingerprint, time.monotonic())
            if alone:
                # Also from suspects of other routers; and what dies here is alive now.
                await stack.enter_async_context(self._claims.wait_for(f"alone at {worker}", deadline))
                await self.clients.worker(pool, worker, deadline).info()
                log.info("a suspect is alone at worker %s", worker, extra={"at": worker})
            return Visit(self, pool, InHand(worker, names, reach), alone, stack.pop_all())
        raise AssertionError("an exit stack swallows nothing")


class Visit:
    """One request at one worker, for the length of an `async with` block. WorkerLost becomes PoisonRequest if it was of this."""

    def __init__(self, visits: Visits, pool: PoolName, request: InHand, alone: bool, entry: AsyncExitStack):
        self._clients, self._pool, self._request, self._entry = visits.clients, pool, request, entry
        suspects = self._clients.suspects
        # A turn that goes on need not say again what was heard of it. What died may have been further than anybody heard.
        self._through_at = (request.reach or suspects.reach_of(request.fingerprint)) + (LAG_TOKENS if alone else 0)
        self._alone, self._done = alone, False
        bounded = pool == "decode" and not alone
        self._timer = asyncio.get_running_loop().call_later(ENTERING_S, self._let_others_in) if bounded else None
        suspects.begin(request)

    @property
    def worker(self) -> str:
        """Where it is."""
        return self._request.worker

    @property
    def is_alone(self) -> bool:
        """Whether others are kept out until this has got further than before."""
        return self._alone

    async def got_to(self, reach: int) -> None:
        """How far it has come now, in tokens that were heard. Behind the point where a worker died it is free of suspicion."""
        self._request.reach = max(self._request.reach, reach)
        if reach > self._through_at:
            await self._get_through()

    async def finish(self) -> None:
        """The worker has done it."""
        self._done = True
        await self._get_through()

    async def _get_through(self) -> None:
        if self._alone or self._done:
            self._clients.suspects.clear(self._request.fingerprint)
        self._alone = False
        await self._leave_entry()

    async def _leave_entry(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._entry.pop_all().aclose()

    def _let_others_in(self) -> None:
        self._clients.in_background(self._leave_entry(), f"entering worker {self.worker}")

    async def __aenter__(self) -> Visit:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            died = isinstance(error, WorkerLost) and not isinstance(error, WorkerClosed)
            if died and self._alone and await self._is_worker_gone():
                raise self._refused() from error
        finally:
            # Errors are the worker's, who is done with it, but for those.
            left = not isinstance(error, SparseVilaError) or isinstance(error, DeadlineExceeded | Cancelled)
            self._clients.suspects.end(self._request, time.monotonic(), lingers=left and not self._done and error is not None)
            await self._leave_entry()

    async def _is_worker_gone(self) -> bool:
        """Whether it does not answer: a stream may break for other reasons."""
        soon = Deadline(self._clients.config.router.call_timeout_s)
        try:
            await self._clients.worker(self._pool, self.worker, soon, trips_breaker=False).info()
        except WorkerClosed:
            return False
        except (WorkerLost, DeadlineExceeded):
            return True
        except SparseVilaError:
            pass
        return False

    def _refused(self) -> PoisonRequest:
        suspects = self._clients.suspects
        workers = suspects.refuse(self._request, time.monotonic())
        names = tuple(self._request.names)
        log.error("request %s is refused: workers %s died of it", names[0][:80], ", ".join(sorted(workers)))
        noting = self._clients.directory.once().refuse(names, suspects.refuse_s)
        self._clients.in_background(noting, "telling the directory which request is refused")
        return PoisonRequest(f"two workers died with this request in hand; it is refused for {suspects.refuse_s:g} s")
