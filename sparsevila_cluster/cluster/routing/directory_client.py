"""A router's client of the directory: calls with deadlines, and what to go by while the directory is away.

A directory that was lost comes back empty and is filled by reports.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from sparsevila_cluster.cluster.messages import (
    ClusterSnapshot,
    ConversationJournal,
    MediaLocation,
    PrefixLocation,
    TenantCounts,
    WorkerReport,
)
from sparsevila_cluster.cluster.worker_api import DirectoryApi
from sparsevila_cluster.cluster.worker_pool import WorkerPool, pool_stub, stub
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import DeadlineExceeded, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.core.requests import MediaHandle, TurnRecord

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5
MAX_REMEMBERED = 1_024
# A router that remembers where a media prefix is asks only whether that is still so.
REMEMBERED_WITHIN_S = 1.0
AWAY_S = 2.0


class DirectoryClient:
    """`call_timeout_s`: deadline of one call, and for how long an absent directory is asked again."""

    def __init__(self, pool: WorkerPool, call_timeout_s: float):
        self._pool = pool
        self._call_timeout_s = call_timeout_s
        self._found: LRUDict[PrefixLocation] = LRUDict(MAX_REMEMBERED)
        self._keys: LRUDict[str] = LRUDict(MAX_REMEMBERED)
        self._away_until_s = 0.0

    def once(self, within_s: float | None = None) -> DirectoryApi:
        """The directory, asked once, within `call_timeout_s` at most. Calls raise WorkerLost, DeadlineExceeded."""
        most_s = self._call_timeout_s
        return pool_stub(DirectoryApi, self._pool, None, most_s if within_s is None else min(most_s, within_s))

    def _patient(self, deadline: Deadline) -> DirectoryApi:
        """The directory, asked again while it restarts. Calls raise Unavailable, DeadlineExceeded, Cancelled."""
        return stub(DirectoryApi, partial(self._call, deadline))

    # ---- questions ---------------------------------------------------------------------------------------------------------

    async def find(self, digest: str | None, key: str | None, deadline: Deadline) -> PrefixLocation:
        """`Directory.find`. By a key, a new directory is waited for until somebody holds it or every worker could report.

        Raises Unavailable, DeadlineExceeded, Cancelled.
        """
        if key is None and digest is not None:
            key = self._keys.use(digest)  # a new directory knows no digests: workers report keys
        pause_s = FIRST_PAUSE_S
        while True:
            found = await self._patient(deadline).find(digest, key)
            if found.key is None or found.holders or found.settled:
                self._remember(digest, found)
                return found
            pause_s = await _pause(pause_s, deadline)

    async def locate(self, key: str, deadline: Deadline) -> PrefixLocation:
        """As `find` by key, or what was found before when the directory is away. Raises as `find`."""
        remembered = self._found.use(key)
        if remembered is not None and remembered.holders:
            try:
                within_s = min(REMEMBERED_WITHIN_S, deadline.remaining_s("looking for media"))
                found = await self.once(within_s).find(None, key)
            except (WorkerLost, DeadlineExceeded):
                deadline.check("looking for media")
                return remembered
            if found.holders:
                self._remember(None, found)
                return found
        return await self.find(None, key, deadline)

    async def snapshot(self, deadline: Deadline) -> ClusterSnapshot:
        """`Directory.snapshot`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        return await self._patient(deadline).snapshot()

    async def list_media(self, deadline: Deadline) -> tuple[MediaLocation, ...]:
        """`Directory.list_media`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        return await self._patient(deadline).list_media()

    async def tenant_counts(self, tenant: str, deadline: Deadline) -> TenantCounts:
        """`Directory.tenant_counts`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        return await self._patient(deadline).tenant_counts(tenant)

    async def journal(self, conversation_id: str, deadline: Deadline) -> ConversationJournal | None:
        """`Directory.history`, None only when every worker had time to report. Raises Unavailable, DeadlineExceeded, Cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            journal = await self._patient(deadline).history(conversation_id)
            if journal is not None or await self._patient(deadline).is_settled():
                return journal
            pause_s = await _pause(pause_s, deadline)

    async def claim(self, key: str, owner: str, lease_s: float, deadline: Deadline) -> bool:
        """`Directory.claim`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        return await self._patient(deadline).claim(key, owner, lease_s)

    # ---- notes -------------------------------------------------------------------------------------------------------------

    async def note_held(self, handle: MediaHandle, workers: tuple[WorkerReport, ...], digest: str | None, within_s: float) -> None:
        """A prefix has arrived at these workers. Failing to say so is not fatal: they report it themselves."""
        known = self._found.use(handle.media_id) or PrefixLocation(handle.media_id, handle)
        for one in workers:
            if one.pool == "decode":
                known = replace(known, holders=(*(h for h in known.holders if h.worker != one.worker), one))
        self._remember(digest, known)
        try:
            await self.once(within_s).note_held(handle, tuple(one.worker for one in workers), digest)
        except SparseVilaError as error:
            log.warning("the directory was not told where media %s is: %s", handle.media_id[:12], error)

    @property
    def away(self) -> bool:
        """Whether it did not take a record just now, so that a caller in a hurry need not try."""
        return time.perf_counter() < self._away_until_s

    async def record(self, conversation_id: str, media_id: str, number: int, record: TurnRecord, within_s: float) -> bool:
        """`Directory.record`. Raises WorkerLost, DeadlineExceeded."""
        away_until_s = time.perf_counter() + AWAY_S
        try:
            is_recorded = await self.once(within_s).record(conversation_id, media_id, number, record)
            away_until_s = 0.0
        finally:
            self._away_until_s = away_until_s
        return is_recorded

    def forget_media(self, key: str) -> None:
        """Drop what this router itself remembers of a media prefix."""
        self._found.pop(key, None)
        for digest in [digest for digest, known in self._keys.items() if known == key]:
            del self._keys[digest]

    def _remember(self, digest: str | None, found: PrefixLocation) -> None:
        if found.key is not None and digest is not None:
            self._keys.put(digest, found.key)
        if found.key is not None and found.handle is not None:
            self._found.put(found.key, found)

    async def _call(self, deadline: Deadline, method: str, *args: Any) -> Any:
        """The answer, asked for again while the directory restarts, for `call_timeout_s` at most."""
        give_up_s, pause_s = time.perf_counter() + self._call_timeout_s, FIRST_PAUSE_S
        while True:
            try:
                within_s = min(self._call_timeout_s, deadline.remaining_s("asking the directory"))
                return await self._pool.call(None, method, *args, within_s=within_s)
            except (WorkerLost, DeadlineExceeded) as error:
                if time.perf_counter() + pause_s >= give_up_s:
                    deadline.check("asking the directory")
                    raise Unavailable(f"the directory does not answer: {error}") from error
            pause_s = await _pause(pause_s, deadline)


async def _pause(pause_s: float, deadline: Deadline) -> float:
    await asyncio.sleep(min(pause_s, deadline.remaining_s("asking the directory")))
    return min(2 * pause_s, LONGEST_PAUSE_S)
