"""What the text model is shown, and in which order: short windows first, whole videos last.

A lesson ends when as many answers about validation videos are right as it asks for, or after its last update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsevila_cluster.demo.checkpoint_builder import TOKENS_PER_STEP

# A batch has about as many rows whatever the length of its windows.
ROWS, MOST_ITEMS, MOST_SILENT, ROWS_PER_TURN = 3600, 12, 48, 24


class Showing(NamedTuple):
    """How a batch is shown. num_turns 0: visual tokens alone. retrieve_keep: of the kept tokens, what answers see; 1.0: all."""

    num_steps: int
    num_per_step: int
    num_turns: int
    apart: bool = False
    retrieve_keep: float = 1.0

    @property
    def num_items(self) -> int:
        """Videos of a batch."""
        most = MOST_ITEMS if self.num_turns else MOST_SILENT
        return min(most, max(1, ROWS // (self.num_steps * self.num_per_step + ROWS_PER_TURN * self.num_turns)))


@dataclass(frozen=True)
class Lesson:
    """Batches of one kind. Lengths, tokens kept per step and turns are drawn, each as likely as it is named."""

    name: str
    num_steps: tuple[int, ...]
    updates: int
    advance_at: float  # per cent; over 100: only the number of updates ends it
    kept: tuple[int, ...]
    turns: tuple[int, ...] = (10,)
    apart_odds: float = 0.0  # of turns that do not see each other, the easiest form
    retrieve_odds: float = 0.0
    retrieve_keeps: tuple[float, ...] = (0.05, 0.1, 0.1, 0.2)
    rates: tuple[float, float] = (1.0, 1.0)  # shares of the learning rate, at its first update and at its last

    def draw(self, rng: np.random.Generator, *, dense: bool = False) -> Showing:
        """dense: nothing is ever dropped, whatever the lesson says."""
        num_steps, turns = int(rng.choice(self.num_steps)), int(rng.choice(self.turns))
        kept, retrieve_keep = int(rng.choice(self.kept)), float(rng.choice(self.retrieve_keeps))
        apart, retrieves = rng.random() < self.apart_odds, rng.random() < self.retrieve_odds
        if dense:
            return Showing(num_steps, TOKENS_PER_STEP, turns, apart)
        return Showing(num_steps, kept, turns, apart, retrieve_keep if retrieves and not apart else 1.0)

    def rate(self, count: int) -> float:
        """Share of the learning rate after `count` updates of this lesson."""
        first, last = self.rates
        return first + (last - first) * count / self.updates

    @property
    def examined(self) -> Showing:
        """What the model is examined on while it learns this."""
        return Showing(max(self.num_steps), 10, 18 if max(self.turns) else 0, self.apart_odds >= 0.5)


FEW = (6, 8, 10, 12, 20)
MIXED = (*FEW, 16, 16, TOKENS_PER_STEP, TOKENS_PER_STEP)
# Visual tokens first learn what questions look up, at a fifth of an update's price. Then short windows are for finding anything at
# all: eight steps at once took longer than two steps and then eight.
LESSONS = (
    Lesson("what there is", (4,), 300, 90, FEW, (0,)),
    Lesson("what there was", (8, 16, 32, 64), 500, 90, FEW, (0,)),
    Lesson("two steps", (2,), 700, 85, FEW, apart_odds=1.0),
    Lesson("eight steps", (2, 4, 8), 500, 85, (*FEW, TOKENS_PER_STEP), (10, 16), apart_odds=0.4, rates=(1.0, 0.9)),
    Lesson("sixteen steps", (4, 8, 16), 400, 88, MIXED, (10, 20), rates=(0.9, 0.8)),
    Lesson("thirty-two steps", (4, 8, 16, 32), 400, 90, MIXED, (10, 20, 30), rates=(0.8, 0.7)),
    Lesson("sixty-four steps", (4, 8, 16, 32, 64, 64), 500, 92, MIXED, (10, 20, 30), rates=(0.7, 0.6)),
    Lesson("all lengths", (2, 4, 8, 16, 32, 64, 64), 2000, 101, MIXED, (10, 20, 30), retrieve_odds=0.3, rates=(0.6, 0.01)),
)
