"""Scenes of the demo world: things that come, stay, move and go, words, and a key, in steps of one second each.

In every step each of the four places of the frame holds a thing, a word or nothing. No two things of a scene have both colour and
shape in common, and within a step none have either, so "the star at step 5" and "the red star" are unambiguous. Scenes have
any number of steps; the longer they are, the more they hold.

The bundled checkpoint does not know this world yet: it was trained on that of `world.py`, which goes when one that knows is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from sparsevila_cluster.demo.drawing import COLORS, PLACES, SHAPES

# Seeds of each use are drawn from a stream of its own, and its backgrounds and words are seen nowhere else.
STREAMS = {"training": 11, "validation": 12, "held out a": 13, "held out b": 14, "held out c": 15, "demo": 16}
KEY = "key"
MARKS = ("dot", "bar")
MAX_STEPS = 64
# The share of (colour, shape) pairs that a scene uses at most: what is left makes questions about what is not there.
MOST_PAIRS = 0.75
DURATION_ODDS = (0.55, 0.25, 0.12, 0.08)  # of 1 to 4 steps
MOVES_ODDS, MARKED_ODDS, KEY_ODDS = 0.5, 0.5, 0.6
THINGS_PER_STEP = (0.7, 1.1)
STEPS_PER_WORD = 6
CONSONANTS, VOWELS = "BDFGHKLMNPRSTVZ", "AEIOU"


@dataclass(frozen=True)
class Thing:
    """A coloured shape. mark: what is drawn on it, one of MARKS or ""."""

    color: str
    shape: str
    mark: str = ""

    @property
    def name(self) -> str:
        """Behind "the"."""
        return self.shape if self.shape == KEY else f"{self.color} {self.shape}"

    @property
    def phrase(self) -> str:
        """As answers name it."""
        return f"{article(self.name)} {self.name}"


@dataclass(frozen=True)
class Stay:
    """A thing, or a word in capitals, from step `begin` on for as many steps as it has places; one per step."""

    what: Thing | str
    begin: int
    places: tuple[str, ...]

    @property
    def end(self) -> int:
        """The first step without it."""
        return self.begin + len(self.places)

    @property
    def moves(self) -> bool:
        """Whether it is somewhere else in the end."""
        return self.places[0] != self.places[-1]

    def place_at(self, step: int) -> str:
        """Where it is then."""
        return self.places[step - self.begin]


@dataclass(frozen=True)
class Scene:
    """All that a video shows, in the order in which it comes."""

    num_steps: int
    stays: tuple[Stay, ...]

    def at(self, step: int) -> list[Stay]:
        """What there is at a step, in reading order."""
        there = [stay for stay in self.stays if stay.begin <= step < stay.end]
        return sorted(there, key=lambda stay: PLACES.index(stay.place_at(step)))

    def things_at(self, step: int) -> list[tuple[Stay, Thing]]:
        """What is no word of it."""
        return [(stay, stay.what) for stay in self.at(step) if isinstance(stay.what, Thing)]

    def things(self) -> Iterator[tuple[Stay, Thing]]:
        """All of the video."""
        return ((stay, stay.what) for stay in self.stays if isinstance(stay.what, Thing))

    def words(self) -> Iterator[tuple[Stay, str]]:
        """All of the video."""
        return ((stay, stay.what) for stay in self.stays if isinstance(stay.what, str))


def article(name: str) -> str:
    """The indefinite one."""
    return "an" if name[0] in "aeiou" else "a"


def make_scene(rng: np.random.Generator, num_steps: int, words: tuple[str, ...]) -> Scene:
    """A random scene that holds at least one thing; `words`: those that may be written in it.

    Raises:
        ValueError: `num_steps` is not in 1..64.
    """
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_steps must be in [1, {MAX_STEPS}], got {num_steps}")
    builder = _SceneBuilder(rng, num_steps)
    pairs = list(product(COLORS, SHAPES))
    rng.shuffle(pairs)
    num_things = max(1, round(num_steps * rng.uniform(*THINGS_PER_STEP)))
    if rng.random() < KEY_ODDS:
        builder.add(Thing("yellow", KEY), 1)
    for color, shape in pairs[: min(num_things, int(MOST_PAIRS * len(pairs)))]:
        mark = MARKS[rng.integers(len(MARKS))] if rng.random() < MARKED_ODDS else ""
        builder.add(Thing(str(color), str(shape), mark), 1 + int(rng.choice(len(DURATION_ODDS), p=DURATION_ODDS)))
    num_words = int(rng.integers(0, num_steps // STEPS_PER_WORD + 2))
    for word in rng.choice(words, min(num_words, len(words)), replace=False):
        builder.add(str(word), 1 + int(rng.integers(2)))
    scene = Scene(num_steps, tuple(sorted(builder.stays, key=lambda stay: (stay.begin, PLACES.index(stay.places[0])))))
    return scene if next(scene.things(), None) else make_scene(rng, num_steps, words)


class _SceneBuilder:
    """Puts things where there is room for them; what finds none after some tries is left out."""

    TRIES = 12

    def __init__(self, rng: np.random.Generator, num_steps: int):
        self._rng, self._num_steps = rng, num_steps
        self.stays: list[Stay] = []
        self._taken: list[set[str]] = [set() for _ in range(num_steps)]

    def add(self, what: Thing | str, duration: int) -> None:
        for _ in range(self.TRIES):
            length = min(duration, self._num_steps)
            begin = int(self._rng.integers(self._num_steps - length + 1))
            steps = self._taken[begin : begin + length]
            alike = {what.color, what.shape} if isinstance(what, Thing) else set()
            if any(alike & taken for taken in steps):
                continue
            places = self._route(steps, isinstance(what, Thing) and self._rng.random() < MOVES_ODDS)
            if places is None:
                continue
            for taken, place in zip(steps, places, strict=True):
                taken |= alike | {place}
            self.stays.append(Stay(what, begin, places))
            return

    def _route(self, steps: list[set[str]], moves: bool) -> tuple[str, ...] | None:
        """A place for each step: the same, or another one from some step on."""
        order = [PLACES[i] for i in self._rng.permutation(len(PLACES))]
        turn = int(self._rng.integers(1, len(steps))) if moves and len(steps) > 1 else len(steps)
        first = next((place for place in order if all(place not in taken for taken in steps[:turn])), None)
        then = next((place for place in order if place != first and all(place not in taken for taken in steps[turn:])), None)
        if first is None or then is None:
            return None
        return (first,) * turn + (then,) * (len(steps) - turn)


def make_words(stream: str) -> tuple[str, ...]:
    """Words of three or four letters that videos of a stream show. Training, validation and held-out streams share none."""
    every = ["".join(parts) for parts in product(CONSONANTS, VOWELS, CONSONANTS)]
    every += [f"{word}{vowel}" for word in every[::3] for vowel in VOWELS[:2]]
    order = np.random.default_rng(5).permutation(len(every))
    uses = ("training", "validation", "held out")
    use = uses.index(stream if stream in uses else "held out")
    # Two thirds are for training.
    share = (slice(0, 2 * len(every) // 3), slice(2 * len(every) // 3, 5 * len(every) // 6), slice(5 * len(every) // 6, None))[use]
    return tuple(every[i] for i in order[share])
