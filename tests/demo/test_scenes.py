"""Scenes of any length: unambiguous, drawn as they say, and asked about in questions whose answers can be checked another way."""

import re
from collections import Counter

import numpy as np
import pytest

from sparsevila_cluster.demo.drawing import CELL_PX, COLORS, FPS, FRAME_PX, GRID, PLACES, RGB, SHAPES, texture
from sparsevila_cluster.demo.questions import KINDS, MAKERS, make_questions
from sparsevila_cluster.demo.scene_drawing import LETTERS, TEXTURES, draw_scene, letter_mask, make_video, mark_mask
from sparsevila_cluster.demo.scenes import KEY, MARKS, STREAMS, Scene, Stay, Thing, make_scene, make_words

LENGTHS = (1, 2, 8, 16, 32, 64)


def scene_of(seed, num_steps, stream="training"):
    return make_scene(np.random.default_rng(seed), num_steps, make_words(stream))


# ---- scenes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_scenes_are_unambiguous(num_steps):
    for seed in range(30):
        scene = scene_of(seed, num_steps)
        pairs = [(thing.color, thing.shape) for _, thing in scene.things()]
        words = [word for _, word in scene.words()]
        assert len(set(pairs)) == len(pairs) > 0 and len(set(words)) == len(words)
        for step in range(num_steps):
            things = [thing for _, thing in scene.things_at(step)]
            assert len({thing.color for thing in things}) == len({thing.shape for thing in things}) == len(things)
            places = [stay.place_at(step) for stay in scene.at(step)]
            assert places == sorted(set(places), key=PLACES.index)
        assert all(0 <= stay.begin < stay.end <= num_steps for stay in scene.stays)


def test_longer_scenes_hold_more_of_everything():
    scenes = {num: [scene_of(seed, num) for seed in range(20)] for num in (8, 64)}
    held = {num: sum(len(list(scene.things())) for scene in some) / 20 for num, some in scenes.items()}
    assert 5 < held[8] < 10 and held[64] > 40
    long = scenes[64]
    assert all(any(stay.moves for stay in scene.stays) and len(list(scene.words())) > 0 for scene in long[:3])
    assert 4 <= sum(any(thing.shape == KEY for _, thing in scene.things()) for scene in long) <= 18
    assert max(len(scene.at(step)) for scene in long for step in range(64)) == 4
    assert {len(stay.places) for scene in long for stay in scene.stays} == {1, 2, 3, 4}


@pytest.mark.parametrize("num_steps", [0, 65])
def test_lengths_are_bounded(num_steps):
    with pytest.raises(ValueError, match=rf"\[1, 64\], got {num_steps}"):
        scene_of(0, num_steps)


def test_streams_have_nothing_in_common():
    words = {name: set(make_words(name)) for name in STREAMS}
    assert not words["training"] & words["validation"] and not words["training"] & words["held out a"]
    assert not words["validation"] & words["held out a"] and words["held out a"] == words["held out c"]
    assert min(map(len, words.values())) > 200 and set("".join(words["training"])) == set(LETTERS)
    numbers = [number for textures in TEXTURES.values() for number in textures]
    assert len(set(numbers)) == len(numbers)
    scenes = {name: make_video(0, 8, name) for name in STREAMS}
    assert len({repr(scene) for scene, _ in scenes.values()}) == len(STREAMS)
    again, frames = make_video(0, 8, "validation")
    assert again == scenes["validation"][0] and np.array_equal(frames, scenes["validation"][1])


