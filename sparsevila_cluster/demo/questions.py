"""Questions about scenes of the demo world, their true answers, and where one must have looked to know them.

one step       color, shape, count, at, describe, mark, beside, read
one thing      when, where, how_long, moves, before, after, exists
the video      total, written, listing
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsevila_cluster.demo.drawing import COLORS, PLACES, SHAPES
from sparsevila_cluster.demo.scenes import KEY, Scene, Stay, Thing, article

LISTING_STEPS = (3, 6)
LISTING_THINGS = 4  # at least, so that the answer is long
# A question about what is there is tried so often before the scene counts as exhausted.
TRIES = 40

Look = tuple[int, str]


@dataclass(frozen=True)
class SceneQuestion:
    """looks: (step, place) of what one must have seen, a group for each phrase of the answer; empty where nothing is there.

    via: what one must have found before, to know where to look.
    """

    kind: str
    text: str
    answer: str
    looks: tuple[tuple[Look, ...], ...] = ()
    via: tuple[Look, ...] = ()

    @property
    def targets(self) -> frozenset[Look]:
        """All of them."""
        return frozenset(look for group in (*self.looks, self.via) for look in group)


Looks = tuple[tuple[Look, ...], ...]
Drawn = tuple[str, str, Looks] | tuple[str, str, Looks, tuple[Look, ...]] | None
Maker = Callable[[Scene, np.random.Generator], Drawn]


def _any(rng: np.random.Generator, choices: Sequence[object]) -> int | None:
    return int(rng.integers(len(choices))) if choices else None


def _a_sight(scene: Scene, rng: np.random.Generator) -> tuple[int, Stay, Thing] | None:
    """A thing at a step; every step is as likely, and the key is not asked about as others are."""
    step = int(rng.integers(scene.num_steps))
    things = [(stay, thing) for stay, thing in scene.things_at(step) if thing.shape != KEY]
    if (i := _any(rng, things)) is None:
        return None
    return step, *things[i]


def _a_thing(scene: Scene, rng: np.random.Generator, *, key: bool = True) -> tuple[Stay, Thing] | None:
    things = [(stay, thing) for stay, thing in scene.things() if key or thing.shape != KEY]
    return None if (i := _any(rng, things)) is None else things[i]


def _seen(stay: Stay, step: int) -> tuple[Look, ...]:
    return ((step, stay.place_at(step)),)


def _at_step(step: int) -> str:
    return f"at step {step + 1}"


# ---- about one step ------------------------------------------------------------------------------------------------------------


def _color(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (sight := _a_sight(scene, rng)) is None:
        return None
    step, stay, thing = sight
    spelling = "color" if rng.random() < 0.5 else "colour"
    return f"What {spelling} is the {thing.shape} {_at_step(step)}?", thing.color, (_seen(stay, step),)


def _shape(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (sight := _a_sight(scene, rng)) is None:
        return None
    step, stay, thing = sight
    return f"Which shape is {thing.color} {_at_step(step)}?", thing.shape, (_seen(stay, step),)


def _mark(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (sight := _a_sight(scene, rng)) is None:
        return None
    step, stay, thing = sight
    answer = f"{article(thing.mark)} {thing.mark}" if thing.mark else "nothing"
    return f"What is drawn on the {thing.name} {_at_step(step)}?", answer, (_seen(stay, step),)


def _count(scene: Scene, rng: np.random.Generator) -> Drawn:
    step = int(rng.integers(scene.num_steps))
    things = scene.things_at(step)
    looks = tuple(look for stay, _ in things for look in _seen(stay, step))
    return f"How many shapes are there {_at_step(step)}?", str(len(things)), (looks,) if looks else ()


def _at(scene: Scene, rng: np.random.Generator) -> Drawn:
    step, sight = int(rng.integers(scene.num_steps)), _a_sight(scene, rng)
    # Most questions about a place would be answered by "nothing" if the place were drawn blindly.
    if sight is not None and rng.random() < 0.8:
        step, stay, _ = sight
        place = stay.place_at(step)
    else:
        place = PLACES[rng.integers(len(PLACES))]
    text = f"What is at the {place} {_at_step(step)}?"
    there = next((stay for stay in scene.at(step) if stay.place_at(step) == place), None)
    return (text, "nothing", ()) if there is None else (text, named(there), (_seen(there, step),))


def _describe(scene: Scene, rng: np.random.Generator) -> Drawn:
    step = int(rng.integers(scene.num_steps))
    answer, looks = _described(scene, step)
    return f"Describe step {step + 1}.", answer, looks


def _beside(scene: Scene, rng: np.random.Generator) -> Drawn:
    """The needle: something that is in one step only, and not in every video, is found before the answer can be."""
    keys = [stay for stay, thing in scene.things() if thing.shape == KEY]
    if not keys or not (beside := [stay for stay in scene.at(keys[0].begin) if stay is not keys[0]]):
        return None
    answer, step = " and ".join(named(stay) for stay in beside), keys[0].begin
    looks = tuple(_seen(stay, step) for stay in beside)
    return f"What is in the picture together with the {KEY}?", answer, looks, _seen(keys[0], step)


def _read(scene: Scene, rng: np.random.Generator) -> Drawn:
    words = list(scene.words())
    if (i := _any(rng, words)) is None:
        return None
    stay, word = words[i]
    step = int(rng.integers(stay.begin, stay.end))
    if sum(isinstance(other.what, str) for other in scene.at(step)) != 1:
        return None
    return f"Which word is written {_at_step(step)}?", word, (_seen(stay, step),)


def named(stay: Stay) -> str:
    """As answers name it."""
    return stay.what.phrase if isinstance(stay.what, Thing) else f"the word {stay.what}"


def _described(scene: Scene, step: int) -> tuple[str, tuple[tuple[Look, ...], ...]]:
    there = scene.at(step)
    answer = " and ".join(f"{named(stay)} at the {stay.place_at(step)}" for stay in there)
    return answer or "nothing", tuple(_seen(stay, step) for stay in there)


# ---- about one thing -----------------------------------------------------------------------------------------------------------


def _when(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (found := _a_thing(scene, rng)) is None:
        return None
    stay, thing = found
    return f"When does the {thing.name} appear?", _at_step(stay.begin), (_seen(stay, stay.begin),)


def _where(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Of a thing that does not move; of one that does, at a step."""
    if (found := _a_thing(scene, rng)) is None:
        return None
    stay, thing = found
    step = int(rng.integers(stay.begin, stay.end))
    moment = f" {_at_step(step)}" if stay.moves else ""
    return f"Where is the {thing.name}{moment}?", f"at the {stay.place_at(step)}", (_seen(stay, step),)


