"""What clients of a server waited for, and how much of it was good enough: plain arithmetic over what they heard.

cold   a first question about media that nobody had prepared     TTFT counts from the start of PrepareMedia
warm   a first question about media that are there               TTFT counts from the start of PrepareMedia
later  every other question                                      TTFT counts from the question
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["cold", "warm", "later"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class TurnTimes:
    """One turn as its client heard it. tpot_ms: between two tokens, on average; None for an answer of one. error: what ended it."""

    kind: Kind
    ttft_ms: float = 0.0
    tpot_ms: float | None = None
    e2e_ms: float = 0.0
    token_ids: tuple[int, ...] = ()
    error: str = ""


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` per cent of the samples lie, linearly between the two nearest. Raises ValueError: none."""
    if not samples:
        raise ValueError("a percentile needs at least one sample")
    ranked = sorted(samples)
    place = (len(ranked) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)


def spread_of(samples: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p95; None where nothing was measured."""
    return (percentile(samples, 50), percentile(samples, 95)) if samples else (None, None)


@dataclass(frozen=True)
class Slo:
    """What a good turn keeps: milliseconds to its first token, by kind, and between tokens on average."""

    ttft_ms: dict[Kind, float]
    tpot_ms: float

    @classmethod
    def of(cls, turns: Sequence[TurnTimes], scale: float) -> Slo:
        """`scale` times the medians of these turns; a kind that is not among them is not limited."""
        done = [turn for turn in turns if not turn.error]
        ttfts = {kind: [turn.ttft_ms for turn in done if turn.kind == kind] for kind in KINDS}
        gaps = [turn.tpot_ms for turn in done if turn.tpot_ms is not None]
        return cls(
            {kind: scale * percentile(found, 50) for kind, found in ttfts.items() if found},
            scale * percentile(gaps, 50) if gaps else float("inf"),
        )

    def is_met(self, turn: TurnTimes) -> bool:
        """A turn that failed is not good."""
        in_time = turn.ttft_ms <= self.ttft_ms.get(turn.kind, float("inf"))
        return not turn.error and in_time and (turn.tpot_ms is None or turn.tpot_ms <= self.tpot_ms)


@dataclass(frozen=True)
class Run:
    """One load: its turns, and the seconds from its first start to its last end."""

    turns: tuple[TurnTimes, ...]
    elapsed_s: float

    @property
    def num_failed(self) -> int:
        return sum(bool(turn.error) for turn in self.turns)

    @property
    def tokens_per_s(self) -> float:
        return sum(len(turn.token_ids) for turn in self.turns) / self.elapsed_s

    def goodput(self, slo: Slo) -> float:
        """Good turns per second."""
        return sum(map(slo.is_met, self.turns)) / self.elapsed_s

    def times(self) -> dict[str, Any]:
        """p50 and p95 of every kind's TTFT, of TPOT and of whole turns, in ms; None where nothing was measured."""
        done = [turn for turn in self.turns if not turn.error]
        samples: dict[str, list[float]] = {f"ttft_{kind}": [t.ttft_ms for t in done if t.kind == kind] for kind in KINDS}
        samples["tpot"] = [turn.tpot_ms for turn in done if turn.tpot_ms is not None]
        samples["e2e"] = [turn.e2e_ms for turn in done]
        found: dict[str, Any] = {}
        for name, values in samples.items():
            p50, p95 = spread_of(values)
            found |= {f"{name}_p50_ms": rounded(p50), f"{name}_p95_ms": rounded(p95), f"{name}_samples": len(values)}
        return found


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def poisson(per_s: float, num: int, seed: int) -> list[float]:
    """When `num` clients arrive, in seconds, that come independently of one another at `per_s` on average. The first comes at 0.

    The same seed gives the same pattern at every rate, stretched.
    """
    rng = random.Random(seed)
    arrivals, now_s = [], 0.0
    for _ in range(num):
        arrivals.append(now_s)
        now_s += rng.expovariate(1.0) / per_s
    return arrivals


def paired_ms(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the differences of pairs that were measured one after the other."""
    return percentile([a - b for a, b in zip(ours, theirs, strict=True)], 50)
