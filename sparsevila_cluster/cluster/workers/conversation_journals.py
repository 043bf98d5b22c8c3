"""The text of a decode worker's conversations: enough to replay each of them on another worker."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sparsevila_cluster.cluster.messages import ConversationJournal, turn_identities
from sparsevila_cluster.core.requests import Turn, TurnEvent, TurnRecord
from sparsevila_cluster.core.tenancy import may_use


@dataclass
class PendingRecord:
    """The record of a turn that is under way: its answer so far, which begins with the one that it replays."""

    turn: Turn
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, turn: Turn) -> PendingRecord:
        """Of a turn that is submitted now."""
        return cls(turn, turn.replay.token_ids if turn.replay is not None else ())

    def finish(self, done: TurnEvent) -> TurnRecord:
        """The record, given the last event of the turn."""
        asked = replace(self.turn, replay=None, after=None, deadline_s=None)
        return TurnRecord(asked, self.token_ids, done.usage.brownout if done.usage is not None else 0.0)


class ConversationJournals:
    """The finished turns of at most `capacity` conversations; those that nothing was added to for longest are forgotten first.

    The engine's thread writes, others read.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._all: OrderedDict[str, ConversationJournal] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, number: int, record: TurnRecord) -> None:
        """Turn `number` (0 = the first) of a conversation is over. One whose beginning was forgotten here stays forgotten."""
        turn = record.turn
        with self._lock:
            known = self._all.pop(turn.conversation_id, None) or ConversationJournal(
                turn.conversation_id, turn.media_id, (), turn.tenant
            )
            if len(known.records) == number:
                self._put(replace(known, records=(*known.records, record)))

    def restore(self, turn: Turn, records: Sequence[TurnRecord]) -> None:
        """The conversation of `turn` was replayed from these."""
        with self._lock:
            self._put(ConversationJournal(turn.conversation_id, turn.media_id, tuple(records), turn.tenant))

    def matches(self, conversation_id: str, records: Sequence[TurnRecord]) -> bool:
        """Whether these very turns, with these very answers, are what is known of a conversation."""
        with self._lock:
            known = self._all.get(conversation_id)
        return turn_identities(records) == turn_identities(known.records if known is not None else ())

    def may_use(self, conversation_id: str, tenant: str) -> bool:
        """Whether a conversation is not another tenant's; unknown ones are not."""
        with self._lock:
            known = self._all.get(conversation_id)
        return known is None or may_use(known.tenant, tenant)

    def remove_last(self, turn: Turn) -> bool:
        """Remove the last record of a conversation. False, and nothing happens, if it is not of this turn."""
        with self._lock:
            known = self._all.get(turn.conversation_id)
            if known is None or known.records[-1].turn.turn_id != turn.turn_id:
                return False
            self._all[turn.conversation_id] = replace(known, records=known.records[:-1])
            if not known.records[:-1]:
                del self._all[turn.conversation_id]
            return True

    def forget(self, conversation_id: str) -> None:
        """Drop what is known of a conversation; unknown ones are fine."""
        with self._lock:
            self._all.pop(conversation_id, None)

    def _put(self, journal: ConversationJournal) -> None:
        self._all[journal.conversation_id] = journal
        self._all.move_to_end(journal.conversation_id)
        while len(self._all) > self.capacity:
            self._all.popitem(last=False)

    def all(self) -> tuple[ConversationJournal, ...]:
        """Of every conversation, least recently changed first."""
        with self._lock:
            return tuple(self._all.values())
