"""One turn as the router sees it: asked of the worker that has its conversation, and of another one should that be lost.

Knows: what the client was told so far, where the turn runs, and how it goes on elsewhere. Does not know: KV, lanes, or how a prefix
comes to another worker (`shipping`).

    worker of the conversation -> events | lost, or not there any more:
        the conversation's text from the registry, its prefix to another worker from a copy, asked there with what was said
        -> the events go on at the next token
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from sparsevila_cluster.cluster.routing.conversation_table import ConversationState
from sparsevila_cluster.cluster.routing.media_preparer import MediaPreparer
from sparsevila_cluster.cluster.routing.placement import choose_holder
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner, PrefixWanted
from sparsevila_cluster.cluster.routing.replication import PrefixReplicator
from sparsevila_cluster.cluster.routing.turn_recorder import write_down
from sparsevila_cluster.cluster.routing.worker_clients import PAUSE_S, WorkerClients
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import BadMedia, Internal, NotFound, QueueFull, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import Replay, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.core.tenancy import may_use

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterParts:
    """What every turn of one router uses."""

    fleet: WorkerClients
    shipping: PrefixProvisioner
    preparing: MediaPreparer
    replication: PrefixReplicator
    sink: MetricsSink


class RoutedTurn:
    """One turn under way. The caller holds the conversation's lock, if only until `let_go`."""

    def __init__(self, means: RouterParts, turn: Turn, head: ConversationState, deadline: Deadline):
        self._means, self._fleet = means, means.fleet
        self.turn, self.head, self.deadline = turn, head, deadline
        self.worker: str | None = None
        self.ended: SparseVilaError | None = None
        self._holds_lock = False
        self._history: tuple[TurnRecord, ...] | None = None
        self._said = list(turn.replay.token_ids) if turn.replay is not None else []
        self._brownout = turn.replay.brownout if turn.replay is not None else 0.0
        self._lost: set[str] = set()
        self._lacking: set[str] = set()
        self._recovering = False
        self._begun_at: int | None = None  # turns before this one, once a worker has begun it

    # ---- the outside's view ------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        """The events of the turn, `done` last. Leaving the iteration early aborts it where it runs.

        Raises:
            What the worker raises of the turn itself. Unavailable, NotFound: it can go on nowhere. DeadlineExceeded, Cancelled.
        """
        told: set[str] = set()
        for attempt in range(1, self._fleet.config.router.max_attempts + 1):
            self._check()
            worker = await self._place()
            try:
                async with aclosing(self._run(worker)) as events:
                    async for event in events:
                        self._check()
                        if self._begun_at is None and event.kind != "accepted":
                            self._begun_at = self.head.num_turns
                        if event.kind == "token":
                            self._add(event)
                        elif event.kind == "accepted":
                            self.head.known = True
                        elif event.kind == "done":
                            await self._finish(event)
                        if event.kind == "token" or event.kind not in told:
                            told.add(event.kind)
                            yield replace(event, conversation_id=self.head.token) if event.kind in ("accepted", "done") else event
                if "done" in told:
                    return
                raise WorkerLost(f"worker {worker} ended a turn in mid-answer")
            except SparseVilaError as error:
                self.worker = None
                if "done" in told:
                    return  # a worker that dies with its last word has said it
                if attempt == self._fleet.config.router.max_attempts or not await self._goes_on(worker, error):
                    raise
                extra = {"turn_id": self.turn.turn_id, "at": worker}
                level = logging.WARNING if worker in self._lost else logging.INFO
                log.log(level, "a turn is asked again after %d tokens: %s", len(self._said), error, extra=extra)

    async def resolve(self) -> None:
        """Find out where a conversation stands of which more is needed than its token says: what it is about, or what was said.

        Raises:
            NotFound: it is unknown, another tenant's, or its text is lost. BadRequest: it is about another media. Unavailable.
        """
        known = self.head.known
        self._history = await self._read_history()
        if not known:
            decodes = await self._fleet.workers("decode", self.deadline)
            if self.head.worker not in {one.worker for one in decodes}:
                self._lost.add(self.head.worker)

    def suppose(self) -> None:
        """The token says enough to ask its worker, which knows better what the conversation is about and whose it is."""
        self.head.media_id, self.head.tenant = self.turn.media_id, self.turn.tenant

    def begin(self) -> None:
        """The conversation begins with this turn."""
        self._history = ()
        head = self.head
        opening = self._fleet.registry.tell("open_conversation", head.base, head.media_id, head.tenant)
        self._fleet.later(opening, "opening a conversation", turn_id=self.turn.turn_id)

    async def lock(self) -> None:
        """Wait for the conversation's turns before this one. Raises DeadlineExceeded."""
        what = f"waiting for the turns before turn {self.turn.turn_id}"
        await wait_within(self.head.lock.acquire(), self.deadline.remaining_s(what), what)
        self._holds_lock = True

    def let_go(self) -> None:
        """Let the conversation's next turn begin. Harmless when repeated."""
        if self._holds_lock:
            self._holds_lock = False
            self.head.lock.release()

    def end(self, error: SparseVilaError) -> None:
        """Nothing more is told of this turn; its stream ends with `error`."""
        self.ended = self.ended or error

    # ---- where -------------------------------------------------------------------------------------------------------------

    async def _place(self) -> str:
        """A worker that has the prefix as far as anybody knows. Where the conversation is not, its history goes along."""
        head = self.head
        if head.worker and head.worker not in self._lost | self._lacking:
            return head.worker
        found = await self._fleet.registry.where(head.media_id, self.deadline)
        if found.handle is not None and not may_use(found.handle.tenant, self.turn.tenant):
            raise NotFound(f"media {head.media_id!r} is not resident; prepare it first")
        if self._history is None:
            self._history = await self._read_history()
        holders = [one for one in found.holders if one.worker not in self._lacking]
        worker = choose_holder(holders, self._fleet.scene(self._lost, head.base))
        return worker if worker is not None else await self._bring()

    async def _bring(self) -> str:
        key = self.head.media_id
        request = self._means.preparing.remembered(key, self.turn.tenant)
        lost, lacking = frozenset(self._lost), frozenset(self._lacking)
        wanted = PrefixWanted(key, self.deadline, request, again=True, lost=lost, lacking=lacking)
        try:
            worker, _ = await self._means.shipping.bring(wanted)
        except BadMedia as error:
            raise Unavailable(f"media {key!r} is lost with its worker, and its source can not be read again: {error}") from error
        self._lacking.discard(worker)
        return worker

    async def _read_history(self) -> tuple[TurnRecord, ...]:
        """The finished turns before this one. What its client has seen finished is waited for: a router may be about to tell it.

        Raises:
            NotFound: unknown, another tenant's, or lost. BadRequest: about another media. Unavailable, DeadlineExceeded, Cancelled.
        """
        head, turn = self.head, self.turn
        patience = Deadline(self._fleet.config.router.call_timeout_s)
        while True:
            journal = await self._fleet.registry.journal(head.base, self.deadline)
            records = head.and_unrecorded(journal.records if journal is not None else ())
            if head.leads_to(records):
                break
            if not patience.left_s and journal is None and not head.known:
                raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
            if not patience.left_s:
                raise NotFound(f"the text of conversation {head.token!r} is lost, and the worker that held it")
            await asyncio.sleep(min(PAUSE_S, self.deadline.remaining_s("waiting for the text of a conversation")))
        if journal is None and not head.known:
            raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
        if journal is not None and not head.known:
            head.media_id, head.tenant, head.known = journal.media_id, journal.tenant, True
            head.check(turn)
        num_heard = max(head.num_turns, journal.num_heard if journal is not None else 0)
        # What a worker remembers beyond was never heard by anybody, but for this very turn.
        begun_at = num_heard if self._begun_at is None else self._begun_at
        own = any(record.turn.turn_id == turn.turn_id for record in records[begun_at : begun_at + 1])
        del records[begun_at + own :]
        if records and records[-1].turn.turn_id == turn.turn_id:
            # It was finished, but its client did not hear all of it: it is made once more, the same.
            self._brownout = records.pop().brownout
        head.num_turns, head.last_turn_id = len(records), records[-1].turn.turn_id if records else ""
        return tuple(records)

    # ---- one attempt -------------------------------------------------------------------------------------------------------

    async def _run(self, worker: str) -> AsyncGenerator[TurnEvent, None]:
        """The events of one attempt, behind what was said before it."""
        head, fleet = self.head, self._fleet
        turn = replace(
            self.turn,
            conversation_id=head.base,
            media_id=head.media_id,
            deadline_s=self.deadline.remaining_s(f"turn {self.turn.turn_id}"),
            after=head.num_turns,
            replay=Replay(tuple(self._said), self._brownout) if self._said else None,
        )
        self.worker = worker
        if head.worker not in ("", worker):
            fleet.later(fleet.registry.tell("leave", head.base, head.worker, worker), "moving a conversation", turn_id=turn.turn_id)
        head.moves_to(worker)
        with fleet.busy(worker), self._means.replication.turn(worker, head.media_id):
            async with aclosing(fleet.stream("decode", worker, "ask", turn, self._history, deadline=self.deadline)) as batches:
                async for batch in batches:
                    for event in batch:
                        yield event

    def _add(self, event: TurnEvent) -> None:
        if event.index != len(self._said):
            raise Internal(f"token {event.index} of turn {self.turn.turn_id} came where token {len(self._said)} was due")
        self._said += event.token_ids
        self._brownout = event.brownout

    async def _finish(self, done: TurnEvent) -> None:
        """The turn is part of its conversation from here on: write it down before the client may ask the next one."""
        head = self.head
        asked = replace(self.turn, conversation_id=head.base, media_id=head.media_id, deadline_s=None, after=None, replay=None)
        brownout = done.usage.brownout if done.usage is not None else self._brownout
        record = TurnRecord(asked, tuple(self._said), brownout)
        number, head.num_turns = head.num_turns, head.num_turns + 1
        head.last_turn_id = self.turn.turn_id
        if self._recovering:
            self._means.sink.count("turns_recovered_total")
        await write_down(self._fleet, head, number, record, self.deadline)

    # ---- when it fails -----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.ended is not None:
            raise self.ended
        self.deadline.check(f"turn {self.turn.turn_id}")

    async def _goes_on(self, worker: str, error: SparseVilaError) -> bool:
        """Whether another attempt may do what this one did not, and what has to be different then."""
        if self.ended is not None:
            return False
        if isinstance(error, NotFound):
            return await self._was_forgotten(worker)
        if isinstance(error, Unavailable):
            self._lost.add(worker)
            self._recovering = True
            if not isinstance(error, WorkerLost):
                self._fleet.failed(worker, error)
            # It may be alive, out of reach for a moment: nobody listens to what it says there any more.
            self._fleet.tell_later("decode", worker, "abort", self.turn.turn_id, turn_id=self.turn.turn_id)
            return True
        if isinstance(error, QueueFull) and self._history == () and not self._said:
            # Nothing ties a conversation that begins to this worker, where another one has its prefix too.
            self._lost.add(worker)
            found = await self._fleet.registry.where(self.head.media_id, self.deadline)
            return bool({one.worker for one in found.holders} - self._lost - self._lacking)
        return False

    async def _was_forgotten(self, worker: str) -> bool:
        """The worker has not got the conversation as it was, or not its prefix."""
        if self._history is None:
            self._history = await self._read_history()
            found = await self._fleet.registry.where(self.head.media_id, self.deadline)
            if worker in {one.worker for one in found.holders}:
                return True
        self._lacking.add(worker)
        return True
