"""Turns on one decode worker: asked in order, replayed where their conversation is missing, and recorded in its journals."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from sparsevila_cluster.cluster.workers.conversation_journals import ConversationJournals, PendingRecord
from sparsevila_cluster.cluster.workers.conversation_replay import KeyedLocks, needs_replay, replay
from sparsevila_cluster.cluster.workers.stage_metrics import record_turn
from sparsevila_cluster.cluster.workers.warm_up import ROWS, tiny_prefix
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import SamplingParams, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.engine.async_engine import AsyncDecodeEngine, Submit
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prepared_turn import PreparedTurn
from sparsevila_cluster.engine.turn import EventSink

log = logging.getLogger(__name__)

# Most events in one list: a message between processes costs more than what a few tokens take in it.
MAX_EVENTS = 8


class TurnService:
    """The turns of one decode worker, as seen from outside its engine."""

    def __init__(self, worker: str, engine: AsyncDecodeEngine, journals: ConversationJournals, sink: MetricsSink):
        """worker: its name, for log lines. sink: where metrics go."""
        self._worker, self._engine, self._journals, self._sink = worker, engine, journals, sink
        self._conversation_locks = KeyedLocks()

    def ask(self, turn: Turn, history: Sequence[TurnRecord] | None) -> AsyncGenerator[list[TurnEvent], None]:
        """See `DecodeWorker.ask`."""
        deadline = Deadline(self._engine.timeout_s(turn))

        async def begin(submit: Submit) -> None:
            async with self._conversation_locks.hold(turn.conversation_id):
                asked = turn
                if history is not None and await self._restore(turn, history, deadline):
                    asked = replace(turn, deadline_s=max(1e-3, deadline.left_s))
                await self._engine.call(lambda engine: submit(engine, asked))

        return self._events(turn, begin)

    async def _restore(self, turn: Turn, history: Sequence[TurnRecord], deadline: Deadline) -> bool:
        """Replay the conversation of a turn if it is not here as `history` says. Whether that was needed."""
        if not await self._engine.call(lambda engine: needs_replay(engine, self._journals, turn, history)):
            return False
        undo = self._close_in_engine(turn.conversation_id)
        await replay(turn, history, deadline, self._events, lambda: self._engine.post(undo))
        await self._engine.call(lambda engine: self._record_history(engine, turn, history))
        self._sink.count("conversations_replayed_total")
        log.info("conversation replayed", extra={"turn_id": turn.turn_id, "num_turns": len(history)})
        return True

    def _events(
        self, turn: Turn, begin: Callable[[Submit], Awaitable[None]] | None = None
    ) -> AsyncGenerator[list[TurnEvent], None]:
        def undo(engine: DecodeEngine) -> None:
            self._drop_last(engine, turn)

        return self._engine.ask(turn, begin, submit=self._submit, undo=undo, max_events=MAX_EVENTS)

    # ---- in the engine's thread --------------------------------------------------------------------------------------------

    def _submit(self, engine: DecodeEngine, turn: Turn, sink: EventSink, prepared: PreparedTurn) -> None:
        pending, opens = PendingRecord.of(turn), engine.conversations.get(turn.conversation_id) is None
        engine.submit(turn, lambda event: self._on_event(engine, pending, sink, event), prepared)
        if opens:
            self._journals.forget(turn.conversation_id)

    def _on_event(self, engine: DecodeEngine, pending: PendingRecord, sink: EventSink, event: TurnEvent | Exception) -> None:
        """Record what the turn says, then pass it on."""
        turn, facts = pending.turn, {"turn_id": pending.turn.turn_id, "worker": self._worker}
        if isinstance(event, Exception):
            log.info("turn failed", extra={**facts, "why": str(event)})
        elif event.kind == "token":
            pending.token_ids += event.token_ids
        elif event.usage is not None:
            conversation = engine.conversations.get(turn.conversation_id)
            assert conversation is not None, "a turn that has just become part of it"
            self._journals.add(conversation.num_turns - 1, pending.finish(event))
            record_turn(self._sink, event.usage, 0 if turn.replay is None else len(turn.replay.token_ids))
            log.info("turn done", extra={**facts, "ms": event.usage.ms})
        sink(event)

    def _drop_last(self, engine: DecodeEngine, turn: Turn) -> None:
        """The caller left without having read the end of a turn that is over: the conversation goes on as if it had never been."""
        if not engine.conversations.busy(turn.conversation_id) and self._journals.remove_last(turn):
            engine.close_conversation(turn.conversation_id)

    def _record_history(self, engine: DecodeEngine, turn: Turn, history: Sequence[TurnRecord]) -> None:
        """Record the turns of a replayed conversation under the ids that they had where they were asked first."""
        if engine.conversations.get(turn.conversation_id) is not None:
            self._journals.restore(turn, history)

    def _close_in_engine(self, conversation_id: str, tenant: str | None = None) -> Callable[[DecodeEngine], bool]:
        def close(engine: DecodeEngine) -> bool:
            known = engine.conversations.get(conversation_id)
            foreign = tenant is not None and not (
                self._journals.may_use(conversation_id, tenant) and (known is None or may_use(known.tenant, tenant))
            )
            if foreign:
                return False
            self._journals.forget(conversation_id)
            return engine.close_conversation(conversation_id)

        return close

    # ---- the rest ----------------------------------------------------------------------------------------------------------

    async def close_conversation(self, conversation_id: str, tenant: str | None = None) -> bool:
        """See `DecodeWorker.close_conversation`."""
        return await self._engine.call(self._close_in_engine(conversation_id, tenant))

    async def warm(self) -> None:
        """Answer a tiny question about noise, and forget both."""
        name = f"warm-{uuid.uuid4().hex}"

        def publish(engine: DecodeEngine) -> None:
            extent = engine.prefixes.reserve(ROWS)
            engine.prefixes.publish(tiny_prefix(name, extent, engine.model.text.num_position_rows))

        def drop(engine: DecodeEngine) -> None:
            engine.close_conversation(name)
            engine.prefixes.remove(name)

        try:
            await self._engine.call(publish)
            async with aclosing(self._engine.ask(Turn(name, name, name, "?", SamplingParams(max_tokens=2)))) as lists:
                async for _ in lists:
                    pass
        finally:
            await self._engine.call(drop)
