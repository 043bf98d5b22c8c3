"""The text of a decode worker's conversations: enough to make each of them again elsewhere.

Knows: the finished turns of each conversation, in order. Does not know: KV, engines, or who reads it. The engine's thread writes,
others read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container
from dataclasses import dataclass, field, replace

from sparsevila_cluster.request import Turn, TurnEvent, TurnRecord


@dataclass
class Notes:
    """What a turn that is under way has said so far, an answer that it goes on with included."""

    turn: Turn
    token_ids: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, turn: Turn) -> Notes:
        return cls(turn, list(turn.replay.token_ids) if turn.replay is not None else [])

    def record(self, last: TurnEvent) -> TurnRecord:
        """The finished turn; `last` is its `done`."""
        asked = replace(self.turn, replay=None, after=None, deadline_s=None)
        return TurnRecord(asked, tuple(self.token_ids), last.usage.brownout if last.usage is not None else 0.0)


class Journal:
    def __init__(self) -> None:
        self._records: dict[str, list[TurnRecord]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def add(self, conversation_id: str, record: TurnRecord) -> None:
        with self._lock:
            self._records.setdefault(conversation_id, []).append(record)

    def forget(self, conversation_id: str) -> None:
        with self._lock:
            self._records.pop(conversation_id, None)

    def keep(self, known: Container[str]) -> None:
        """Forget every conversation that is not in `known`."""
        with self._lock:
            self._records = {name: records for name, records in self._records.items() if name in known}

    def all(self) -> dict[str, tuple[TurnRecord, ...]]:
        with self._lock:
            return {name: tuple(records) for name, records in self._records.items()}


Listener = Callable[[TurnEvent | Exception], None]
