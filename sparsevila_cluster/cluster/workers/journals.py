"""The text of a decode worker's conversations: enough to make each of them again elsewhere.

Knows: the finished turns of each conversation, in order. Does not know: KV, engines, or who reads it. The engine's thread writes,
others read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from sparsevila_cluster.cluster.reports import Journal
from sparsevila_cluster.request import Turn, TurnEvent, TurnRecord


@dataclass
class Notes:
    """What a turn that is under way has said so far; the answer that it goes on with is part of it."""

    turn: Turn
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, turn: Turn) -> Notes:
        return cls(turn, turn.replay.token_ids if turn.replay is not None else ())

    def record(self, done: TurnEvent) -> TurnRecord:
        asked = replace(self.turn, replay=None, after=None, deadline_s=None)
        return TurnRecord(asked, self.token_ids, done.usage.brownout if done.usage is not None else 0.0)


class Journals:
    """Of at most `most` conversations; those that nothing was added to for longest are forgotten first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._all: OrderedDict[str, Journal] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, record: TurnRecord) -> None:
        turn = record.turn
        with self._lock:
            known = self._all.pop(turn.conversation_id, None) or Journal(turn.conversation_id, turn.media_id, (), turn.tenant)
            self._all[turn.conversation_id] = replace(known, records=(*known.records, record))
            while len(self._all) > self.most:
                self._all.popitem(last=False)

    def take_back(self, turn: Turn) -> bool:
        """Strike out the last record of a conversation. False, and nothing happens, if it is not of this turn."""
        with self._lock:
            known = self._all.get(turn.conversation_id)
            if known is None or known.records[-1].turn.turn_id != turn.turn_id:
                return False
            self._all[turn.conversation_id] = replace(known, records=known.records[:-1])
            if not known.records[:-1]:
                del self._all[turn.conversation_id]
            return True

    def forget(self, conversation_id: str) -> None:
        with self._lock:
            self._all.pop(conversation_id, None)

    def all(self) -> tuple[Journal, ...]:
        with self._lock:
            return tuple(self._all.values())
