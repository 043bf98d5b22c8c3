"""Marks of answers, and what follows from them: shares with intervals, by any property, and whether two settings differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# Answers by their words, videos by their seconds, turns by their number counted from 1: where each class begins.
ANSWER_WORDS = (1, 2, 5, 12, 30)
VIDEO_S = (0, 12, 24, 48, 120, 600, 3600)
TURNS = (1, 2, 4, 9, 21, 30)


@dataclass(frozen=True)
class Mark:
    """One answer of one dialogue. turn: 0 for the first question; ms: of the prefix where it was made for this, and of the turn.

    source: the range of videos; kv_bytes: of the prefix; kept, retrieved: visual tokens, of `visual` in the video.
    """

    dialogue: int
    turn: int
    kind: str
    right: bool
    said: str
    expected: str
    group: str = ""
    source: str = ""
    video_s: float = 0.0
    kv_bytes: int = 0
    visual: int = 0
    kept: int = 0
    retrieved: int = 0
    prefill_ms: float | None = None
    question_ms: float | None = None
    step_ms: float | None = None

    @property
    def num_words(self) -> int:
        """Of the right answer."""
        return len(self.expected.split())


@dataclass(frozen=True)
class Score:
    """How many of how many are right."""

    right: int
    total: int

    @classmethod
    def of(cls, marks: Iterable[Mark]) -> Score:
        """Marks of one group count as one, which is right if all of them are."""
        alone, groups = list[bool](), dict[str, bool]()
        for mark in marks:
            if mark.group:
                groups[mark.group] = groups.get(mark.group, True) and mark.right
            else:
                alone.append(mark.right)
        return cls(sum(alone) + sum(groups.values()), len(alone) + len(groups))

    @property
    def percent(self) -> float:
        """NaN of none."""
        return 100.0 * self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in per cent."""
        if not self.total:
            return 0.0, 100.0
        z, n, p = 1.959964, self.total, self.right / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f} ({low:.1f}-{high:.1f})"


def scores_by(marks: Iterable[Mark], key: Callable[[Mark], str]) -> dict[str, Score]:
    """Scores of the marks that have a key in common, in the order in which keys come."""
    found: dict[str, list[Mark]] = {}
    for mark in marks:
        found.setdefault(key(mark), []).append(mark)
    return {name: Score.of(some) for name, some in found.items()}


def classes(values: Sequence[float], begins: Sequence[float], unit: str) -> Callable[[float], str]:
    """Names classes of numbers by where they begin; those that hold none of `values` are joined to the next lower one."""
    used = [low for i, low in enumerate(begins) if i == 0 or any(low <= v < _next(begins, i) for v in values)]

    def name(value: float) -> str:
        low = max(low for low in used if low <= value or low == used[0])
        high = min((each for each in used if each > low), default=math.inf)
        if high == math.inf:
            return f"{unit} {low:g}+"
        is_whole = unit != "seconds"
        last = high - 1 if is_whole else high
        return f"{unit} {low:g}" if is_whole and last == low else f"{unit} {low:g}-{last:g}"

    return name


def _next(begins: Sequence[float], i: int) -> float:
    return begins[i + 1] if i + 1 < len(begins) else math.inf


def by_class(marks: Sequence[Mark], value: Callable[[Mark], float], begins: Sequence[float], unit: str) -> dict[str, Score]:
    """Scores by classes of a number of each mark, lowest first."""
    name = classes([value(mark) for mark in marks], begins, unit)
    return scores_by(sorted(marks, key=value), lambda mark: name(value(mark)))


def changed(before: Sequence[Mark], after: Sequence[Mark]) -> tuple[int, int]:
    """Answers that were right before and are wrong after, and the other way round; both are of the same questions."""
    pairs = list(zip(before, after, strict=True))
    assert all((a.dialogue, a.turn) == (b.dialogue, b.turn) for a, b in pairs)
    return sum(a.right and not b.right for a, b in pairs), sum(b.right and not a.right for a, b in pairs)


def mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: how probable a difference at least this large is if two settings are equally good; two-sided."""
    num, least = lost + won, min(lost, won)
    if not num:
        return 1.0
    log_half = num * math.log(2)
    tail = sum(math.exp(math.lgamma(num + 1) - math.lgamma(i + 1) - math.lgamma(num - i + 1) - log_half) for i in range(least + 1))
    return min(1.0, 2 * tail)


def worst_gap(dense: Sequence[Mark], marks: Sequence[Mark], at_least: int = 100) -> tuple[str, float] | None:
    """(The kind that loses most against dense, by how many points), of kinds with `at_least` questions; None if there is none."""
    before, after = (scores_by(some, lambda mark: mark.kind) for some in (dense, marks))
    gaps = {kind: score.percent - after[kind].percent for kind, score in before.items() if score.total >= at_least}
    return max(gaps.items(), key=lambda item: item[1]) if gaps else None
