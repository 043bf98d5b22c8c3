"""What workers, the directory and routers answer to callers in other processes. Stubs and server tables derive from these classes.

An `async def` has one answer; a plain `def` that returns an AsyncGenerator is a stream. Arguments travel by position.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar

from sparsevila_cluster.cluster.messages import (
    ClusterSnapshot,
    ConversationJournal,
    MediaLocation,
    PrefixLocation,
    ReportAnswer,
    TenantCounts,
    WorkerReport,
)
from sparsevila_cluster.core.addresses import ReceiverAddress, TransferTicket
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent, TurnRecord

F = TypeVar("F", bound=Callable[..., Any])

# call: one answer within milliseconds. work: one answer that may take as long as its caller waits. stream: many answers.
MethodKind = Literal["call", "work", "stream"]
LONG_RUNNING = "is_long_running"


def long_running(method: F) -> F:
    """Mark a method as `work`: it travels as a stream of one item, whose heartbeats say that the worker lives."""
    setattr(method, LONG_RUNNING, True)
    return method


@functools.cache
def methods_of(api: Callable[..., Any]) -> dict[str, MethodKind]:
    """The public methods of one of the protocols below, and how each of them travels."""

    def kind_of(method: Callable[..., Any]) -> MethodKind:
        if not inspect.iscoroutinefunction(method):
            return "stream"
        return "work" if hasattr(method, LONG_RUNNING) else "call"

    members = inspect.getmembers(api, inspect.isfunction)
    return {name: kind_of(method) for name, method in members if not name.startswith("_")}


class WorkerApi(Protocol):
    """What prefill and decode workers have in common. Every method raises WorkerClosed once the worker is closed."""

    @long_running
    async def ship(self, key: str, ticket: TransferTicket, /) -> dict[str, Any]:
        """Send a prefix to the worker of the ticket; the TransferReport as a dict. Cancelling it aborts the transfer.

        Raises:
            NotFound: the prefix is not here, or no such ticket. LaneLost: names the worker that is gone. QueueFull, TooLarge,
            Incompatible: the other end cannot take it. DataLoss, DeadlineExceeded.
        """

    async def drop(self, key: str, /) -> bool:
        """Forget a prefix. False if it is not here, or in use."""

    async def info(self) -> dict[str, Any]:
        """Plain data, for people."""


class PrefillWorkerApi(WorkerApi, Protocol):
    """A worker that makes media prefixes, keeps a copy of each and sends them to decode workers."""

    @long_running
    async def key_of(self, request: PrepareRequest, /) -> str:
        """The content key of what `make` would make. Raises BadMedia, BadRequest, TooLarge, DeadlineExceeded."""

    def make(
        self, request: PrepareRequest, key: str, ticket: TransferTicket, /
    ) -> AsyncGenerator[tuple[str, str, int, int] | tuple[str, MediaHandle, dict[str, Any]], None]:
        """Make a prefix and send it: ("progress", stage, done, total)*, ("made", handle, TransferReport as a dict).

        Raises:
            BadMedia, BadRequest, TooLarge: media that cannot be used. QueueFull: no room. LaneLost: the worker of the ticket is
            gone; the copy stays. DataLoss, Incompatible, NotFound: as `ship`. DeadlineExceeded, Internal.
        """


class DecodeWorkerApi(WorkerApi, Protocol):
    """A worker that holds media prefixes and answers questions about them."""

    async def reserve(self, transfer_id: str, key: str, num_bytes: int | None, lease_s: float, /) -> ReceiverAddress:
        """Expect the prefix of `key` for `lease_s`; where to send it to. num_bytes: of its KV, None if that is not known yet.

        Raises:
            BadRequest: a transfer_id that was used before. TooLarge, QueueFull: no room, ever or now.
        """

    async def release(self, transfer_id: str, /) -> None:
        """Give a transfer up, in any state; a prefix that has arrived stays. Harmless when repeated."""

    async def media(self, key: str, /) -> MediaHandle | None:
        """What is known of a prefix that is resident at this moment, None if it is not."""

    def ask(self, turn: Turn, history: Sequence[TurnRecord] | None, /) -> AsyncGenerator[list[TurnEvent], None]:
        """The events of a turn in lists, `done` last. history: the turns before it, made again if they are not here; None: unknown.

        Raises:
            NotFound: the media is not resident, or `after` is at odds with the conversation. BadRequest, TooLarge, QueueFull,
            DeadlineExceeded, Cancelled (aborted), Internal.
        """

    async def abort(self, turn_id: str, /) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""

    async def close_conversation(self, conversation_id: str, tenant: str | None = None, /) -> bool:
        """Abort its turns, free its KV, forget its text. False if it is unknown, or another tenant's than `tenant` (None: any)."""

    async def set_brownout(self, level: float, /) -> None:
        """Turns that start from now on attend to less; 0 undoes it. Raises BadRequest: a level outside [0, 1]."""

    async def exchange(self, lane_id: str, messages: list[tuple[str, Any]], wait_s: float, /) -> list[tuple[str, Any]]:
        """Messages of a lane that has no connection of its own; the replies that come within `wait_s`."""


