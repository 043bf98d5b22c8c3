"""The directory: who is there, who holds which media prefix, and the text of conversations. Its deployment is named Registry.

Nothing in it is the truth: workers hold prefixes and conversations, and their reports fill a directory that was lost. Everything is
bounded: the least recently used goes first. Plain and synchronous; one thread at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparsevila_cluster.cluster.messages import (
    ClusterSnapshot,
    ConversationJournal,
    MediaLocation,
    PrefixLocation,
    ReportAnswer,
    TenantCounts,
    WorkerReport,
    turn_identities,
)
from sparsevila_cluster.core.lru_dict import LRUDict, SharedLRUDict
from sparsevila_cluster.core.requests import MediaHandle, TurnRecord
from sparsevila_cluster.core.tenancy import may_use

# Reports that a worker may miss before it counts as gone, and periods after which every worker has reported to a new directory.
MISSED_REPORTS = 5
SETTLE_REPORTS = 3
# Periods for which a router's note that a worker holds a prefix stands against that worker's own report, which may be older.
NOTE_REPORTS = 2
MAX_DIGESTS = 65_536
MAX_CLAIMS = 4_096
MAX_DELETED = 4_096
MAX_REFUSED = 256
# Turns kept of one conversation. A longer one can not be made again elsewhere.
MAX_TURNS = 1_024
# Routers of which it is known who has calls there, and for how long that is true after they said so.
MAX_ROUTERS = 1_024
OWNERS_S = 3.0
# Workers for which it is kept what they are to close, and deployments for which it is kept why they do not start.
MAX_STALE_WORKERS = 1_024
MAX_DEPLOYMENTS = 16
# Conversations of which it is remembered that they were closed: what is told of them later, by whoever did not know, is not kept.
MAX_CLOSED = 65_536


@dataclass
class _WorkerEntry:
    """One worker as last heard of. complete: it has reported everything. noted: prefixes that a router saw arrive, and when."""

    report: WorkerReport
    seen_s: float
    complete: bool = False
    residents: dict[str, MediaHandle] = field(default_factory=dict)
    noted: dict[str, tuple[MediaHandle, float]] = field(default_factory=dict)

    def handle(self, key: str) -> MediaHandle | None:
        noted = self.noted.get(key)
        return self.residents.get(key) or (noted[0] if noted else None)

    def keys(self) -> set[str]:
        return {*self.residents, *self.noted}


@dataclass
class _Conversation:
    journal: ConversationJournal
    used_s: float


class Directory:
    """`report_s`: seconds between two reports of a worker. `max_share`: of conversations, what one tenant may take from others.
    `conversation_idle_s`: one that nobody used for so long is closed. `clock`: seconds, monotonic.
    """

    def __init__(
        self,
        report_s: float = 1.0,
        max_conversations: int = 10_000,
        max_share: float = 1.0,
        conversation_idle_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.report_s = report_s
        self._clock = clock
        self._started_s = self._heard_s = clock()
        self._workers: dict[str, _WorkerEntry] = {}
        self._digests: LRUDict[str] = LRUDict(MAX_DIGESTS)
        self._claims: LRUDict[tuple[str, float]] = LRUDict(MAX_CLAIMS)
        self._deleted: LRUDict[None] = LRUDict(MAX_DELETED)
        self._refused: LRUDict[float] = LRUDict(MAX_REFUSED)
        self._conversations: SharedLRUDict[_Conversation] = SharedLRUDict(max_conversations, max_share)
        self._idle_s = conversation_idle_s
        self._closed: LRUDict[None] = LRUDict(MAX_CLOSED)
        self._stale: LRUDict[LRUDict[None]] = LRUDict(MAX_STALE_WORKERS)
        self._start_failures: LRUDict[dict[str, Any]] = LRUDict(MAX_DEPLOYMENTS)
        self._owners_at: LRUDict[tuple[frozenset[str], float]] = LRUDict(MAX_ROUTERS)

    # ---- workers -----------------------------------------------------------------------------------------------------------

    def report(self, report: WorkerReport) -> ReportAnswer:
        """Take a worker's report, and tell it what is wanted of it."""
        now_s = self._drop_silent()
        bare = replace(report, residents=None, records=None)
        known = self._workers.setdefault(report.worker, _WorkerEntry(bare, now_s))
        known.report, known.seen_s = bare, now_s
        self._close_idle(now_s)
        known.complete |= report.residents is not None and (report.pool == "prefill" or report.records is not None)
        known.noted = {k: v for k, v in known.noted.items() if now_s - v[1] < NOTE_REPORTS * self.report_s}
        if report.residents is not None:
            known.residents = {handle.media_id: handle for handle in report.residents}
        stale = self._stale.pop(report.worker, ())
        closed = [journal.conversation_id for journal in report.records or () if journal.conversation_id in self._closed]
        for journal in report.records or ():
            if journal.conversation_id not in stale:
                self._restore(journal)
        return ReportAnswer(send_all=not known.complete, close=tuple(dict.fromkeys([*stale, *closed])))

    def forget_worker(self, worker: str) -> bool:
        """A worker that is gone; should it report again, it is asked for everything. False if it was not known."""
        return self._workers.pop(worker, None) is not None

    def snapshot(self) -> ClusterSnapshot:
        """Every worker that reports."""
        self._drop_silent()
        return ClusterSnapshot(tuple(known.report for known in self._workers.values()), len(self._conversations), self.is_settled())

    def is_settled(self) -> bool:
        """Whether every worker has had time to report since this directory started, or went on after it heard from nobody."""
        return self._clock() - self._started_s >= SETTLE_REPORTS * self.report_s

    def note_start_failure(self, deployment: str, failure: dict[str, Any]) -> None:
        """A replica could not start (`errors.to_failure`). The last failure of each deployment is kept."""
        self._start_failures.put(deployment, failure)

    def start_failures(self) -> dict[str, dict[str, Any]]:
        """By deployment, why a replica of it could not start (for `errors.from_failure`)."""
        return dict(self._start_failures)

    def exchange_owners(self, router: str, owners: frozenset[str]) -> frozenset[str]:
        """Note who has calls at a router. Who has turns at workers, or calls at other routers."""
        now_s = self._clock()
        self._owners_at.put(router, (owners, now_s + OWNERS_S))
        elsewhere = [told for name, (told, until_s) in self._owners_at.items() if name != router and until_s > now_s]
        return self._owners_of_turns().union(*elsewhere)

    def _owners_of_turns(self) -> frozenset[str]:
        return frozenset[str]().union(*(known.report.owners for known in self._workers.values()))

    def _drop_silent(self) -> float:
        now_s = self._clock()
        if now_s - self._heard_s > SETTLE_REPORTS * self.report_s:  # this process stood still, or all others did
            self._started_s = now_s
        self._heard_s = now_s
        for worker, known in list(self._workers.items()):
            if now_s - known.seen_s > MISSED_REPORTS * self.report_s:
                del self._workers[worker]
        return now_s

    # ---- media -------------------------------------------------------------------------------------------------------------

    def find(self, digest: str | None, key: str | None) -> PrefixLocation:
        """Where a media is, by its content key or by the digest of a request that asked for it before."""
        self._drop_silent()
        if key is None and digest is not None:
            key = self._digests.use(digest)
        refused = self._refused_of(digest, key)
        if key is None:
            return PrefixLocation(settled=self.is_settled(), refused=refused)
        deleted = key in self._deleted
        settled, owners = self.is_settled(), self._owners_of_turns()
        return PrefixLocation(key, self.media(key), self.holders(key), self.copies(key), settled, deleted, refused, owners)

    def holders(self, key: str) -> tuple[WorkerReport, ...]:
        """Decode workers where the prefix is resident."""
        return self._having(key, "decode")

    def copies(self, key: str) -> tuple[WorkerReport, ...]:
        """Prefill workers that keep a host copy of the prefix."""
        return self._having(key, "prefill")

    def media(self, key: str) -> MediaHandle | None:
        """The handle of a prefix that is held somewhere."""
        return next((handle for known in self._workers.values() if (handle := known.handle(key)) is not None), None)

    def list_media(self) -> tuple[MediaLocation, ...]:
        """Every media and where it is."""
        self._drop_silent()
        keys = sorted(set().union(*(known.keys() for known in self._workers.values())))
        found = ((key, self.media(key)) for key in keys)
        return tuple(
            MediaLocation(handle, _worker_names(self.holders(key)), _worker_names(self.copies(key)))
            for key, handle in found
            if handle is not None
        )

    def tenant_counts(self, tenant: str) -> TenantCounts:
        """What one tenant has in the cluster."""
        self._drop_silent()
        handles = (handle for known in self._workers.values() for key in known.keys() if (handle := known.handle(key)) is not None)
        own = {handle.media_id: handle.kv_bytes for handle in handles if may_use(handle.tenant, tenant)}
        return TenantCounts(len(own), sum(own.values()), self._conversations.num_of(tenant))

    def note_digest(self, digest: str, key: str) -> None:
        """Requests with this digest ask for this content key."""
        self._digests.put(digest, key)

    def note_held(self, handle: MediaHandle, workers: Sequence[str], digest: str | None = None) -> None:
        """A router saw a prefix arrive at these workers, which report it only later. digest: of the request that asked for it."""
        for known in [self._workers[worker] for worker in workers if worker in self._workers]:
            known.noted[handle.media_id] = (handle, self._clock())
        if workers:
            self._deleted.pop(handle.media_id, None)
        if digest is not None:
            self.note_digest(digest, handle.media_id)

    def drop_media(self, key: str) -> bool:
        """Forget who holds a prefix and which requests ask for it. False if nobody held it."""
        having = [known for known in self._workers.values() if key in known.keys()]
        for known in having:
            known.residents.pop(key, None)
            known.noted.pop(key, None)
        for digest in [digest for digest, named in self._digests.items() if named == key]:
            del self._digests[digest]
        self._deleted.put(key, None)
        return bool(having)

    def _having(self, key: str, pool: str) -> tuple[WorkerReport, ...]:
        return tuple(k.report for k in self._workers.values() if k.report.pool == pool and k.handle(key) is not None)

    # ---- requests that workers died of -------------------------------------------------------------------------------------

    def refuse(self, names: Sequence[str], for_s: float) -> None:
        """Requests of these names ("<key or digest>" of media, "<key>:<hash>" of a turn about it) are refused for a while."""
        for name in names:
            self._refused.put(name, self._clock() + for_s)

    def _refused_of(self, *subjects: str | None) -> frozenset[str]:
        now_s = self._clock()
        for name in [name for name, until_s in self._refused.items() if until_s <= now_s]:
            del self._refused[name]
        return frozenset(name for name in self._refused if name.partition(":")[0] in subjects)

    # ---- claims ------------------------------------------------------------------------------------------------------------

    def claim(self, key: str, owner: str, lease_s: float) -> bool:
        """Whether `owner` has `key` to itself: nobody else has said so within their lease. Asking again renews one's own."""
        now_s = self._clock()
        holder, until_s = self._claims.get(key, (owner, now_s))
        if holder != owner and until_s > now_s:
            return False
        self._claims.put(key, (owner, now_s + lease_s))
        return True

    def unclaim(self, key: str, owner: str) -> bool:
        """Give a claim back. False if it is not `owner`'s."""
        if self._claims.get(key, ("", 0.0))[0] != owner:
            return False
        del self._claims[key]
        return True

    # ---- conversations -----------------------------------------------------------------------------------------------------

    def open_conversation(self, conversation_id: str, media_id: str, tenant: str = "") -> None:
        """A conversation begins; known ones stay as they are, and closed ones closed."""
        if self.history(conversation_id) is None:
            self._keep(ConversationJournal(conversation_id, media_id, tenant=tenant))

    def record(self, conversation_id: str, media_id: str, number: int, record: TurnRecord) -> bool:
        """Turn `number` (0 = the first) of a conversation is over. Another one that was known in its place is replaced, with all
        that followed it; the same one, told again, changes nothing. What is told of a closed conversation is not kept.

        False, and nothing is kept, when turns before it are not known here, or it is beyond MAX_TURNS.
        """
        if conversation_id in self._closed:
            return True
        known = self.history(conversation_id) or ConversationJournal(conversation_id, media_id, tenant=record.turn.tenant)
        if not 0 <= number <= min(len(known.records), MAX_TURNS - 1):
            return False
        there = known.records[number] if number < len(known.records) else None
        if there is not None and turn_identities([there]) == turn_identities([record]):
            self._keep(replace(known, num_heard=max(known.num_heard, number + 1)))
            return True
        self._keep(replace(known, records=(*known.records[:number], record), num_heard=number + 1))
        return True

    def history(self, conversation_id: str) -> ConversationJournal | None:
        """The finished turns of a conversation, None if it is unknown."""
        known = self._conversations.use(conversation_id)
        if known is None:
            return None
        known.used_s = self._clock()
        return known.journal

    def forget_conversation(self, conversation_id: str) -> bool:
        """A conversation was closed. False if it is unknown."""
        self._closed.put(conversation_id, None)
        return self._conversations.pop(conversation_id) is not None

    def mark_stale(self, conversation_id: str, worker: str, successor: str = "") -> None:
        """A conversation is at `successor` now ("": closed); what `worker`, which could not be told, has of it is stale."""
        stale = self._stale.use(worker) or LRUDict(self._conversations.most)
        stale.put(conversation_id, None)
        self._stale.put(worker, stale)
        if successor in self._stale:
            self._stale[successor].pop(conversation_id, None)

    def _close_idle(self, now_s: float) -> None:
        """Also where they are: any of the workers may hold what no client can name any more."""
        idle = []
        for conversation_id in self._conversations:
            known = self._conversations.get(conversation_id)
            if known is None or now_s - known.used_s <= self._idle_s:
                break
            idle.append(conversation_id)
        for conversation_id in idle:
            self.forget_conversation(conversation_id)
            for worker in [worker for worker, known in self._workers.items() if known.report.pool == "decode"]:
                self.mark_stale(conversation_id, worker)

    def _keep(self, journal: ConversationJournal) -> None:
        if journal.conversation_id not in self._closed:
            self._conversations.put(journal.conversation_id, _Conversation(journal, self._clock()), journal.tenant)

    def _restore(self, journal: ConversationJournal) -> None:
        """From a worker's memory; what is longer has seen more, but takes no turn away whose end was heard."""
        entry, records = self._conversations.get(journal.conversation_id), journal.records[:MAX_TURNS]
        known = entry.journal if entry is not None else None
        # A turn is asked by somebody who heard the one before it.
        num_heard = max(0, len(records) - 1)
        if known is not None:
            heard = known.records[: known.num_heard]
            if len(known.records) >= len(records) or turn_identities(heard) != turn_identities(records[: known.num_heard]):
                return
            num_heard = max(num_heard, known.num_heard)
        self._keep(replace(journal, records=records, num_heard=num_heard))


def _worker_names(reports: tuple[WorkerReport, ...]) -> tuple[str, ...]:
    return tuple(report.worker for report in reports)
