"""Questions about scenes in whole sentences, none of which names a step: a LLaVA-OneVision prompt has no times in it.

one thing    color, where, mark, moves
several      exists, beside, before, after, total
the video    read, listing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sparsevila_cluster.demo.drawing import COLORS, SHAPES
from sparsevila_cluster.demo.questions import SceneQuestion, named, neighbour
from sparsevila_cluster.demo.scenes import KEY, Scene, Stay, Thing, article

Said = tuple[str, str] | None
MOST_LISTED = 10
TRIES = 40


def _first_upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _things(scene: Scene) -> list[tuple[Stay, Thing]]:
    return [(stay, thing) for stay, thing in scene.things() if thing.shape != KEY]


def _one(found: Sequence[tuple[Stay, Thing]], rng: np.random.Generator) -> tuple[Stay, Thing] | None:
    return found[int(rng.integers(len(found)))] if found else None


def _color(scene: Scene, rng: np.random.Generator) -> Said:
    things = _things(scene)
    shapes = [thing.shape for _, thing in things]
    if (found := _one([(stay, thing) for stay, thing in things if shapes.count(thing.shape) == 1], rng)) is None:
        return None
    spelling = "color" if rng.random() < 0.5 else "colour"
    return f"What {spelling} is the {found[1].shape}?", f"The {found[1].shape} is {found[1].color}."


def _where(scene: Scene, rng: np.random.Generator) -> Said:
    if (found := _one([(stay, thing) for stay, thing in _things(scene) if len(set(stay.places)) == 1], rng)) is None:
        return None
    return f"Where is the {found[1].name}?", f"The {found[1].name} is at the {found[0].places[0]}."


def _mark(scene: Scene, rng: np.random.Generator) -> Said:
    if (found := _one(_things(scene), rng)) is None:
        return None
    thing = found[1]
    what = f"{article(thing.mark)} {thing.mark}" if thing.mark else "nothing"
    return f"What is drawn on the {thing.name}?", f"There is {what} on the {thing.name}."


def _moves(scene: Scene, rng: np.random.Generator) -> Said:
    if (found := _one([(stay, thing) for stay, thing in _things(scene) if stay.moves], rng)) is None:
        return None
    stay, thing = found
    return f"Where does the {thing.name} move?", f"It moves from the {stay.places[0]} to the {stay.places[-1]}."


def _exists(scene: Scene, rng: np.random.Generator) -> Said:
    things = [thing for _, thing in _things(scene)]
    if not things:
        return None
    if rng.random() < 0.5:
        thing = things[int(rng.integers(len(things)))]
        return f"Is there {thing.phrase} in the video?", f"Yes, there is {thing.phrase}."
    pairs = {(thing.color, thing.shape) for thing in things}
    # Half of those that are not there have a colour and a shape that are, in other things.
    near = {(a, b) for a, _ in pairs for _, b in pairs} if rng.random() < 0.5 else {(a, b) for a in COLORS for b in SHAPES}
    if not (absent := sorted(near - pairs)):
        return None
    thing = Thing(*absent[int(rng.integers(len(absent)))])
    return f"Is there {thing.phrase} in the video?", f"No, there is no {thing.name}."


def _beside(scene: Scene, rng: np.random.Generator) -> Said:
    keys = [stay for stay, thing in scene.things() if thing.shape == KEY]
    if not keys or not (beside := [stay for stay in scene.at(keys[0].begin) if stay is not keys[0]]):
        return None
    what = " and ".join(named(stay) for stay in beside)
    return f"What is in the picture together with the {KEY}?", f"Together with the {KEY} there is {what}."


def _before(scene: Scene, rng: np.random.Generator) -> Said:
    if (found := neighbour(scene, rng, -1)) is None:
        return None
    thing, _, other = found
    return f"Which shape appeared last before the {thing.name}?", f"{_first_upper(named(other))} appeared before the {thing.name}."


def _after(scene: Scene, rng: np.random.Generator) -> Said:
    if (found := neighbour(scene, rng, 1)) is None:
        return None
    thing, _, other = found
    return f"Which shape appears next after the {thing.name}?", f"{_first_upper(named(other))} appears after the {thing.name}."


def _total(scene: Scene, rng: np.random.Generator) -> Said:
    if (found := _one(_things(scene), rng)) is None:
        return None
    color = found[1].color
    num = sum(thing.color == color for _, thing in scene.things())
    said = f"There is 1 {color} shape." if num == 1 else f"There are {num} {color} shapes."
    return f"How many different {color} shapes appear in the video?", said


def _read(scene: Scene, rng: np.random.Generator) -> Said:
    words = [word for _, word in scene.words()]
    return ("Which word is written in the video?", f"The word is {words[0]}.") if len(words) == 1 else None


def _listing(scene: Scene, rng: np.random.Generator) -> Said:
    if not 2 <= len(scene.stays) <= MOST_LISTED:
        return None
    parts = [f"{named(stay)} at the {stay.places[0]}" for stay in scene.stays]
    return "Describe everything in the order in which it appears.", f"First there is {', then '.join(parts)}."


MAKERS: dict[str, Callable[[Scene, np.random.Generator], Said]] = {
    "color": _color,
    "where": _where,
    "mark": _mark,
    "moves": _moves,
    "exists": _exists,
    "beside": _beside,
    "before": _before,
    "after": _after,
    "total": _total,
    "read": _read,
    "listing": _listing,
}
SENTENCE_KINDS = tuple(MAKERS)


def make_sentences(scene: Scene, rng: np.random.Generator, num: int, kinds: Sequence[str] = SENTENCE_KINDS) -> list[SceneQuestion]:
    """Up to `num` different questions in random order, each kind as likely; fewer only where the scene has no more to ask."""
    asked: dict[str, SceneQuestion] = {}
    for _ in range(TRIES * num):
        kind = kinds[int(rng.integers(len(kinds)))]
        if (said := MAKERS[kind](scene, rng)) is not None:
            asked.setdefault(said[0].replace("colour", "color"), SceneQuestion(kind, *said))
        if len(asked) == num:
            break
    return list(asked.values())
