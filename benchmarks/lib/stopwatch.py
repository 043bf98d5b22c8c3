"""Times of things that take turns: A B C, A B C, so that a slow minute of the machine meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field


@dataclass
class Times:
    """Samples of one thing, in milliseconds."""

    samples_ms: list[float] = field(default_factory=list)

    def add(self, ms: float) -> None:
        self.samples_ms.append(ms)

    @property
    def num(self) -> int:
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def best_ms(self) -> float:
        return min(self.samples_ms)

    @property
    def spread(self) -> float:
        """Distance of the quartiles, as a share of the median; of the extremes where there are fewer than four samples."""
        if self.num < 4:
            return (max(self.samples_ms) - self.best_ms) / self.median_ms
        low, _, high = statistics.quantiles(self.samples_ms, n=4)
        return (high - low) / self.median_ms


@dataclass(frozen=True)
class Repeats:
    """How often to repeat: at least `least` rounds and at most `most`, no further one that would end after `budget_s` seconds. A
    round of more than half the budget is the only one.
    """

    least: int = 3
    most: int = 7
    budget_s: float = 30.0

    def rounds(self) -> Iterator[int]:
        start_s = time.perf_counter()
        for number in range(self.most):
            spent_s = time.perf_counter() - start_s
            if number:
                each_s = spent_s / number
                if each_s > self.budget_s / 2 or (number >= self.least and spent_s + each_s > self.budget_s):
                    return
            yield number


def once_ms(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def in_turns(works: Mapping[str, Callable[[], object]], repeats: Repeats) -> dict[str, Times]:
    """Time each of `works` once per round, after one round that does not count."""
    times = {name: Times() for name in works}
    for work in works.values():
        work()
    for _ in repeats.rounds():
        for name, work in works.items():
            times[name].add(once_ms(work))
    return times
