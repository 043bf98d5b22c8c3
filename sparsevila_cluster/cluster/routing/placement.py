"""Which worker does it: decisions over what workers reported, without asking anybody. Time is handed in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from sparsevila_cluster.cluster.messages import WorkerReport

FIRST_COOLDOWN_S = 0.5
LONGEST_COOLDOWN_S = 30.0


@dataclass
class CircuitBreaker:
    """Workers that failed just now are avoided for a while, which doubles with every failure until one call succeeds."""

    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)

    def failed(self, worker: str, now_s: float) -> None:
        """`worker` did not do what it was asked. Failures while it cools down count once: they are of one event."""
        num, until_s = self._failures.get(worker, (0, 0.0))
        if until_s <= now_s:
            num, until_s = num + 1, now_s + min(LONGEST_COOLDOWN_S, FIRST_COOLDOWN_S * 2.0**num)
            self._failures[worker] = num, until_s

    def succeeded(self, worker: str) -> None:
        """A call of `worker` was answered."""
        self._failures.pop(worker, None)

    def cooling_down(self, now_s: float) -> set[str]:
        """Workers to avoid now."""
        return {worker for worker, (_, until_s) in self._failures.items() if until_s > now_s}

    def forget(self, present: Collection[str], now_s: float) -> None:
        """Drop what is known of workers that are neither present nor cooling down: names come and go with replicas."""
        self._failures = {w: f for w, f in self._failures.items() if w in present or f[1] > now_s}


@dataclass(frozen=True)
class PlacementContext:
    """What one decision may use beside the reports.

    num_under_way: what this router has running at each worker, which reports show only later. cooling_down: they failed
    just now, or a suspect is alone there; avoided as long as somebody else can do it. excluded: they failed this very request.
    subject: what is placed; it decides among equals, so that routers which know the same send one thing to one worker, and
    different things to different ones.
    """

    num_under_way: Mapping[str, int] = field(default_factory=dict)
    cooling_down: Collection[str] = frozenset()
    excluded: Collection[str] = frozenset()
    subject: str = ""

    def candidates(self, workers: Iterable[WorkerReport]) -> list[WorkerReport]:
        """Those who may be asked, without those who cool down unless nobody else is left."""
        allowed = [one for one in workers if one.worker not in self.excluded]
        return [one for one in allowed if one.worker not in self.cooling_down] or allowed

    def num_busy(self, one: WorkerReport) -> int:
        """Work at a worker. A report is older than what this router sent since, and knows more of other routers."""
        return max(one.load.num_running + one.load.num_waiting, self.num_under_way.get(one.worker, 0))

    def tie_break(self, one: WorkerReport) -> int:
        """A rank among equals that has nothing to do with their names' order."""
        return zlib.crc32(f"{self.subject}/{one.worker}".encode())


def choose_prefill(workers: Iterable[WorkerReport], context: PlacementContext) -> str | None:
    """The worker that makes a media prefix: the least busy. None if nobody may."""
    return _least(context.candidates(workers), lambda one: (context.num_busy(one), context.tie_break(one)))


def choose_decode(workers: Iterable[WorkerReport], num_bytes: int | None, context: PlacementContext) -> str | None:
    """Where a prefix of `num_bytes` (None: not known yet) goes: where it evicts nothing, then the least busy, then the emptiest.

    Workers whose whole budget is smaller never qualify. None if nobody may take it.
    """
    need = num_bytes or 0
    able = [one for one in workers if one.load.prefix_budget_bytes >= need]
    return _least(
        context.candidates(able),
        lambda one: (one.load.free_bytes < need, context.num_busy(one), -one.load.free_bytes, context.tie_break(one)),
    )


def choose_holder(holders: Iterable[WorkerReport], context: PlacementContext) -> str | None:
    """Which holder of a prefix takes a new conversation: the least busy, then the one with most room for its text."""
    return _least(
        context.candidates(holders),
        lambda one: (context.num_busy(one), one.load.turn_bytes - one.load.turn_budget_bytes, context.tie_break(one)),
    )


def choose_source(
    copies: Iterable[WorkerReport], holders: Iterable[WorkerReport], context: PlacementContext, target: str | None = None
) -> WorkerReport | None:
    """The worker that sends a prefix that exists to `target`: a host copy rather than a decode worker, which has turns to run."""
    for workers in (copies, holders):
        able = {one.worker: one for one in workers if one.worker != target}
        chosen = _least(context.candidates(able.values()), lambda one: (context.num_busy(one), context.tie_break(one)))
        if chosen is not None:
            return able[chosen]
    return None


def choose_replica(
    decodes: Iterable[WorkerReport],
    holders: Collection[str],
    num_bytes: int,
    running: int,
    replicate_after: int,
    context: PlacementContext,
) -> str | None:
    """Another worker for a hot prefix: `running` turns at its least busy holder have reached `replicate_after` (0: never).

    Only one where it fits beside everything else: a replica evicts nothing. None if it is not hot or nobody can.
    """
    if not replicate_after or running < replicate_after:
        return None
    others = [one for one in decodes if one.worker not in holders and one.load.free_bytes >= num_bytes]
    others = [one for one in others if one.worker not in context.cooling_down]
    return choose_decode(others, num_bytes, context)


def _least(workers: Collection[WorkerReport], rank: Callable[[WorkerReport], tuple[float, ...]]) -> str | None:
    return min(workers, key=rank).worker if workers else None
