"""Who does it: decisions over what workers reported, without asking anybody.

Knows: loads, budgets in bytes, and who failed just now. Does not know: media, turns, time (it is handed in), or how workers are
reached.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsevila_cluster.cluster.messages import WorkerReport

FIRST_COOLING_S = 0.5
LONGEST_COOLING_S = 30.0


@dataclass
class CircuitBreaker:
    """Workers that failed just now are avoided for a while, which doubles with every failure until one call succeeds."""

    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)

    def failed(self, worker: str, now_s: float) -> None:
        """`worker` did not do what it was asked. Failures while it cools count once: they are of one event."""
        num, until_s = self._failures.get(worker, (0, 0.0))
        if until_s <= now_s:
            num, until_s = num + 1, now_s + min(LONGEST_COOLING_S, FIRST_COOLING_S * 2.0**num)
            self._failures[worker] = num, until_s

    def succeeded(self, worker: str) -> None:
        self._failures.pop(worker, None)

    def cooling(self, now_s: float) -> set[str]:
        """Workers to avoid now."""
        return {worker for worker, (_, until_s) in self._failures.items() if until_s > now_s}

    def forget(self, present: Collection[str], now_s: float) -> None:
        """Drop what is known of workers that are neither present nor cooling: names come and go with replicas."""
        self._failures = {w: f for w, f in self._failures.items() if w in present or f[1] > now_s}


@dataclass(frozen=True)
class PlacementContext:
    """What one decision may use beside the reports.

    under_way: what this router has running at each worker, which reports show only later. cooling: avoided as long as somebody
    else can do it. tried: out of the question, because they failed this very request. about: what is placed; it decides among
    equals, so that routers which know the same send one thing to one worker, and different things to different ones.
    """

    under_way: Mapping[str, int] = field(default_factory=dict)
    cooling: Collection[str] = frozenset()
    tried: Collection[str] = frozenset()
    about: str = ""

    def open_to(self, workers: Iterable[WorkerReport]) -> list[WorkerReport]:
        """Who may be asked at all, without those who cool unless nobody else is left."""
        untried = [one for one in workers if one.worker not in self.tried]
        return [one for one in untried if one.worker not in self.cooling] or untried

    def busy(self, one: WorkerReport) -> int:
        """Work at a worker. A report is older than what this router sent since, and knows more of other routers."""
        return max(one.load.num_running + one.load.num_waiting, self.under_way.get(one.worker, 0))

    def tie(self, one: WorkerReport) -> int:
        """A rank among equals that has nothing to do with their names' order."""
        return zlib.crc32(f"{self.about}/{one.worker}".encode())


def choose_prefill(workers: Iterable[WorkerReport], scene: PlacementContext) -> str | None:
    """Who makes a media prefix: the least busy. None if nobody may."""
    return _least(scene.open_to(workers), lambda one: (scene.busy(one), scene.tie(one)))


def choose_decode(workers: Iterable[WorkerReport], num_bytes: int | None, scene: PlacementContext) -> str | None:
    """Where a prefix of `num_bytes` (None: not known yet) goes: where it evicts nothing, then the least busy, then the emptiest.

    Workers whose whole budget is smaller never qualify. None if nobody may take it.
    """
    need = num_bytes or 0
    able = [one for one in workers if one.load.prefix_budget_bytes >= need]
    return _least(
        scene.open_to(able), lambda one: (one.load.free_bytes < need, scene.busy(one), -one.load.free_bytes, scene.tie(one))
    )


def choose_holder(holders: Iterable[WorkerReport], scene: PlacementContext) -> str | None:
    """Which holder of a prefix takes a new conversation: the least busy, then the one with most room for its text."""
    return _least(
        scene.open_to(holders),
        lambda one: (scene.busy(one), one.load.turn_bytes - one.load.turn_budget_bytes, scene.tie(one)),
    )


def choose_source(
    copies: Iterable[WorkerReport], holders: Iterable[WorkerReport], scene: PlacementContext, target: str | None = None
) -> WorkerReport | None:
    """Who ships a prefix that exists to `target`: a host copy rather than a decode worker, which has turns to run."""
    for workers in (copies, holders):
        able = {one.worker: one for one in workers if one.worker != target}
        chosen = _least(scene.open_to(able.values()), lambda one: (scene.busy(one), scene.tie(one)))
        if chosen is not None:
            return able[chosen]
    return None


def choose_replica(
    decodes: Iterable[WorkerReport],
    holders: Collection[str],
    num_bytes: int,
    running: int,
    replicate_after: int,
    scene: PlacementContext,
) -> str | None:
    """Another worker for a hot prefix: `running` turns at its least busy holder have reached `replicate_after` (0: never).

    Only one where it fits beside everything else: a replica is a comfort and evicts nothing. None if it is not hot or nobody can.
    """
    if not replicate_after or running < replicate_after:
        return None
    others = [one for one in decodes if one.worker not in holders and one.load.free_bytes >= num_bytes]
    others = [one for one in others if one.worker not in scene.cooling]
    return choose_decode(others, num_bytes, scene)


def _least(workers: Collection[WorkerReport], rank: Callable[[WorkerReport], Any]) -> str | None:
    return min(workers, key=rank).worker if workers else None
