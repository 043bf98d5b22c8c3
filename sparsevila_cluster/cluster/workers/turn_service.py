"""Turns on one decode worker: asked in order, made again where they are missing, told in lists of events.

Knows: the life of a turn as seen from outside its engine, and what is written down of it. Does not know: prefixes, transfers, or
where histories come from.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from sparsevila_cluster.cluster.workers.async_decode_engine import AsyncDecodeEngine
from sparsevila_cluster.cluster.workers.conversation_journals import ConversationJournals, TurnNotes
from sparsevila_cluster.cluster.workers.conversation_replay import InOrder, needs_replay, replay
from sparsevila_cluster.cluster.workers.stage_metrics import tell_turn
from sparsevila_cluster.cluster.workers.warm_up import ROWS, tiny_prefix
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import SamplingParams, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.running_turn import EventSink as Listener
from sparsevila_cluster.engine.turn_events import event_lists

log = logging.getLogger(__name__)

# Most events in one list: a message between processes costs more than what a few tokens take in it.
MAX_EVENTS = 8

# Submits a turn whose events go to the listener, and says so once the engine has it.
Submit = Callable[[Turn, Listener, Callable[[], None]], Awaitable[None]]


class TurnService:
    def __init__(self, desk: AsyncDecodeEngine, journals: ConversationJournals, sink: MetricsSink):
        self._desk, self._journals, self._sink = desk, journals, sink
        self._in_order = InOrder()
        self._turn_s = desk.engine.config.turn_timeout_s

    async def ask(self, turn: Turn, history: Sequence[TurnRecord] | None) -> AsyncGenerator[list[TurnEvent], None]:
        """See `DecodeWorker.ask`."""
        deadline = Deadline(self._within_s(turn))

        async def submit(asked: Turn, listener: Listener, entered: Callable[[], None]) -> None:
            async with self._in_order.of(turn.conversation_id):
                journals = self._journals
                if history is not None and await self._desk.call(lambda engine: needs_replay(engine, journals, turn, history)):
                    await replay(
                        turn, history, deadline, self._run, lambda: self._desk.post(self._forgetting(turn.conversation_id))
                    )
                    await self._desk.call(lambda engine: self._name(engine, turn, history))
                    self._sink.count("conversations_replayed_total")
                    log.info("conversation made again", extra={"turn_id": turn.turn_id, "num_turns": len(history)})
                    asked = replace(turn, deadline_s=max(1e-3, deadline.left_s))
                await self._enter(asked, listener, entered)

        async with aclosing(self._run(turn, submit)) as lists:
            async for events in lists:
                yield events

    def _run(self, turn: Turn, submit: Submit | None = None) -> AsyncGenerator[list[TurnEvent], None]:
        begin: Submit = submit or self._enter
        entered = False

        def enter() -> None:
            nonlocal entered
            entered = True

        def abort(engine: DecodeEngine) -> None:
            # A turn that was refused is not ours to end: another one may have its id.
            if entered and not engine.abort(turn.turn_id):
                self._take_back(engine, turn)

        return event_lists(
            lambda listener: begin(turn, listener, enter),
            lambda: self._desk.post(abort),
            self._within_s(turn),
            f"turn {turn.turn_id}",
            MAX_EVENTS,
        )

    def _take_back(self, engine: DecodeEngine, turn: Turn) -> None:
        """A turn was over when its asker left without having heard so: the conversation goes on as if it had never been."""
        if not engine.conversations.busy(turn.conversation_id) and self._journals.take_back(turn):
            engine.close_conversation(turn.conversation_id)

    def _name(self, engine: DecodeEngine, turn: Turn, history: Sequence[TurnRecord]) -> None:
        """A conversation was made again: write its turns down under the names that everybody else knows them by."""
        if engine.conversations.get(turn.conversation_id) is not None:
            self._journals.restore(turn, history)

    async def _enter(self, turn: Turn, listener: Listener, entered: Callable[[], None]) -> None:
        notes = TurnNotes.of(turn)

        def submit(engine: DecodeEngine) -> None:
            opens = engine.conversations.get(turn.conversation_id) is None
            engine.submit(turn, lambda event: self._hear(engine, notes, listener, event))
            entered()
            if opens:
                self._journals.forget(turn.conversation_id)

        await self._desk.call(submit)

    def _hear(self, engine: DecodeEngine, notes: TurnNotes, listener: Listener, event: TurnEvent | Exception) -> None:
        """In the engine's thread: take notes of what is said, pass it on."""
        facts = {"turn_id": notes.turn.turn_id, "worker": self._desk.worker}
        over = isinstance(event, Exception) or event.kind == "done"
        if isinstance(event, Exception):
            log.info("turn ended early", extra={**facts, "why": str(event)})
        elif event.kind == "token":
            notes.token_ids += event.token_ids
        elif event.usage is not None:
            conversation = engine.conversations.get(notes.turn.conversation_id)
            assert conversation is not None, "a turn that has just become part of it"
            self._journals.add(conversation.num_turns - 1, notes.record(event))
            tell_turn(self._sink, event.usage, 0 if notes.turn.replay is None else len(notes.turn.replay.token_ids))
            log.info("turn done", extra={**facts, "ms": event.usage.ms})
        if over:
            self._desk.look(engine)
        listener(event)

    def _within_s(self, turn: Turn) -> float:
        return self._turn_s if turn.deadline_s is None else turn.deadline_s

    def _forgetting(self, conversation_id: str) -> Callable[[DecodeEngine], bool]:
        def close(engine: DecodeEngine) -> bool:
            self._journals.forget(conversation_id)
            return engine.close_conversation(conversation_id)

        return close

    async def close_conversation(self, conversation_id: str) -> bool:
        """Abort its turns, free its KV, forget its text. False if it is unknown."""
        return await self._desk.call(self._forgetting(conversation_id))

    async def warm(self) -> None:
        """Answer a tiny question about noise, and forget both."""
        name = f"warm-{uuid.uuid4().hex}"

        def begin(engine: DecodeEngine) -> None:
            extent = engine.prefixes.reserve(ROWS)
            engine.prefixes.publish(tiny_prefix(name, extent, engine.model.text.num_position_rows))

        def end(engine: DecodeEngine) -> None:
            engine.close_conversation(name)
            engine.prefixes.remove(name)

        async def submit(turn: Turn, listener: Listener, entered: Callable[[], None]) -> None:
            await self._desk.call(lambda engine: engine.submit(turn, listener))
            entered()

        try:
            await self._desk.call(begin)
            async with aclosing(self._run(Turn(name, name, name, "?", SamplingParams(max_tokens=2)), submit)) as lists:
                async for _ in lists:
                    pass
        finally:
            await self._desk.call(end)
