"""The small world that the demo checkpoint lives in: scenes of coloured glyphs, and questions about them.

A video is a sequence of steps of one second each. In every step 0, 1 or 2 glyphs lie on a textured, noisy,
panning background; no (colour, shape) pair occurs twice in a video, so "the red circle" is unambiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsevila_cluster.demo.drawing import COLORS, FPS, PLACES, SHAPES, Glyph, WorldScene, render, write_mp4

__all__ = [
    "COLORS",
    "FPS",
    "KINDS",
    "NUM_STEPS",
    "PLACES",
    "SHAPES",
    "Glyph",
    "Question",
    "WorldScene",
    "make_questions",
    "make_scene",
    "make_video",
    "render",
    "write_mp4",
]

NUM_STEPS = 8
NUM_GLYPHS_ODDS = (0.15, 0.50, 0.35)  # of 0, 1 and 2 glyphs in a step

# Seeds of training and of held-out videos are drawn from two streams that never meet.
TRAINING_STREAM, HELD_OUT_STREAM = 1, 2


@dataclass(frozen=True)
class Question:
    """A question about a scene, and its true answer."""

    kind: str
    text: str
    answer: str
    step: int  # index into WorldScene.steps; people say step + 1
    targets: tuple[Glyph, ...]  # the glyphs that one must have seen to answer; empty for "nothing" and "0"


def draw_step(rng: np.random.Generator, taken: set[tuple[str, str]]) -> tuple[Glyph, ...]:
    """One step's glyphs, in reading order, all colours and shapes distinct; adds what it uses to `taken`."""
    num = int(rng.choice(len(NUM_GLYPHS_ODDS), p=NUM_GLYPHS_ODDS))
    glyphs: list[Glyph] = []
    for place in sorted(rng.permutation(len(PLACES))[:num]):
        while True:
            color, shape = COLORS[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))]
            alike = any(glyph.color == color or glyph.shape == shape for glyph in glyphs)
            if not alike and (color, shape) not in taken:
                break
        taken.add((color, shape))
        glyphs.append(Glyph(color, shape, PLACES[place]))
    return tuple(glyphs)


def make_scene(rng: np.random.Generator, num_steps: int = NUM_STEPS) -> WorldScene:
    """A random scene with at least one glyph."""
    while True:
        taken: set[tuple[str, str]] = set()
        scene = WorldScene(tuple(draw_step(rng, taken) for _ in range(num_steps)))
        if any(scene.steps):
            return scene


def make_video(seed: int, *, held_out: bool = True, num_steps: int = NUM_STEPS) -> tuple[WorldScene, np.ndarray]:
    """Scene and frames of one seed. Held-out videos share neither random numbers nor backgrounds with training."""
    rng = np.random.default_rng((HELD_OUT_STREAM if held_out else TRAINING_STREAM, seed))
    scene = make_scene(rng, num_steps)
    return scene, render(scene, rng, held_out=held_out)


# What a maker of questions returns for a step and its glyphs: (text, answer, targets), or None where it has nothing to ask.
Drawn = tuple[str, str, tuple[Glyph, ...]] | None


def _a_glyph(glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Glyph | None:
    return glyphs[rng.integers(len(glyphs))] if glyphs else None


def _color(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    if (glyph := _a_glyph(glyphs, rng)) is None:
        return None
    spelling = "color" if rng.random() < 0.5 else "colour"
    return f"What {spelling} is the {glyph.shape} at step {step + 1}?", glyph.color, (glyph,)


def _shape(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    if (glyph := _a_glyph(glyphs, rng)) is None:
        return None
    return f"Which shape is {glyph.color} at step {step + 1}?", glyph.shape, (glyph,)


def _when(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    if (glyph := _a_glyph(glyphs, rng)) is None:
        return None
    return f"When does the {glyph.color} {glyph.shape} appear?", f"at step {step + 1}", (glyph,)


def _where(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    if (glyph := _a_glyph(glyphs, rng)) is None:
        return None
    return f"Where is the {glyph.color} {glyph.shape}?", f"at the {glyph.place}", (glyph,)


def _count(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    return f"How many shapes are at step {step + 1}?", str(len(glyphs)), glyphs


def _at(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    glyph = _a_glyph(glyphs, rng)
    # Half of the questions about a place would be answered by "nothing" if the place were drawn blindly.
    place = glyph.place if glyph is not None and rng.random() < 0.8 else PLACES[rng.integers(len(PLACES))]
    found = next((other for other in glyphs if other.place == place), None)
    text = f"What is at the {place} at step {step + 1}?"
    return (text, "nothing", ()) if found is None else (text, found.phrase, (found,))


def _describe(step: int, glyphs: tuple[Glyph, ...], rng: np.random.Generator) -> Drawn:
    answer = " and ".join(f"{glyph.phrase} at the {glyph.place}" for glyph in glyphs)
    return f"Describe step {step + 1}.", answer or "nothing", glyphs


MAKERS: dict[str, Callable[[int, tuple[Glyph, ...], np.random.Generator], Drawn]] = {
    "color": _color,
    "shape": _shape,
    "when": _when,
    "where": _where,
    "count": _count,
    "at": _at,
    "describe": _describe,
}
KINDS = tuple(MAKERS)


def make_questions(
    scene: WorldScene,
    rng: np.random.Generator,
    num: int,
    kinds: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
) -> list[Question]:
    """Up to `num` different questions in random order; fewer only where the scene has no more to ask.

    `steps` limits the questions to some steps: the curriculum shows parts of a scene.
    """
    kinds, steps = tuple(kinds or KINDS), tuple(steps if steps is not None else range(len(scene.steps)))
    questions: dict[tuple[str, str], Question] = {}
    for _ in range(40 * num):
        kind, step = kinds[rng.integers(len(kinds))], steps[rng.integers(len(steps))]
        asked = MAKERS[kind](step, scene.steps[step], rng)
        if asked is None:
            continue
        text, answer, targets = asked
        questions.setdefault((kind, text.replace("colour", "color")), Question(kind, text, answer, step, targets))
        if len(questions) == num:
            break
    return list(questions.values())