# ---- pictures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_everything_is_drawn_where_the_scene_says(seed):
    scene = scene_of(seed, 16)
    frames, owner = draw_scene(scene, np.random.default_rng(seed))
    assert frames.shape == (16 * FPS, FRAME_PX, FRAME_PX, 3) and owner.shape == (16, GRID, GRID)
    half = GRID // 2
    for step in range(16):
        assert set(owner[step].ravel()) - {-1} == {scene.stays.index(stay) for stay in scene.at(step)}
        for stay in scene.at(step):
            cells = np.argwhere(owner[step] == scene.stays.index(stay))
            assert len(cells) == (len(stay.what) if isinstance(stay.what, str) else 1)
            assert {divmod(PLACES.index(stay.place_at(step)), 2)} == {(row // half, col // half) for row, col in cells}
            if isinstance(stay.what, Thing):
                row, col = cells[0] * CELL_PX
                cell = frames[step * FPS, row : row + CELL_PX, col : col + CELL_PX].astype(float)
                near = np.abs(cell - np.array(RGB[stay.what.color])).max(-1) < 60
                assert near.sum() > 25, (stay, near.sum())


def test_things_stay_where_they_are_and_marks_are_small():
    thing = Thing("red", "square", "dot")
    scene = Scene(2, (Stay(thing, 0, ("top left", "top left")),))
    _, owner = draw_scene(scene, np.random.default_rng(0))
    assert np.array_equal(owner[0], owner[1])
    for mark in MARKS:
        assert 8 <= mark_mask(mark, 16).sum() <= 32, "a detail"
    assert not np.array_equal(mark_mask("dot", 16), mark_mask("bar", 16))


def test_letters_can_be_told_apart():
    masks = [letter_mask(letter) for letter in LETTERS]
    apart = [np.abs(a - b).sum() for i, a in enumerate(masks) for b in masks[:i]]
    assert min(apart) >= 8 and all(mask.max() == 1 for mask in masks)


def test_backgrounds_of_long_videos_go_on_moving():
    scene = Scene(64, ())
    frames, _ = draw_scene(scene, np.random.default_rng(1))
    assert np.abs(frames[0].astype(float) - frames[-1]).mean() > 5 and texture(0).shape[0] > FRAME_PX


# ---- questions -----------------------------------------------------------------------------------------------------------------


def named(scene, name):
    """The stay and the thing of this name."""
    return next((stay, thing) for stay, thing in scene.things() if thing.name == name)


def said(stay):
    return stay.what.phrase if isinstance(stay.what, Thing) else f"the word {stay.what}"


def described(scene, step):
    return " and ".join(f"{said(stay)} at the {stay.place_at(step)}" for stay in scene.at(step)) or "nothing"


def answer_to(scene, text):
    """Answers a question from its words alone, without the code that made it."""
    step = int(found[1]) - 1 if (found := re.search(r"step (\d+)", text)) else None
    there = [] if step is None else scene.at(step)
    words = re.findall(r"[a-z]+", text)
    color, shape = (next((word for word in words if word in names), None) for names in (COLORS, SHAPES))
    place = next((name for name in PLACES if name in text), None)
    if match := re.match(r"Describe everything from step (\d+) to step (\d+)", text):
        return "; ".join(f"step {i + 1}: {described(scene, i)}" for i in range(int(match[1]) - 1, int(match[2])))
    if text.startswith("Describe"):
        return described(scene, step)
    if re.match("What colou?r", text):
        return next(stay.what.color for stay in there if isinstance(stay.what, Thing) and stay.what.shape == shape)
    if text.startswith("Which shape is"):
        return next(stay.what.shape for stay in there if isinstance(stay.what, Thing) and stay.what.color == color)
    if text.startswith("How many shapes"):
        return str(sum(isinstance(stay.what, Thing) for stay in there))
    if text.startswith("What is at"):
        return next((said(stay) for stay in there if stay.place_at(step) == place), "nothing")
    if "together with the key" in text:
        moment = named(scene, KEY)[0].begin
        others = [stay for stay in scene.at(moment) if not (isinstance(stay.what, Thing) and stay.what.shape == KEY)]
        return " and ".join(map(said, others))
    if text.startswith("Which word"):
        (word,) = [stay.what for stay in there if isinstance(stay.what, str)]
        return word
    if match := re.search(r"the word ([A-Z]+)", text):
        return f"at step {next(stay.begin for stay, word in scene.words() if word == match[1]) + 1}"
    if match := re.search(r"different (\w+)", text):
        name = re.sub(r"(?<=cross)es$|s$", "", match[1])
        return str(sum(name in (thing.color, thing.shape) for _, thing in scene.things()))
    if text.startswith("Is there"):
        return "yes" if (color, shape) in {(thing.color, thing.shape) for _, thing in scene.things()} else "no"
    name = re.search(r"the (key|\w+ (?:" + "|".join(SHAPES) + "))", text)[1]
    stay, thing = named(scene, name)
    if text.startswith("What is drawn"):
        return f"a {thing.mark}" if thing.mark else "nothing"
    if text.startswith("When"):
        return f"at step {stay.begin + 1}"
    if text.startswith("Where is"):
        return f"at the {stay.place_at(stay.begin if step is None else step)}"
    if text.startswith("Where does"):
        return f"from the {stay.places[0]} to the {stay.places[-1]}"
    if text.startswith("For how many"):
        return f"for {len(stay.places)} step{'s' * (len(stay.places) > 1)}"
    others = [other for other, _ in scene.things() if other is not stay]
    if "last before" in text:
        return said(max((other for other in others if other.begin < stay.begin), key=lambda other: other.begin))
    assert "next after" in text, text
    return said(min((other for other in others if other.begin > stay.begin), key=lambda other: other.begin))


@pytest.mark.parametrize("num_steps", LENGTHS)
def test_answers_are_true(num_steps):
    for seed in range(25):
        scene = scene_of(seed, num_steps)
        for question in make_questions(scene, np.random.default_rng(seed), 60):
            assert question.answer == answer_to(scene, question.text), question
            for step, place in question.targets:
                assert place in [stay.place_at(step) for stay in scene.at(step)], question


def test_every_kind_is_asked_for_and_a_dialogue_has_thirty_turns():
    assert len(KINDS) >= 14 and tuple(MAKERS) == KINDS
    asked = Counter()
    for seed in range(40):
        for num_steps in (8, 16, 32, 64):
            questions = make_questions(scene_of(seed, num_steps), np.random.default_rng(seed), 30)
            assert len(questions) == 30 == len({(question.kind, question.text) for question in questions})
            asked.update(question.kind for question in questions)
    assert set(asked) == set(KINDS) and min(asked.values()) > 30, asked


def test_answers_cannot_be_guessed():
    """No answer of a kind is much more frequent than others, and long answers are long."""
    answers = {kind: Counter() for kind in KINDS}
    for seed in range(120):
        for question in make_questions(scene_of(seed, 16), np.random.default_rng(seed), 30):
            answers[question.kind][question.answer] += 1
    most = {kind: found.most_common(1)[0][1] / found.total() for kind, found in answers.items()}
    assert 0.4 < answers["exists"]["yes"] / answers["exists"].total() < 0.6
    assert max(most[kind] for kind in ("color", "shape", "when", "before", "after", "read", "written", "moves")) < 0.3, most
    assert max(most.values()) < 0.62, most
    lengths = [len(answer.split()) for answer in answers["listing"]]
    assert sum(length >= 40 for length in lengths) > 0.3 * len(lengths) and max(lengths) > 80


def test_english_is_proper():
    scenes = [scene_of(seed, 32) for seed in range(30)]
    texts = [t for scene in scenes for q in make_questions(scene, np.random.default_rng(0), 60) for t in (q.text, q.answer)]
    said = " ".join(texts)
    assert re.search(r"\ban orange\b", said) and not re.search(r"\ba orange\b|\ban (?!orange)|\bcrosss|\b1 steps", said)
    assert all(text[-1] in "?." and text[0].isupper() for text in texts[::2])
