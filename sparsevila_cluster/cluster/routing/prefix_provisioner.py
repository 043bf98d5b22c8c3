"""Making a media prefix resident on some decode worker: found at one, shipped from a copy, or made.

found at a holder | reserve -> ship from a copy | claim -> reserve -> make -> resident, and a copy stays
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from sparsevila_cluster.cluster.messages import PoolName, WorkerReport
from sparsevila_cluster.cluster.routing.claims import Claims
from sparsevila_cluster.cluster.routing.placement import choose_decode, choose_holder, choose_prefill, choose_source
from sparsevila_cluster.cluster.routing.visits import Visits
from sparsevila_cluster.cluster.routing.worker_clients import PAUSE_S, WorkerClients
from sparsevila_cluster.core.addresses import TransferTicket
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import (
    DataLoss,
    DeadlineExceeded,
    Incompatible,
    LaneLost,
    NotFound,
    QueueFull,
    SparseVilaError,
    Unavailable,
    WorkerLost,
)
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest
from sparsevila_cluster.core.single_flight import SingleFlight

if TYPE_CHECKING:
    from sparsevila_cluster.core.protocols import Progress

log = logging.getLogger(__name__)

# What another worker may do better. Everything else is for the caller.
RETRIED = (Unavailable, QueueFull, DataLoss, Incompatible, DeadlineExceeded)
# A worker is gone or going: a replacement may be under way.
GONE = (WorkerLost, LaneLost)


@dataclass(frozen=True)
class PrefixRequest:
    """A media prefix that is to be resident.

    source: how to make it, None if that is not known here any more; again: it was made before, so the source may have changed.
    lost: workers that are out of the question. lacking: decode workers that do not hold it, whatever the directory says.
    """

    key: str
    deadline: Deadline
    source: PrepareRequest | None = None
    progress: Progress | None = None
    digest: str | None = None
    again: bool = False
    lost: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()


@dataclass
class _Search:
    """What the attempts so far have shown.

    targets, senders: decode workers, and workers that send or make, that are out of the question. copies: workers that have one,
    though it is not reported yet. encoded: this search had the media made, even if another attempt delivers it.
    """

    targets: set[str]
    senders: set[str] = field(default_factory=set)
    copies: dict[str, WorkerReport] = field(default_factory=dict)
    encoded: bool = False
    num_attempts: int = 0
    error: SparseVilaError | None = None
    waiting_since_s: float | None = None


@dataclass
class _Attempt:
    """One transfer. phase: what was under way when it failed; copied: the sender has a whole copy, whatever became of the lane."""

    target: WorkerReport
    sender: WorkerReport
    making: bool
    transfer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    phase: Literal["claim", "reserve", "make", "ship"] = "claim"
    copied: bool = False


class PrefixProvisioner:
    """Makes prefixes resident for one router."""

    def __init__(self, clients: WorkerClients, claims: Claims, visits: Visits):
        self._clients, self._claims, self._visits = clients, claims, visits
        self._flights = SingleFlight[tuple[str, MediaHandle]]()

    async def provide(self, request: PrefixRequest) -> tuple[str, MediaHandle]:
        """(A decode worker outside `request.lost` where the prefix is now resident, its handle). Callers at the same time share.

        Raises:
            NotFound: it is nowhere, and there is no source to make it from. Unavailable, QueueFull, LaneLost, DataLoss,
            Incompatible: no worker could, in `max_attempts`. DeadlineExceeded, Cancelled. BadMedia, BadRequest, TooLarge,
            PoisonRequest.
        """
        # A caller that cannot have it made must not decide for those that can.
        flight = f"{request.key}/{request.source is not None}"
        for _ in range(self._clients.config.router.max_attempts):
            (worker, handle), shared = await self._flights.get(flight, lambda: self._provide(request))
            if worker not in request.lost:
                return worker, handle.as_reused() if shared else handle
        raise Unavailable(f"media {request.key!r} went to workers that are lost")

    async def replicate(self, key: str, handle: MediaHandle, target: WorkerReport, deadline: Deadline) -> None:
        """Send a resident prefix to one more decode worker, once. Raises as `provide`."""
        found = await self._clients.directory.find(None, key, deadline)
        sender = choose_source(found.copies, found.holders, self._clients.placement(), target.worker)
        if sender is None:
            raise NotFound(f"no worker has a copy of media {key!r} to send")
        attempt = _Attempt(target, sender, making=False)
        try:
            await self._transfer(attempt, PrefixRequest(key, deadline), handle)
        except SparseVilaError as error:
            self._exclude(attempt, error, _Search(set()), key)
            raise

    # ---- the search --------------------------------------------------------------------------------------------------------

    async def _provide(self, request: PrefixRequest) -> tuple[str, MediaHandle]:
        search = _Search(targets=set(request.lost))
        clients, key, deadline = self._clients, request.key, request.deadline
        while True:
            found = await clients.directory.find(None, key, deadline)
            holders = [one for one in found.holders if one.worker not in request.lacking]
            holder = choose_holder(holders, clients.placement(search.targets, key))
            if holder is not None and found.handle is not None:
                return holder, found.handle.as_reused()
            if search.num_attempts >= clients.config.router.max_attempts:
                assert search.error is not None
                raise search.error
            search.copies.update({one.worker: one for one in found.copies})
            decodes = await clients.workers("decode", deadline)
            num_bytes = found.handle.kv_bytes if found.handle is not None else None
            target = choose_decode(decodes, num_bytes, clients.placement(search.targets, key))
            if target is None:
                await self._wait_for_worker("decode", search, request)
                continue
            sender = choose_source(search.copies.values(), holders, clients.placement(search.senders, key), target)
            # Until the copy of an attempt that failed is reported, only its maker can describe it: it is asked to make the prefix
            # again, and sends what it has.
            making = sender is None or found.handle is None
            if making and request.source is None:
                raise _lost_for_good(request, search)
            if sender is None:
                prefills = await clients.workers("prefill", deadline)
                maker = choose_prefill(prefills, clients.placement(search.senders, key))
                if maker is None:
                    await self._wait_for_worker("prefill", search, request)
                    continue
                sender = _report_of(maker, prefills)
            attempt = _Attempt(_report_of(target, decodes), sender, making, copied=sender.worker in search.copies)
            try:
                if not making:
                    handle = (await self._transfer(attempt, request, found.handle)).as_reused()
                    return target, replace(handle, reused=not search.encoded)
                async with self._claims.of(key, deadline) as is_ours:
                    if is_ours:
                        handle = await self._transfer(attempt, request, None)
                        return target, replace(handle, reused=handle.reused and not search.encoded)
            except SparseVilaError as error:
                if (
                    not isinstance(error, (*RETRIED, NotFound))
                    or isinstance(error, NotFound)
                    and making
                    or attempt.phase == "claim"
                ):
                    raise
                deadline.check("preparing media")
                search.num_attempts += 1
                search.error = error
                self._exclude(attempt, error, search, key)
                if isinstance(error, WorkerLost) and attempt.phase in ("make", "ship"):
                    arrived = await self._arrived(attempt, request)
                    if arrived is not None:
                        return attempt.target.worker, replace(arrived, reused=not (search.encoded or attempt.making))

    async def _arrived(self, attempt: _Attempt, request: PrefixRequest) -> MediaHandle | None:
        """The handle of a prefix whose sender was lost when all of it had been sent already."""
        try:
            handle = await self._clients.decode(attempt.target.worker, request.deadline).media(request.key)
        except Unavailable:
            return None
        if handle is not None:
            # It was made, so its maker did not die of it.
            self._clients.suspects.clear(request.key)
            within_s = request.deadline.remaining_s("preparing media")
            await self._clients.directory.note_held(handle, (attempt.target,), request.digest, within_s)
        return handle

    async def _wait_for_worker(self, pool: PoolName, search: _Search, request: PrefixRequest) -> None:
        """No worker is left to ask. The replacement of one that was lost is waited for a little; raises else."""
        if search.waiting_since_s is None:
            search.waiting_since_s = time.monotonic()
        waited_s = time.monotonic() - search.waiting_since_s
        if not (isinstance(search.error, GONE) or search.error is None and request.lost):
            raise search.error or Unavailable(f"no {pool} worker can take media: there is none, or it is too large for all")
        if waited_s > self._clients.config.router.call_timeout_s:
            raise Unavailable(f"no {pool} worker is left, and none came within {waited_s:.1f} s") from search.error
        await asyncio.sleep(min(PAUSE_S, request.deadline.remaining_s("waiting for a worker")))

    def _exclude(self, attempt: _Attempt, error: SparseVilaError, search: _Search, key: str) -> None:
        """Keep the worker that failed out of the next attempt."""
        target, sender = attempt.target.worker, attempt.sender.worker
        extra = {"transfer_id": attempt.transfer_id}
        log.warning("%s of media %s from %s to %s failed: %s", attempt.phase, key[:12], sender, target, error, extra=extra)
        if attempt.phase == "reserve":
            search.targets.add(target)
            return
        search.encoded |= attempt.copied
        if attempt.copied and not isinstance(error, WorkerLost):
            search.copies[sender] = attempt.sender
        if isinstance(error, NotFound):  # the copy is gone
            search.senders.add(sender)
            search.copies.pop(sender, None)
        elif isinstance(error, LaneLost):
            search.targets.add(target)
            self._clients.failed(target, error)
        elif isinstance(error, Unavailable) or attempt.making and not attempt.copied:
            search.senders.add(sender)
            search.copies.pop(sender, None)
        else:
            search.targets.add(target)

    # ---- one attempt -------------------------------------------------------------------------------------------------------

    async def _transfer(self, attempt: _Attempt, request: PrefixRequest, handle: MediaHandle | None) -> MediaHandle:
        """Reserve at the target, then have the prefix shipped or made. Whatever ends it early frees the reservation."""
        clients, deadline = self._clients, request.deadline
        target, sender, transfer_id = attempt.target.worker, attempt.sender.worker, attempt.transfer_id
        arrived = False
        with clients.busy(target), clients.busy(sender):
            try:
                # The lease covers the whole work: encoding may take long before the first byte comes.
                attempt.phase = "reserve"
                left_s = deadline.remaining_s("preparing media")
                num_bytes = None if handle is None else handle.kv_bytes
                address = await clients.decode(target, deadline).reserve(transfer_id, request.key, num_bytes, left_s)
                attempt.phase = "make" if attempt.making else "ship"
                if attempt.making and request.again:
                    await self._check_source(sender, request)
                ticket = TransferTicket(transfer_id, address, deadline.remaining_s("preparing media"))
                if attempt.making:
                    handle = await self._make(attempt, request, ticket)
                else:
                    assert handle is not None
                    await clients.at(attempt.sender, deadline).ship(request.key, ticket)
                arrived = True
            finally:
                if not arrived:
                    soon = Deadline(clients.config.router.call_timeout_s)
                    release = clients.decode(target, soon, trips_breaker=False).release(transfer_id)
                    clients.in_background(release, f"releasing a transfer at worker {target}", transfer_id=transfer_id)
        within_s = deadline.remaining_s("preparing media")
        await clients.directory.note_held(handle, (attempt.target, attempt.sender), request.digest, within_s)
        log.info("media %s is resident at %s", request.key[:12], target, extra={"transfer_id": transfer_id, "at": target})
        return handle

    async def _make(self, attempt: _Attempt, request: PrefixRequest, ticket: TransferTicket) -> MediaHandle:
        sender = attempt.sender.worker
        assert request.source is not None
        # Either name of it is asked about before it is made.
        names = (request.key,) if request.digest is None else (request.key, request.digest)
        visit = await self._visits.enter("prefill", sender, names, 0, request.deadline)
        async with visit:
            left_s = min(ticket.deadline_s, request.deadline.remaining_s("preparing media"))
            making = self._clients.prefill(sender, request.deadline).make(
                replace(request.source, deadline_s=left_s), request.key, ticket
            )
            async with aclosing(making) as items:
                async for item in items:
                    if len(item) == 3:
                        await visit.finish()
                        return item[1]
                    _, stage, done, total = item
                    # A maker publishes its copy with the last row; what fails after that is the lane.
                    attempt.copied |= stage == "prefill" and done >= total
                    if attempt.copied:
                        await visit.finish()
                    if request.progress is not None:
                        request.progress(stage, done, total)
        raise WorkerLost(f"worker {sender} stopped making media without a result")

    async def _check_source(self, maker: str, request: PrefixRequest) -> None:
        """Raises NotFound: the source of media that is to be made again is not what it was."""
        assert request.source is not None
        # Reading the source is not making it: each may be what workers die of.
        names = (f"{request.key}:source", request.key)
        visit = await self._visits.enter("prefill", maker, names, 0, request.deadline)
        async with visit:
            key = await self._clients.key_of(maker, request.source, request.deadline)
            await visit.finish()
        if key != request.key:
            raise NotFound(f"media {request.key!r} is lost, and its source has changed since")


def _report_of(worker: str, reports: Collection[WorkerReport]) -> WorkerReport:
    return next(one for one in reports if one.worker == worker)


def _lost_for_good(request: PrefixRequest, search: _Search) -> SparseVilaError:
    if search.error is not None and not isinstance(search.error, NotFound):
        return search.error
    if request.lost or search.error is not None:
        return Unavailable(f"media {request.key!r} is lost with its worker, and no copy is left; prepare it again")
    return NotFound(f"media {request.key!r} is not resident; prepare it first")