def _how_long(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (found := _a_thing(scene, rng, key=False)) is None:
        return None
    stay, thing = found
    num = len(stay.places)
    looks = tuple(look for step in range(stay.begin, stay.end) for look in _seen(stay, step))
    return f"For how many steps is the {thing.name} there?", f"for {num} step{'s' if num > 1 else ''}", (looks,)


def _moves(scene: Scene, rng: np.random.Generator) -> Drawn:
    moving = [(stay, thing) for stay, thing in scene.things() if stay.moves]
    if (i := _any(rng, moving)) is None:
        return None
    stay, thing = moving[i]
    looks = (_seen(stay, stay.begin), _seen(stay, stay.end - 1))
    answer = f"from the {stay.places[0]} to the {stay.places[-1]}"
    return f"Where does the {thing.name} move?", answer, looks


def neighbour(scene: Scene, rng: np.random.Generator, offset: int) -> tuple[Thing, Stay, Stay] | None:
    """A thing, its stay, and that of the thing that began just before or after it, where nothing else began with either."""
    things = list(scene.things())
    begins = [stay.begin for stay, _ in things]
    alone = [
        i for i in range(max(0, -offset), len(things) - max(0, offset))
        if begins.count(begins[i]) == begins.count(begins[i + offset]) == 1
    ]  # fmt: skip
    if (choice := _any(rng, alone)) is None:
        return None
    i = alone[choice]
    return things[i][1], things[i][0], things[i + offset][0]


def _before(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (found := neighbour(scene, rng, -1)) is None:
        return None
    thing, stay, other = found
    return (
        f"Which shape appeared last before the {thing.name}?",
        named(other),
        (_seen(other, other.begin),),
        _seen(stay, stay.begin),
    )


def _after(scene: Scene, rng: np.random.Generator) -> Drawn:
    if (found := neighbour(scene, rng, 1)) is None:
        return None
    thing, stay, other = found
    return f"Which shape appears next after the {thing.name}?", named(other), (_seen(other, other.begin),), _seen(stay, stay.begin)


def _exists(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Half of those that are not there have a colour and a shape that both are, in other things."""
    things = [(stay, thing) for stay, thing in scene.things() if thing.shape != KEY]
    if (i := _any(rng, things)) is None:
        return None
    stay, thing = things[i]
    if rng.random() < 0.5:
        return f"Is there {thing.phrase} in the video?", "yes", (_seen(stay, stay.begin),)
    pairs = {(other.color, other.shape) for _, other in things}
    if rng.random() < 0.5:
        absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in pairs]
    else:
        absent = sorted({(a, b) for a, _ in pairs for _, b in pairs} - pairs)
    if (j := _any(rng, absent)) is None:
        return None
    return f"Is there {Thing(*absent[j]).phrase} in the video?", "no", ()


# ---- about the video -----------------------------------------------------------------------------------------------------------


def _total(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Of a shape or a colour that is there, more often than not."""
    things = [(stay, thing) for stay, thing in scene.things() if thing.shape != KEY]
    if (i := _any(rng, things)) is None:
        return None
    by_color = rng.random() < 0.5
    name = things[i][1].color if by_color else things[i][1].shape
    if rng.random() < 0.2:
        names = COLORS if by_color else SHAPES
        name = names[rng.integers(len(names))]
    counted = [stay for stay, thing in scene.things() if name in (thing.color, thing.shape)]
    looks = tuple(look for stay in sorted(counted, key=lambda stay: stay.end) for look in _seen(stay, stay.end - 1))
    what = f"{name} shapes" if by_color else f"{name}{'es' if name.endswith('s') else 's'}"
    return f"How many different {what} appear in the video?", str(len(counted)), (looks,) if looks else ()


def _written(scene: Scene, rng: np.random.Generator) -> Drawn:
    words = list(scene.words())
    if (i := _any(rng, words)) is None:
        return None
    stay, word = words[i]
    return f"When is the word {word} shown?", _at_step(stay.begin), (_seen(stay, stay.begin),)


def _listing(scene: Scene, rng: np.random.Generator) -> Drawn:
    num = min(int(rng.integers(LISTING_STEPS[0], LISTING_STEPS[1] + 1)), scene.num_steps)
    first = int(rng.integers(scene.num_steps - num + 1))
    steps = range(first, first + num)
    if sum(len(scene.at(step)) for step in steps) < LISTING_THINGS:
        return None
    parts = [(step, *_described(scene, step)) for step in steps]
    answer = "; ".join(f"step {step + 1}: {said}" for step, said, _ in parts)
    looks = tuple(look for _, _, groups in parts for look in groups)
    return f"Describe everything from step {first + 1} to step {first + num} in order.", answer, looks


MAKERS: dict[str, Maker] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "at": _at,
    "describe": _describe,
    "mark": _mark,
    "beside": _beside,
    "read": _read,
    "when": _when,
    "where": _where,
    "how_long": _how_long,
    "moves": _moves,
    "before": _before,
    "after": _after,
    "exists": _exists,
    "total": _total,
    "written": _written,
    "listing": _listing,
}
KINDS = tuple(MAKERS)


def pick_questions(scene: Scene, rng: np.random.Generator, num: int) -> list[SceneQuestion]:
    """Up to `num` different questions in random order: of each kind that the scene can answer one, as far as there is room."""
    first = [one for kind in KINDS for one in make_questions(scene, rng, 1, (kind,))]
    known = {one.text for one in first}
    more = [one for one in make_questions(scene, rng, num + len(first)) if one.text not in known]
    first = [first[i] for i in rng.permutation(len(first))]
    picked = [*first, *more][:num]
    return [picked[i] for i in rng.permutation(len(picked))]


def make_questions(scene: Scene, rng: np.random.Generator, num: int, kinds: Sequence[str] = KINDS) -> list[SceneQuestion]:
    """Up to `num` different questions in random order, each kind as likely; fewer only where the scene has no more to ask."""
    questions: dict[tuple[str, str], SceneQuestion] = {}
    for _ in range(TRIES * num):
        kind = kinds[int(rng.integers(len(kinds)))]
        drawn = MAKERS[kind](scene, rng)
        if drawn is not None:
            questions.setdefault((kind, drawn[0].replace("colour", "color")), SceneQuestion(kind, *drawn))
        if len(questions) == num:
            break
    return list(questions.values())
