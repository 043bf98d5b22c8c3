"""Figures of a decode engine, for whoever must not wait for its thread."""

from __future__ import annotations

from dataclasses import dataclass

from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.engine.decode_engine import DecodeEngine


@dataclass(frozen=True)
class EngineStats:
    """A snapshot of a decode engine, taken in its thread. residents: its media prefixes, in order of their content keys."""

    residents: tuple[MediaHandle, ...] = ()
    num_conversations: int = 0
    num_evicted: int = 0
    num_preempted: int = 0
    num_steps: int = 0
    brownout: float = 0.0

    @classmethod
    def of(cls, engine: DecodeEngine, before: EngineStats | None = None) -> EngineStats:
        """before: an earlier snapshot; its residents are taken over if they are the same, so that `is` tells a change."""
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