class DirectoryApi(Protocol):
    """`Directory` as other processes call it."""

    async def report(self, report: WorkerReport, /) -> ReportAnswer:
        """Take a worker's report, and tell it what is wanted of it."""

    async def forget_worker(self, worker: str, /) -> bool:
        """A worker is gone. False if it was not known."""

    async def snapshot(self) -> ClusterSnapshot:
        """Every worker that reports."""

    async def is_settled(self) -> bool:
        """Whether every worker has had time to report since the directory started."""

    async def note_start_failure(self, deployment: str, failure: dict[str, Any], /) -> None:
        """A replica could not start (`errors.to_failure`)."""

    async def start_failures(self) -> dict[str, dict[str, Any]]:
        """By deployment, why a replica of it could not start (for `errors.from_failure`)."""

    async def exchange_owners(self, router: str, owners: frozenset[str], /) -> frozenset[str]:
        """These owners have calls at a router. Who has turns at workers, or calls at other routers."""

    async def find(self, digest: str | None, key: str | None, /) -> PrefixLocation:
        """Where a media prefix is, by its content key or by the digest of a request that asked for it before."""

    async def list_media(self) -> tuple[MediaLocation, ...]:
        """Every media prefix and where it is."""

    async def tenant_counts(self, tenant: str, /) -> TenantCounts:
        """What one tenant has in the cluster."""

    async def note_held(self, handle: MediaHandle, workers: Sequence[str], digest: str | None, /) -> None:
        """A router saw a prefix arrive at these workers. digest: of the request that asked for it."""

    async def drop_media(self, key: str, /) -> bool:
        """Forget who holds a prefix and which requests ask for it. False if nobody held it."""

    async def refuse(self, names: Sequence[str], for_s: float, /) -> None:
        """Workers died of a request that is known by these names: "<key or digest>" of media, "<key>:<hash>" of a turn about it."""

    async def claim(self, key: str, owner: str, lease_s: float, /) -> bool:
        """Whether `owner` has `key` to itself: nobody else has an unexpired claim. Asking again renews one's own."""

    async def unclaim(self, key: str, owner: str, /) -> bool:
        """Give a claim back. False if it is not `owner`'s."""

    async def open_conversation(self, conversation_id: str, media_id: str, tenant: str, /) -> None:
        """A conversation begins; known ones stay as they are."""

    async def record(self, conversation_id: str, media_id: str, number: int, record: TurnRecord, /) -> bool:
        """Turn `number` (0 = the first) of a conversation is over. False: turns before it are unknown, or it is one too many."""

    async def history(self, conversation_id: str, /) -> ConversationJournal | None:
        """The finished turns of a conversation, None if it is unknown."""

    async def forget_conversation(self, conversation_id: str, /) -> bool:
        """A conversation was closed. False if it is unknown."""

    async def mark_stale(self, conversation_id: str, worker: str, successor: str, /) -> None:
        """A conversation is at `successor` now ("": closed); what `worker`, which could not be told, has of it is stale."""


class RouterApi(Protocol):
    """What a router replica answers to whoever started the cluster."""

    async def state(self) -> dict[str, Any]:
        """{"port": where the gateway listens, "ready": whether clients can be served}."""

    async def drain(self, grace_s: float, /) -> None:
        """Take no more calls, and let those in progress finish for `grace_s`."""
