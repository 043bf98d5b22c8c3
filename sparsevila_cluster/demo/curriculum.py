"""The order in which the text model learns: few steps first, all steps later, fewer visual tokens last.

A stage ends when the monitor's accuracy reaches `advance_at`, or when `until` (a share of the minutes meant for
text) has passed. Stages before the last are dense and shared; the last one is either `SPARSE_TAIL`, which teaches
the model to answer from fewer visual tokens, or `DENSE_TAIL`, for the twin that never saw a dropped token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Portion:
    """One way of showing a batch of videos, and how often it is chosen."""

    odds: float
    batch: int
    prune: Literal["none", "salient", "glyphs"] = "none"
    prune_keeps: tuple[float, ...] = (1.0,)  # one is drawn per batch
    retrieve_keeps: tuple[float, ...] = ()  # empty: answer rows see all that was kept

    @property
    def sparse(self) -> bool:
        """Whether any visual token is dropped or not retrieved."""
        return self.prune != "none" or bool(self.retrieve_keeps)


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum; `num_steps`: how many steps a video shows."""

    name: str
    num_steps: int
    until: float
    advance_at: float  # percent; over 100: only time ends the stage
    portions: tuple[Portion, ...]
    turns_apart: bool = False  # turns do not see each other: the easiest form, eight questions per video
    decay: bool = False  # learning rate falls to nearly zero over the stage


# Few steps are shown, but in any of the eight slots: all step numbers and positions are learned from the start.
SHARED = (
    Stage("pairs, turns apart", 2, 0.36, 93, (Portion(1, 16),), turns_apart=True),
    Stage("pairs", 2, 0.40, 94, (Portion(1, 16),)),
    Stage("fours", 4, 0.52, 94, (Portion(1, 12),)),
    Stage("eights", 8, 0.66, 95, (Portion(1, 10),)),
)
SPARSE_TAIL = Stage(
    "eights, dropped",
    8,
    1.0,
    101,
    (
        Portion(0.25, 10),
        Portion(0.25, 14, "salient", (0.15, 0.25, 0.25, 0.4)),
        Portion(0.20, 14, "glyphs", (0.05, 0.1, 0.15, 0.25, 0.35, 0.5)),
        Portion(0.25, 12, "salient", (0.15, 0.25, 0.25, 0.4), (0.05, 0.1, 0.1, 0.2)),
        Portion(0.05, 8, "none", (1.0,), (0.05, 0.1, 0.25)),
    ),
    decay=True,
)
DENSE_TAIL = Stage("eights, dense", 8, 1.0, 101, (Portion(1, 10),), decay=True)

# Now and then a shorter video comes along in every stage, so that lengths once learned stay learned.
SHORTER_ODDS = 0.12


def shorter(num_steps: int) -> tuple[int, ...]:
    """Lengths of videos that a stage of `num_steps` shows now and then."""
    return tuple(steps for steps in (1, 2, 4) if steps < num_steps)
