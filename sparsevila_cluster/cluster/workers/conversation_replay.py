"""Conversations replayed from their text, and turns of one conversation kept in the order in which they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from sparsevila_cluster.cluster.workers.conversation_journals import ConversationJournals
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.requests import Replay, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.engine.decode_engine import DecodeEngine


class KeyedLocks:
    """One holder per name at a time, first come first served. Used within one event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncGenerator[None, None]:
        """Wait for those who asked for `name` before, then hold it."""
        lock, num = self._locks.get(name, (asyncio.Lock(), 0))
        self._locks[name] = lock, num + 1
        try:
            async with lock:
                yield
        finally:
            lock, num = self._locks.pop(name)
            if num > 1:
                self._locks[name] = lock, num - 1


def needs_replay(engine: DecodeEngine, journals: ConversationJournals, turn: Turn, history: Sequence[TurnRecord]) -> bool:
    """Whether the conversation has to be replayed: it is idle, and other turns are behind it than those of `history`.

    If so, what was there of it is closed. As many turns are not enough: one that was asked here and whose answer nobody read may
    lie where another one was asked elsewhere.
    """
    asked_before = engine.turns.get(turn.turn_id)
    if asked_before is not None and asked_before.conversation.conversation_id == turn.conversation_id:
        engine.abort(turn.turn_id)  # whoever asked for it went away, and comes back for the rest
    if engine.conversations.busy(turn.conversation_id):
        return False  # a turn that was asked before this one is under way: it is part of the conversation by the time of this one
    conversation = engine.conversations.get(turn.conversation_id)
    if conversation is not None and not may_use(conversation.tenant, turn.tenant):
        return False  # not theirs to close
    num_turns = 0 if conversation is None else conversation.num_turns
    if num_turns == len(history) and (not num_turns or journals.matches(turn.conversation_id, history)):
        return False
    engine.close_conversation(turn.conversation_id)
    return bool(history)


async def replay(
    turn: Turn,
    history: Sequence[TurnRecord],
    deadline: Deadline,
    run: Callable[[Turn], AsyncGenerator[list[TurnEvent], None]],
    undo: Callable[[], object],
) -> None:
    """Run the turns of `history` one by one, within the time of `turn`; `undo` if that does not come to its end.

    Raises:
        DeadlineExceeded. Whatever `run` raises.
    """
    try:
        for number, record in enumerate(history):
            deadline.check(f"replaying conversation {turn.conversation_id!r}")
            replayed = replace(
                record.turn,
                turn_id=f"{turn.turn_id}/{number}",
                conversation_id=turn.conversation_id,
                media_id=turn.media_id,
                tenant=turn.tenant,
                owner=turn.owner,
                want_evidence=False,
                deadline_s=max(1e-3, deadline.left_s),
                after=number,
                replay=Replay(record.token_ids, record.brownout),
            )
            async with aclosing(run(replayed)) as events:
                async for _ in events:
                    pass
    except BaseException:
        undo()
        raise
