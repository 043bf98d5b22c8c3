"""Making a media prefix resident on some decode worker: found, shipped from a copy, or made.

Knows: the order (reserve, then send or make), who is to blame when it fails, and when to give up. Does not know: who asks for the
prefix, lanes, or what a prefix is.

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
from typing import TYPE_CHECKING

from sparsevila_cluster.cluster.messages import WorkerReport
from sparsevila_cluster.cluster.routing.placement import choose_decode, choose_holder, choose_prefill, choose_source
from sparsevila_cluster.cluster.routing.prefill_claims import PrefillClaims
from sparsevila_cluster.cluster.routing.worker_clients import PAUSE_S, Kind, WorkerClients
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

# What another worker may do better. Everything else is the caller's to know.
RETRIED = (Unavailable, QueueFull, DataLoss, Incompatible, DeadlineExceeded)
# What says that a worker is gone or falling: a replacement may be under way.
GONE = (WorkerLost, LaneLost)


@dataclass
class PrefixWanted:
    """A media prefix that somebody wants.

    request: how to make it, None if that is not known here any more; again: it was made before, so the source may have changed.
    lost: workers that are out of the question. lacking: decode workers that do not hold it, whatever others say.
    """

    key: str
    deadline: Deadline
    request: PrepareRequest | None = None
    progress: Progress | None = None
    digest: str | None = None
    again: bool = False
    lost: frozenset[str] = frozenset()
    lacking: frozenset[str] = frozenset()


@dataclass
class _Search:
    """What one search for a way has learnt.

    to, by: decode workers, and senders or makers, that are out of the question. copies: who has one, though not reported yet.
    encoded: this search had the media made, even if another attempt delivers it.
    """

    to: set[str]
    by: set[str] = field(default_factory=set)
    copies: dict[str, WorkerReport] = field(default_factory=dict)
    encoded: bool = False
    num_attempts: int = 0
    error: SparseVilaError | None = None
    waiting_since_s: float | None = None


@dataclass
class _Attempt:
    """One transfer. leg: what was under way when it failed; copied: the maker has a whole copy, whatever became of the lane."""

    target: WorkerReport
    source: WorkerReport
    making: bool
    transfer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    leg: str = "claim"
    copied: bool = False


class PrefixProvisioner:
    """`name`: the router's, for claims."""

    def __init__(self, fleet: WorkerClients, name: str):
        self._fleet = fleet
        self._claims = PrefillClaims(fleet, name)
        self._sharing = SingleFlight[tuple[str, MediaHandle]]()

    async def bring(self, wanted: PrefixWanted) -> tuple[str, MediaHandle]:
        """(A decode worker outside `wanted.lost` where the prefix is now resident, its handle). Callers at the same time share.

        Raises:
            NotFound: it is nowhere, and there is no request to make it from. Unavailable, QueueFull, LaneLost, DataLoss,
            Incompatible: nobody could, in `max_attempts`. DeadlineExceeded, Cancelled. BadMedia, BadRequest, TooLarge.
        """
        # Who can not have it made must not decide for those who can.
        together = f"{wanted.key}/{wanted.request is not None}"
        for _ in range(self._fleet.config.router.max_attempts):
            (worker, handle), shared = await self._sharing.get(together, lambda: self._bring(wanted))
            if worker not in wanted.lost:
                return worker, handle.as_reused() if shared else handle
        raise Unavailable(f"media {wanted.key!r} went to workers that are lost")

    async def replicate(self, key: str, handle: MediaHandle, target: WorkerReport, deadline: Deadline) -> None:
        """Send a resident prefix to one more decode worker, once. Raises as `bring`."""
        found = await self._fleet.registry.find(None, key, deadline)
        source = choose_source(found.copies, found.holders, self._fleet.scene(), target.worker)
        if source is None:
            raise NotFound(f"nobody has a copy of media {key!r} to send")
        wanted = PrefixWanted(key, deadline)
        attempt = _Attempt(target, source, making=False)
        try:
            await self._try(attempt, wanted, handle)
        except SparseVilaError as error:
            self._blame(attempt, error, _Search(set()), key)
            raise

    # ---- the search --------------------------------------------------------------------------------------------------------

    async def _bring(self, wanted: PrefixWanted) -> tuple[str, MediaHandle]:
        search = _Search(to=set(wanted.lost))
        while True:
            fleet, deadline = self._fleet, wanted.deadline
            found = await fleet.registry.find(None, wanted.key, deadline)
            holders = [one for one in found.holders if one.worker not in wanted.lacking]
            holder = choose_holder(holders, fleet.scene(search.to, wanted.key))
            if holder is not None and found.handle is not None:
                return holder, found.handle.as_reused()
            if search.num_attempts >= fleet.config.router.max_attempts:
                assert search.error is not None
                raise search.error
            search.copies.update({one.worker: one for one in found.copies})
            decodes = await fleet.workers("decode", deadline)
            num_bytes = found.handle.kv_bytes if found.handle is not None else None
            target = choose_decode(decodes, num_bytes, fleet.scene(search.to, wanted.key))
            if target is None:
                await self._nobody("decode", search, wanted)
                continue
            source = choose_source(search.copies.values(), holders, fleet.scene(search.by, wanted.key), target)
            # Until the copy of an attempt that failed is reported, nobody but its maker knows what it is: it is asked to make it
            # again, and sends what it has.
            making = source is None or found.handle is None
            if making and wanted.request is None:
                raise _lost_for_good(wanted, search)
            if source is None:
                prefills = await fleet.workers("prefill", deadline)
                maker = choose_prefill(prefills, fleet.scene(search.by, wanted.key))
                if maker is None:
                    await self._nobody("prefill", search, wanted)
                    continue
                source = _named(prefills, maker)
            attempt = _Attempt(_named(decodes, target), source, making, copied=source.worker in search.copies)
            try:
                if not making:
                    handle = (await self._try(attempt, wanted, found.handle)).as_reused()
                    return target, replace(handle, reused=not search.encoded)
                async with self._claims.of(wanted.key, deadline) as ours:
                    if ours:
                        handle = await self._try(attempt, wanted, None)
                        return target, replace(handle, reused=handle.reused and not search.encoded)
            except SparseVilaError as error:
                if not isinstance(error, (*RETRIED, NotFound)) or isinstance(error, NotFound) and making or attempt.leg == "claim":
                    raise
                deadline.check("preparing media")
                search.num_attempts += 1
                search.error = error
                self._blame(attempt, error, search, wanted.key)
                if isinstance(error, WorkerLost) and attempt.leg in ("make", "ship"):
                    arrived = await self._arrived(attempt, wanted)
                    if arrived is not None:
                        return attempt.target.worker, replace(arrived, reused=not (search.encoded or attempt.making))

    async def _arrived(self, attempt: _Attempt, wanted: PrefixWanted) -> MediaHandle | None:
        """The handle of a prefix whose sender was lost when all of it was over there already."""
        try:
            handle = await self._fleet.call("decode", attempt.target.worker, "media", wanted.key, deadline=wanted.deadline)
        except Unavailable:
            return None
        if handle is not None:
            within_s = wanted.deadline.remaining_s("preparing media")
            await self._fleet.registry.note_held(handle, (attempt.target,), wanted.digest, within_s)
        return handle

    async def _nobody(self, kind: Kind, search: _Search, wanted: PrefixWanted) -> None:
        """No worker is left to ask. One that was lost is replaced, for which is waited a little; else that is the answer."""
        fleet = self._fleet
        if search.waiting_since_s is None:
            search.waiting_since_s = time.monotonic()
        waited_s = time.monotonic() - search.waiting_since_s
        if not (isinstance(search.error, GONE) or search.error is None and wanted.lost):
            raise search.error or Unavailable(f"no {kind} worker can take media: none is there, or it is too large for all")
        if waited_s > fleet.config.router.call_timeout_s:
            raise Unavailable(f"no {kind} worker is left, and none came within {waited_s:.1f} s") from search.error
        await asyncio.sleep(min(PAUSE_S, wanted.deadline.remaining_s("waiting for a worker")))

    def _blame(self, attempt: _Attempt, error: SparseVilaError, search: _Search, key: str) -> None:
        """Keep those who failed out of the next attempt."""
        fleet, target, source = self._fleet, attempt.target.worker, attempt.source.worker
        extra = {"transfer_id": attempt.transfer_id}
        log.warning("%s of %s from %s to %s failed: %s", attempt.leg, key[:12], source, target, error, extra=extra)
        if attempt.leg == "reserve":
            search.to.add(target)
            return
        search.encoded |= attempt.copied
        if attempt.copied and not isinstance(error, WorkerLost):
            search.copies[source] = attempt.source
        if isinstance(error, NotFound):  # the copy is gone
            search.by.add(source)
            search.copies.pop(source, None)
        elif isinstance(error, LaneLost):
            search.to.add(target)
            fleet.failed(target, error)
        elif isinstance(error, Unavailable) or attempt.making and not attempt.copied:
            search.by.add(source)
            search.copies.pop(source, None)
        else:
            search.to.add(target)

    # ---- one attempt -------------------------------------------------------------------------------------------------------

    async def _try(self, attempt: _Attempt, wanted: PrefixWanted, handle: MediaHandle | None) -> MediaHandle:
        """Reserve at the target, then have the source ship the prefix, or make it. Whatever ends it early frees the reservation."""
        fleet, deadline = self._fleet, wanted.deadline
        target, source, transfer_id = attempt.target.worker, attempt.source.worker, attempt.transfer_id
        arrived = False
        with fleet.busy(target), fleet.busy(source):
            try:
                # The lease covers the whole work: encoding may take long before the first byte comes.
                attempt.leg = "reserve"
                left_s = deadline.remaining_s("preparing media")
                num_bytes = None if handle is None else handle.kv_bytes
                dock = await fleet.call("decode", target, "reserve", transfer_id, wanted.key, num_bytes, left_s, deadline=deadline)
                attempt.leg = "make" if attempt.making else "ship"
                if attempt.making and wanted.again:
                    await self._check_source(source, wanted)
                ticket = TransferTicket(transfer_id, dock, deadline.remaining_s("preparing media"))
                if attempt.making:
                    handle = await self._make(attempt, wanted, ticket)
                else:
                    assert handle is not None
                    await fleet.work(attempt.source.pool, source, "ship", wanted.key, ticket, deadline=deadline)
                arrived = True
            finally:
                if not arrived:
                    fleet.tell_later("decode", target, "release", transfer_id, transfer_id=transfer_id)
        having = (attempt.target, attempt.source)
        within_s = deadline.remaining_s("preparing media")
        await fleet.registry.note_held(handle, having, wanted.digest, within_s)
        log.info("media %s is resident at %s", wanted.key[:12], target, extra={"transfer_id": transfer_id, "at": target})
        return handle

    async def _make(self, attempt: _Attempt, wanted: PrefixWanted, ticket: TransferTicket) -> MediaHandle:
        source = attempt.source.worker
        assert wanted.request is not None
        request = replace(wanted.request, deadline_s=ticket.deadline_s)
        items = self._fleet.stream("prefill", source, "make", request, wanted.key, ticket, deadline=wanted.deadline)
        async with aclosing(items):
            async for item in items:
                if item[0] == "made":
                    return item[1]
                _, stage, done, total = item
                # A maker publishes its copy with the last row; what fails after that is the lane.
                attempt.copied |= stage == "prefill" and done >= total
                if wanted.progress is not None:
                    wanted.progress(stage, done, total)
        raise WorkerLost(f"worker {source} stopped making media without a word")

    async def _check_source(self, maker: str, wanted: PrefixWanted) -> None:
        """Raises NotFound: the source of media that is to be made again is not what it was."""
        assert wanted.request is not None
        key = await self._fleet.key_of(maker, wanted.request, wanted.deadline)
        if key != wanted.key:
            raise NotFound(f"media {wanted.key!r} is lost, and its source has changed since")


def _named(workers: Collection[WorkerReport], worker: str) -> WorkerReport:
    return next(one for one in workers if one.worker == worker)


def _lost_for_good(wanted: PrefixWanted, search: _Search) -> SparseVilaError:
    if search.error is not None and not isinstance(search.error, NotFound):
        return search.error
    if wanted.lost or search.error is not None:
        return Unavailable(f"media {wanted.key!r} is lost with its worker, and no copy is left; prepare it again")
    return NotFound(f"media {wanted.key!r} is not resident; prepare it first")
