"""A router's way to the directory: calls with deadlines, and what to go by while the directory is away.

Knows: that the directory comes back, empty at first, and is filled by reports. Does not know: what is decided from its answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

from sparsevila_cluster.cluster.messages import ClusterSnapshot, ConversationJournal, MediaLocation, PrefixLocation, WorkerReport
from sparsevila_cluster.cluster.worker_pool import WorkerPool
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import DeadlineExceeded, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.core.requests import MediaHandle, TurnRecord

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.5
MAX_REMEMBERED = 1_024
# Who remembers where media are asks only whether that is still so.
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

    # ---- what is asked -----------------------------------------------------------------------------------------------------

    async def find(self, digest: str | None, key: str | None, deadline: Deadline) -> PrefixLocation:
        """`Directory.find`. By a key, a new directory is waited for until somebody holds it or every worker could report.

        Raises Unavailable, DeadlineExceeded, Cancelled.
        """
        if key is None and digest is not None:
            key = self._keys.use(digest)  # a new directory knows no digests: workers report keys
        pause_s = FIRST_PAUSE_S
        while True:
            found: PrefixLocation = await self._ask("find", digest, key, deadline=deadline)
            if found.key is None or found.holders or found.settled:
                self._remember(digest, found)
                return found
            pause_s = await _pause(pause_s, deadline)

    async def where(self, key: str, deadline: Deadline) -> PrefixLocation:
        """As `find` by key, or what was found before when the directory is away. Raises as `find`."""
        remembered = self._found.use(key)
        if remembered is not None and remembered.holders:
            try:
                found: PrefixLocation = await self._once("find", None, key, deadline=deadline, most_s=REMEMBERED_WITHIN_S)
            except (WorkerLost, DeadlineExceeded):
                deadline.check("looking for media")
                return remembered
            if found.holders:
                self._remember(None, found)
                return found
        return await self.find(None, key, deadline)

    async def snapshot(self, deadline: Deadline) -> ClusterSnapshot:
        """`Directory.snapshot`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        told: ClusterSnapshot = await self._ask("snapshot", deadline=deadline)
        return told

    async def census(self, deadline: Deadline) -> tuple[MediaLocation, ...]:
        """`Directory.census`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        told: tuple[MediaLocation, ...] = await self._ask("census", deadline=deadline)
        return told

    async def journal(self, conversation_id: str, deadline: Deadline) -> ConversationJournal | None:
        """`Directory.history`, None only when every worker had time to report. Raises Unavailable, DeadlineExceeded, Cancelled."""
        pause_s = FIRST_PAUSE_S
        while True:
            told: ConversationJournal | None = await self._ask("history", conversation_id, deadline=deadline)
            if told is not None or await self._ask("is_settled", deadline=deadline):
                return told
            pause_s = await _pause(pause_s, deadline)

    async def claim(self, key: str, owner: str, lease_s: float, deadline: Deadline) -> bool:
        """`Directory.claim`. Raises Unavailable, DeadlineExceeded, Cancelled."""
        return bool(await self._ask("claim", key, owner, lease_s, deadline=deadline))

    # ---- what is told ------------------------------------------------------------------------------------------------------

    async def tell(self, method: str, *args: Any, within_s: float | None = None) -> Any:
        """One call of any other method, once. Raises WorkerLost, DeadlineExceeded."""
        return await self._pool.call(None, method, *args, within_s=min(self._call_timeout_s, within_s or self._call_timeout_s))

    async def note_held(self, handle: MediaHandle, workers: tuple[WorkerReport, ...], digest: str | None, within_s: float) -> None:
        """A prefix has arrived at these workers. Failing to say so is not fatal: they report it themselves."""
        known = self._found.use(handle.media_id) or PrefixLocation(handle.media_id, handle)
        for one in workers:
            if one.pool == "decode":
                known = replace(known, holders=(*(h for h in known.holders if h.worker != one.worker), one))
        self._remember(digest, known)
        try:
            await self.tell("note_held", handle, tuple(one.worker for one in workers), digest, within_s=within_s)
        except SparseVilaError as error:
            log.warning("the registry does not know yet of a prefix that arrived: %s", error)

    @property
    def away(self) -> bool:
        """Whether it did not take a record just now: who is in a hurry need not try."""
        return time.perf_counter() < self._away_until_s

    async def record(self, conversation_id: str, media_id: str, number: int, record: TurnRecord, within_s: float) -> bool:
        """`Directory.record`. Raises WorkerLost, DeadlineExceeded."""
        away_until_s = time.perf_counter() + AWAY_S
        try:
            told = bool(await self.tell("record", conversation_id, media_id, number, record, within_s=within_s))
            away_until_s = 0.0
        finally:
            self._away_until_s = away_until_s
        return told

    def forget_media(self, key: str) -> None:
        """What this router itself remembers of a media."""
        self._found.pop(key, None)
        for digest in [digest for digest, named in self._keys.items() if named == key]:
            del self._keys[digest]

    # ---- calls -------------------------------------------------------------------------------------------------------------

    def _remember(self, digest: str | None, found: PrefixLocation) -> None:
        if found.key is not None and digest is not None:
            self._keys.put(digest, found.key)
        if found.key is not None and found.handle is not None:
            self._found.put(found.key, found)

    async def _once(self, method: str, *args: Any, deadline: Deadline, most_s: float | None = None) -> Any:
        within_s = min(self._call_timeout_s, most_s or self._call_timeout_s, deadline.remaining_s("asking the registry"))
        return await self._pool.call(None, method, *args, within_s=within_s)

    async def _ask(self, method: str, *args: Any, deadline: Deadline) -> Any:
        """The answer, asked for again while the directory restarts, for `call_timeout_s` at most."""
        give_up_s, pause_s = time.perf_counter() + self._call_timeout_s, FIRST_PAUSE_S
        while True:
            try:
                return await self._once(method, *args, deadline=deadline)
            except (WorkerLost, DeadlineExceeded) as error:
                if time.perf_counter() + pause_s >= give_up_s:
                    deadline.check("asking the registry")
                    raise Unavailable(f"the registry does not answer: {error}") from error
            pause_s = await _pause(pause_s, deadline)


async def _pause(pause_s: float, deadline: Deadline) -> float:
    await asyncio.sleep(min(pause_s, deadline.remaining_s("asking the registry")))
    return min(2 * pause_s, LONGEST_PAUSE_S)
