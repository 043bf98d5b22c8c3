"""What workers report and the directory answers: plain data that crosses processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.requests import MediaHandle, TurnRecord

PoolName = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Load:
    """How busy a worker is. `num_*`: preparations of a prefill worker, turns of a decode worker.

    prefix_*: resident media prefixes (decode) or host copies of them (prefill); turn_*: running turns and conversations' text.
    """

    num_running: int = 0
    num_waiting: int = 0
    prefix_bytes: int = 0
    prefix_budget_bytes: int = 0
    turn_bytes: int = 0
    turn_budget_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """Bytes for prefixes that are not in use."""
        return max(0, self.prefix_budget_bytes - self.prefix_bytes)


@dataclass(frozen=True)
class ConversationJournal:
    """A conversation as it can be made again: its finished turns, oldest first. `tenant`: whose it is.

    num_heard: how many of them a router has heard the end of. A worker does not know that: whoever asked its last turn may have
    left, and the conversation gone on without that turn.
    """

    conversation_id: str
    media_id: str
    records: tuple[TurnRecord, ...] = ()
    tenant: str = ""
    num_heard: int = 0


def turn_identities(records: Sequence[TurnRecord]) -> list[tuple[str, tuple[int, ...]]]:
    """(id, answer's token ids) of each turn: equal for two copies of the same conversation."""
    return [(record.turn.turn_id, tuple(record.token_ids)) for record in records]


@dataclass(frozen=True)
class WorkerReport:
    """One worker, now.

    address: where it receives KV, to build lanes ahead; None for a worker that receives none. residents: every
    prefix that it holds or keeps a copy of, None = as in the report before. records: every conversation that it holds, told to a
    directory that asks for everything; None otherwise. owners: who has, or just had, turns there; of decode workers.
    """

    worker: str
    pool: PoolName
    node: str = ""
    address: ReceiverAddress | None = None
    load: Load = Load()
    residents: tuple[MediaHandle, ...] | None = None
    records: tuple[ConversationJournal, ...] | None = None
    owners: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ReportAnswer:
    """What the directory wants of a worker that reported.

    send_all: a report with residents and records, for the worker is new to it. close: conversations that the worker may still
    hold, though they were closed, or went on elsewhere, while it was out of reach.
    """

    send_all: bool
    close: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrefixLocation:
    """What the directory knows of one media. Workers come without residents and records.

    key: the content key, None while only a digest was named that nobody has noted. holders: decode workers where it is resident.
    copies: prefill workers that keep a host copy. settled: every worker has had time to report, so what is absent is unknown.
    deleted: it was, through whatever router, and nobody has prepared it since.
    refused: names of requests about it that workers died of (`DirectoryApi.refuse`). owners: who has turns anywhere.
    """

    key: str | None = None
    handle: MediaHandle | None = None
    holders: tuple[WorkerReport, ...] = ()
    copies: tuple[WorkerReport, ...] = ()
    settled: bool = True
    deleted: bool = False
    refused: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()


@dataclass(frozen=True)
class MediaLocation:
    """Which workers hold a media prefix, and which keep a host copy of it, by name."""

    handle: MediaHandle
    holders: tuple[str, ...]
    copies: tuple[str, ...]


@dataclass(frozen=True)
class TenantCounts:
    """What one tenant has in the cluster: media prefixes and their bytes, each counted once, and conversations."""

    num_media: int
    media_bytes: int
    num_conversations: int


@dataclass(frozen=True)
class ClusterSnapshot:
    """Every worker that reports, without residents and records."""

    workers: tuple[WorkerReport, ...] = ()
    num_conversations: int = 0
    settled: bool = True

    def of(self, pool: PoolName) -> tuple[WorkerReport, ...]:
        """The workers of one pool."""
        return tuple(report for report in self.workers if report.pool == pool)
