"""How a decode engine stands, for whoever must not wait for its thread; and how hard the line in front of it presses.

Knows: which figures of an engine others want. Does not know: who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsevila_cluster.cluster.messages import Load
from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.engine.decode_engine import DecodeEngine


@dataclass(frozen=True)
class EngineStats:
    """One look at an engine, taken in its thread."""

    residents: tuple[MediaHandle, ...] = ()
    num_conversations: int = 0
    num_evicted: int = 0
    num_preempted: int = 0
    num_steps: int = 0
    brownout: float = 0.0

    @classmethod
    def of(cls, engine: DecodeEngine, before: EngineStats | None = None) -> EngineStats:
        """before: an earlier look; its residents are taken over if they are the same."""
        prefixes = engine.prefixes
        residents = before.residents if before is not None else ()
        if [handle.media_id for handle in residents] != (keys := sorted(prefix.key for prefix in prefixes)):
            known = {prefix.key: prefix.handle() for prefix in prefixes}
            residents = tuple(known[key] for key in keys)
        return cls(
            residents=residents,
            num_conversations=len(engine.conversations),
            num_evicted=prefixes.num_evicted,
            num_preempted=engine.scheduler.num_preempted,
            num_steps=engine.num_steps,
            brownout=engine.brownout,
        )


def load_of(engine: DecodeEngine) -> Load:
    """How busy it is, from any thread."""
    prefixes, turns, size = engine.prefixes.arena, engine.conversations.arena, engine.model.spec.bytes_per_token
    return Load(
        num_running=engine.scheduler.num_running,
        num_waiting=engine.scheduler.num_waiting,
        prefix_bytes=prefixes.used_bytes,
        prefix_budget_bytes=prefixes.num_slots * size,
        turn_bytes=turns.used_bytes,
        turn_budget_bytes=turns.num_slots * size,
    )


def pressure(num_waiting: int, max_waiting: int, begins_at: float) -> float:
    """0 up to `begins_at` * max_waiting turns in line, from there in proportion up to 1 at a full line. begins_at >= 1: 0."""
    share = num_waiting / max_waiting
    return 0.0 if begins_at >= 1.0 or share <= begins_at else min(1.0, (share - begins_at) / (1.0 - begins_at))
