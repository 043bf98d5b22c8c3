"""One turn on the router, from its arrival to its end: on the worker that has its conversation, and on another one if that is lost.

    a former run of it is ended -> the conversation's turns before it are over -> its owner has a place
    -> the conversation begins, or is located
    -> [a worker is chosen -> events | the worker is lost, or lacks the conversation or its prefix]*
    -> the turn is recorded -> done -> the conversation's next turn may begin
A worker that takes the turn over gets the prefix from a copy, the conversation's text from the directory, and what the client has
heard of the answer; the events go on at the next token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from sparsevila_cluster.cluster.routing.conversation_table import ConversationState, ConversationTable, ConversationToken
from sparsevila_cluster.cluster.routing.media_preparer import MediaPreparer
from sparsevila_cluster.cluster.routing.placement import choose_holder
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner, PrefixRequest
from sparsevila_cluster.cluster.routing.replication import PrefixReplicator
from sparsevila_cluster.cluster.routing.turn_recorder import record_turn
from sparsevila_cluster.cluster.routing.visits import Visit, Visits
from sparsevila_cluster.cluster.routing.worker_clients import PAUSE_S, WorkerClients
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import (
    BadMedia,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    QueueFull,
    SparseVilaError,
    Unavailable,
    WorkerLost,
)
from sparsevila_cluster.core.fair_sharing import OwnerPlaces
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import Replay, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.core.tenancy import may_use

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterParts:
    """What every turn of one router uses."""

    clients: WorkerClients
    visits: Visits
    conversations: ConversationTable
    provisioner: PrefixProvisioner
    preparer: MediaPreparer
    replicator: PrefixReplicator
    places: OwnerPlaces
    sink: MetricsSink


class RoutedTurn:
    """One turn under way: `events` is its life; the other methods end it early or look at it."""

    conversation: ConversationState

    def __init__(self, parts: RouterParts, turn: Turn, former: RoutedTurn | None = None):
        """former: a run of a turn with this id that is not over in this router.

        Raises:
            NotFound: no conversation ever had such an id. BadRequest: the id is in use for a turn of another conversation.
        """
        self._parts, self._clients = parts, parts.clients
        self._token = ConversationToken.parse(turn.conversation_id) if turn.conversation_id else None
        if former is not None and (self._token is None or self._token.base != former.conversation.base):
            raise BadRequest(f"turn_id {turn.turn_id!r} is already in use")
        self._former = former
        self.turn = _with_seed(turn)
        self.conversation = (
            parts.conversations.open(turn) if self._token is None else parts.conversations.state_of(self._token, turn.tenant)
        )
        config = parts.clients.config
        self._deadline = Deadline(config.engine.turn_timeout_s if turn.deadline_s is None else turn.deadline_s)
        self._num_attempts = config.router.max_attempts
        self._worker: str | None = None  # where it runs now
        self._ended: SparseVilaError | None = None
        self._holds_lock = False
        self._waiting: asyncio.Timeout | None = None
        self._opening: asyncio.Task[None] | None = None
        self._is_named = self._token is not None  # whether the client can name the conversation
        self._history: tuple[TurnRecord, ...] | None = None
        self._begun_at: int | None = None  # turns before this one, once a worker has begun it
        self._token_ids = list(turn.replay.token_ids) if turn.replay is not None else []
        self._brownout = turn.replay.brownout if turn.replay is not None else 0.0
        self._lost: set[str] = set()
        self._lacking: set[str] = set()
        self._recovering = False

    # ---- its life ----------------------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        """The events of the turn, `done` last. Leaving the iteration early aborts it where it runs.

        Raises:
            What the worker raises of the turn itself. Unavailable, NotFound: it can go on nowhere. DeadlineExceeded, Cancelled.
            PoisonRequest: two workers died of it.
        """
        try:
            await self._take_over()
            await self._lock()
            async with self._place():
                await self._locate()
                self._clients.suspects.check(self._fingerprint, time.monotonic())
                async with aclosing(self._attempts()) as events:
                    async for event in events:
                        self._is_named = True
                        yield event
        finally:
            self._leave()

    async def _attempts(self) -> AsyncGenerator[TurnEvent, None]:
        """The events of the turn from as many workers as it takes."""
        sent: set[str] = set()
        for attempt in range(1, self._num_attempts + 1):
            visit = await self._enter()
            worker, unsent = visit.worker, list[TurnEvent]()
            try:
                async with visit, aclosing(self._run(worker)) as events:
                    async for event in events:
                        self._check()
                        if event.kind == "done":
                            await visit.finish()
                            while unsent:  # a client that leaves here has not heard the end, so that it is not recorded
                                yield unsent.pop(0)
                        await self._note(event)
                        await visit.got_to(len(self._token_ids))
                        if event.kind == "token" or event.kind not in sent:
                            sent.add(event.kind)
                            with_token = event.kind in ("accepted", "done")
                            unsent.append(replace(event, conversation_id=self.conversation.token) if with_token else event)
                        # Nobody else may enter the worker meanwhile, so this must not wait for a client who does not read.
                        while unsent and not visit.is_alone:
                            yield unsent.pop(0)
                if "done" in sent:
                    return
                raise WorkerLost(f"worker {worker} ended turn {self.turn.turn_id} without its last event")
            except SparseVilaError as error:
                self._worker = None
                if "done" in sent:
                    return
                if attempt == self._num_attempts or not await self._may_retry(worker, error):
                    raise
                extra = {"turn_id": self.turn.turn_id, "at": worker}
                level = logging.WARNING if worker in self._lost else logging.INFO
                message = "turn %s is asked again after %d tokens: %s"
                log.log(level, message, self.turn.turn_id, len(self._token_ids), error, extra=extra)

    def uses(self, media_id: str) -> bool:
        """Whether it runs on this media prefix now."""
        return self._worker is not None and self.conversation.media_id == media_id

    async def abort(self, deadline: Deadline) -> bool:
        """End it wherever it is; its conversation stays as it was before it. False if it is over there."""
        if self._worker is None:  # waiting, or between two workers
            self.end(Cancelled(f"turn {self.turn.turn_id} was aborted"))
            return True
        return await self._clients.abort_turn(self.turn.turn_id, [self._worker], deadline)

    def end(self, error: SparseVilaError) -> None:
        """Send no more of this turn; its stream ends with `error`, at once if it waits for other turns."""
        self._ended = self._ended or error
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    # ---- arrival and departure ---------------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Abort a former run that may go on for a client that is gone."""
        turn_id, former, self._former = self.turn.turn_id, self._former, None
        workers: list[str] = []
        if former is not None:
            former.end(Cancelled(f"turn {turn_id} was taken up again"))
            workers = [former._worker] if former._worker is not None else []
        elif self.turn.replay is not None:
            workers = [one.worker for one in await self._clients.workers("decode", self._deadline)]
        elif not self.conversation.known and self.conversation.worker:  # of another router, which may have lost it at once
            workers = [self.conversation.worker]
        if workers:
            await self._clients.abort_turn(turn_id, workers, self._deadline)
        if former is not None:
            former._unlock()

    async def _lock(self) -> None:
        """Wait for the conversation's turns before this one. Raises DeadlineExceeded."""
        await self._wait_for(self.conversation.lock.acquire, f"waiting for the turns before turn {self.turn.turn_id}")
        self._holds_lock = True

    @asynccontextmanager
    async def _place(self) -> AsyncGenerator[None, None]:
        """A place of the turn's owner for the length of the block. Raises DeadlineExceeded, Cancelled: none came free."""
        place = self._parts.places.place(self.turn.owner)
        async with AsyncExitStack() as stack:
            await self._wait_for(lambda: stack.enter_async_context(place), f"waiting for other turns of {self.turn.owner!r}")
            yield

    async def _wait_for(self, begin: Callable[[], Awaitable[object]], what: str) -> None:
        """Wait for what `begin` returns, at most until the turn ends. Raises DeadlineExceeded, and what `end` was told."""
        left_s = self._deadline.remaining_s(what)
        try:
            async with asyncio.timeout(left_s) as self._waiting:
                await begin()
        except TimeoutError as error:
            if self._ended is not None:
                raise self._ended from error
            raise DeadlineExceeded(f"{what} took longer than {left_s:g} s") from error
        finally:
            self._waiting = None

    def _unlock(self) -> None:
        """Let the conversation's next turn begin. Harmless when repeated."""
        if self._holds_lock:
            self._holds_lock = False
            self.conversation.lock.release()

    async def _locate(self) -> None:
        """Begin the conversation, or find out where it stands as far as that is needed.

        Raises:
            NotFound: it is unknown, another tenant's, or its text is lost. BadRequest: it is about another media. Unavailable.
        """
        conversation, turn, clients = self.conversation, self.turn, self._clients
        if self._token is None:
            self._history = ()
            opening = clients.directory.once().open_conversation(conversation.base, conversation.media_id, conversation.tenant)
            self._opening = clients.in_background(opening, "opening a conversation", turn_id=turn.turn_id)
            return conversation.check(turn)
        was_known = conversation.known
        if was_known:
            conversation.check(turn)
        conversation.catch_up(self._token)
        enough = was_known or conversation.num_turns and conversation.worker and turn.media_id
        if not enough or turn.replay is not None or conversation.last_turn_id == turn.turn_id:
            self._history = await self._read_history()
            decodes = () if was_known else await clients.workers("decode", self._deadline)
            if not was_known and conversation.worker not in {one.worker for one in decodes}:
                self._lost.add(conversation.worker)
        elif not was_known:
            # The token names its worker, which knows better what the conversation is about and whose it is.
            conversation.media_id, conversation.tenant = turn.media_id, turn.tenant
        conversation.check(turn)

    def _leave(self) -> None:
        """The turn is over, or its client is gone."""
        self._unlock()
        self._deadline.cancel()
        conversation = self.conversation
        if not self._is_named and (conversation.worker or self._opening is not None):
            self._clients.in_background(self._close_unnamed(), "closing a conversation", turn_id=self.turn.turn_id)
        if not conversation.known or not conversation.num_turns and not conversation.worker:
            self._parts.conversations.forget(conversation.base, self.turn.tenant)

    async def _close_unnamed(self) -> None:
        """Close a conversation that was begun, but of which no client was told."""
        base, clients, worker = self.conversation.base, self._clients, self.conversation.worker
        self._parts.conversations.forget(base, self.turn.tenant)
        deadline = Deadline(2 * clients.config.router.call_timeout_s)
        if worker:
            await clients.close_conversation(base, worker, self.turn.tenant, True, deadline)
        if self._opening is not None:
            await asyncio.wait((self._opening,), timeout=deadline.left_s)
        await clients.directory.once().forget_conversation(base)

    # ---- where it runs -----------------------------------------------------------------------------------------------------

    @property
    def _fingerprint(self) -> str:
        """The same for all who ask this question about this media: what a worker may die of."""
        payload = f"{len(self.turn.tenant)}:{self.turn.tenant}{self.turn.question}".encode("utf-8", "surrogatepass")
        return f"{self.conversation.media_id}:{hashlib.blake2b(payload, digest_size=16).hexdigest()}"

    async def _enter(self) -> Visit:
        """Choose a worker, and wait until the turn may be sent there. One that dies meanwhile is none of the attempts."""
        while True:
            self._check()
            worker = await self._choose_worker()
            names, num_heard = (self._fingerprint,), len(self._token_ids)
            try:
                return await self._parts.visits.enter("decode", worker, names, num_heard, self._deadline)
            except Unavailable as error:
                log.info("turn %s does not enter worker %s: %s", self.turn.turn_id, worker, error)
                self._lost.add(worker)
                self._recovering = True

    async def _choose_worker(self) -> str:
        """A worker that has the prefix as far as is known. Where the conversation is not, its history goes along."""
        conversation = self.conversation
        if conversation.worker and conversation.worker not in self._lost | self._lacking:
            return conversation.worker
        found = await self._clients.directory.locate(conversation.media_id, self._deadline)
        self._parts.places.recent.note(found.owners)
        self._clients.suspects.check(self._fingerprint, time.monotonic(), found.refused)
        if found.handle is not None and not may_use(found.handle.tenant, self.turn.tenant):
            raise NotFound(f"media {conversation.media_id!r} is not resident; prepare it first")
        if found.deleted:
            self._parts.preparer.forget(conversation.media_id)
        if self._history is None:
            self._history = await self._read_history()
        holders = [one for one in found.holders if one.worker not in self._lacking]
        worker = choose_holder(holders, self._clients.placement(self._lost, conversation.base))
        return worker if worker is not None else await self._provide_prefix()

    async def _provide_prefix(self) -> str:
        """A worker where the prefix has been made resident."""
        key, parts = self.conversation.media_id, self._parts
        source = parts.preparer.remembered(key, self.turn.tenant)
        source = source and replace(source, owner=self.turn.owner)
        lost, lacking = frozenset(self._lost), frozenset(self._lacking)
        try:
            worker, _ = await parts.provisioner.provide(
                PrefixRequest(key, self._deadline, source, again=True, lost=lost, lacking=lacking)
            )
        except BadMedia as error:
            raise Unavailable(f"media {key!r} is lost with its worker, and its source cannot be read again: {error}") from error
        self._lacking.discard(worker)
        return worker

    async def _run(self, worker: str) -> AsyncGenerator[TurnEvent, None]:
        """The events of one attempt, after those that the client has."""
        conversation, clients = self.conversation, self._clients
        turn = replace(
            self.turn,
            conversation_id=conversation.base,
            media_id=conversation.media_id,
            deadline_s=self._deadline.remaining_s(f"turn {self.turn.turn_id}"),
            after=conversation.num_turns,
            replay=Replay(tuple(self._token_ids), self._brownout) if self._token_ids else None,
        )
        self._worker = worker
        if conversation.worker not in ("", worker):
            moving = clients.directory.once().mark_stale(conversation.base, conversation.worker, worker)
            clients.in_background(moving, "moving a conversation", turn_id=turn.turn_id)
        conversation.move_to(worker)
        with clients.busy(worker), self._parts.replicator.turn(worker, conversation.media_id):
            async with aclosing(clients.decode(worker, self._deadline).ask(turn, self._history)) as batches:
                async for batch in batches:
                    for event in batch:
                        yield event

    # ---- what was heard ----------------------------------------------------------------------------------------------------

    async def _note(self, event: TurnEvent) -> None:
        """Keep what another worker would need to go on after this event; record the turn when it is done."""
        if self._begun_at is None and event.kind != "accepted":
            self._begun_at = self.conversation.num_turns
        if event.kind == "accepted":
            self.conversation.known = True
        elif event.kind == "token":
            if event.index != len(self._token_ids):
                raise Internal(f"turn {self.turn.turn_id}: token {event.index} came instead of token {len(self._token_ids)}")
            self._token_ids += event.token_ids
            self._brownout = event.brownout
        elif event.kind == "done":
            await self._record(event)

    async def _record(self, done: TurnEvent) -> None:
        """The turn is part of its conversation now: record it before the client may ask the next one."""
        conversation = self.conversation
        base, media_id = conversation.base, conversation.media_id
        asked = replace(self.turn, conversation_id=base, media_id=media_id, deadline_s=None, after=None, replay=None)
        brownout = done.usage.brownout if done.usage is not None else self._brownout
        number, conversation.num_turns = conversation.num_turns, conversation.num_turns + 1
        conversation.last_turn_id = self.turn.turn_id
        if self._recovering:
            self._parts.sink.count("turns_recovered_total")
        record = TurnRecord(asked, tuple(self._token_ids), brownout)
        await record_turn(self._clients, conversation, number, record, self._deadline)

    async def _read_history(self) -> tuple[TurnRecord, ...]:
        """The finished turns before this one. What its client has seen finished is waited for: another router may still record it.

        Raises:
            NotFound: unknown, another tenant's, or lost. BadRequest: about another media. Unavailable, DeadlineExceeded, Cancelled.
        """
        conversation, turn, clients = self.conversation, self.turn, self._clients
        wait = Deadline(clients.config.router.call_timeout_s)
        while True:
            journal = await clients.directory.journal(conversation.base, self._deadline)
            records = conversation.with_unrecorded(journal.records if journal is not None else ())
            if conversation.is_covered_by(records):
                break
            if not wait.left_s and journal is None and not conversation.known:
                raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
            if not wait.left_s:
                raise NotFound(f"the text of conversation {conversation.token!r} is lost, and the worker that held it")
            await asyncio.sleep(min(PAUSE_S, self._deadline.remaining_s("waiting for the text of a conversation")))
        if journal is None and not conversation.known:
            raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
        if journal is not None and not conversation.known:
            conversation.media_id, conversation.tenant, conversation.known = journal.media_id, journal.tenant, True
            conversation.check(turn)
        num_heard = max(conversation.num_turns, journal.num_heard if journal is not None else 0)
        # What a worker remembers beyond was never heard by anybody, but for this very turn.
        begun_at = num_heard if self._begun_at is None else self._begun_at
        own = any(record.turn.turn_id == turn.turn_id for record in records[begun_at : begun_at + 1])
        del records[begun_at + own :]
        if records and records[-1].turn.turn_id == turn.turn_id:
            # It was finished, but its client did not hear all of it: it is made once more, the same.
            self._brownout = records.pop().brownout
        conversation.num_turns, conversation.last_turn_id = len(records), records[-1].turn.turn_id if records else ""
        return tuple(records)

    # ---- when an attempt fails ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._ended is not None:
            raise self._ended
        self._deadline.check(f"turn {self.turn.turn_id}")

    async def _may_retry(self, worker: str, error: SparseVilaError) -> bool:
        """Whether another attempt may do what this one did not; notes what has to be different then."""
        if self._ended is not None:
            return False
        if isinstance(error, NotFound):
            await self._note_lacking(worker)
            return True
        if isinstance(error, Unavailable):
            self._lost.add(worker)
            self._recovering = True
            if not isinstance(error, WorkerLost):
                self._clients.failed(worker, error)
            # It may be alive, out of reach for a moment, and run the turn for nobody.
            turn_id, soon = self.turn.turn_id, Deadline(self._clients.config.router.call_timeout_s)
            aborting = self._clients.decode(worker, soon, trips_breaker=False).abort(turn_id)
            self._clients.in_background(aborting, f"aborting a turn at worker {worker}", turn_id=turn_id)
            return True
        if isinstance(error, QueueFull) and self._history == () and not self._token_ids:
            # Nothing ties a conversation that begins to this worker, where another one has its prefix too.
            self._lost.add(worker)
            return bool(await self._holders() - self._lost - self._lacking)
        return False

    async def _note_lacking(self, worker: str) -> None:
        """The worker has not got the conversation as it was, for which its history helps, or not its prefix."""
        if self._history is None:
            self._history = await self._read_history()
            if worker in await self._holders():
                return
        self._lacking.add(worker)

    async def _holders(self) -> set[str]:
        found = await self._clients.directory.locate(self.conversation.media_id, self._deadline)
        return {one.worker for one in found.holders}


def _with_seed(turn: Turn) -> Turn:
    """The turn with a seed, made from its id, if it samples without one: whoever takes it over goes on with the same draws."""
    if turn.sampling.temperature == 0.0 or turn.sampling.seed is not None:
        return turn
    digest = hashlib.blake2b(turn.turn_id.encode(), digest_size=8).digest()
    return replace(turn, sampling=replace(turn.sampling, seed=int.from_bytes(digest) >> 1))
