"""The demo world: deterministic, consistent with itself, and of the size that the demo checkpoint expects."""

import av
import numpy as np
import pytest
from transformers import AutoTokenizer

import sparsevila_cluster.demo as demo
from sparsevila_cluster.demo.drawing import CELL_PX, FRAME_PX, HELD_OUT_TEXTURES, RGB, TRAINING_TEXTURES, render_labelled, texture
from sparsevila_cluster.demo.world import (
    COLORS,
    FPS,
    KINDS,
    PLACES,
    SHAPES,
    Glyph,
    WorldScene,
    make_questions,
    make_scene,
    make_video,
    render,
    write_mp4,
)

CHECKPOINT = f"{list(demo.__path__)[0]}/checkpoint"


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_seed_names_one_video():
    (scene, frames), (again, frames_again) = make_video(3), make_video(3)
    assert scene == again
    assert np.array_equal(frames, frames_again)
    assert make_video(4)[0] != scene
    questions = [make_questions(scene, rng(5), 8) for _ in range(2)]
    assert questions[0] == questions[1]


def test_held_out_videos_share_neither_seeds_nor_backgrounds_with_training():
    assert not set(TRAINING_TEXTURES) & set(HELD_OUT_TEXTURES)
    assert make_video(3, held_out=True)[0] != make_video(3, held_out=False)[0]
    held_out, training = (texture(numbers[0]).astype(float) for numbers in (HELD_OUT_TEXTURES, TRAINING_TEXTURES))
    assert abs(np.corrcoef(held_out.ravel(), training.ravel())[0, 1]) < 0.5


def test_a_video_has_the_promised_size():
    scene, frames = make_video(0)
    assert frames.dtype == np.uint8
    assert frames.shape == (8 * FPS, 128, 128, 3)
    tokens_per_step = (FRAME_PX // CELL_PX) ** 2  # a cell is what patch 8 and merge 2 make one visual token
    assert len(scene.steps) * tokens_per_step >= 500
    assert scene.duration_s == 8


@pytest.mark.parametrize("seed", range(5))
def test_scenes_are_unambiguous(seed):
    scene = make_scene(rng(seed))
    pairs = [(glyph.color, glyph.shape) for step in scene.steps for glyph in step]
    assert 0 < len(pairs) == len(set(pairs))
    for step in scene.steps:
        assert len({glyph.place for glyph in step}) == len(step) <= 2
        assert all(g.color in COLORS and g.shape in SHAPES and g.place in PLACES for g in step)


def test_glyphs_are_drawn_where_and_how_the_scene_says():
    scene = WorldScene(((Glyph("red", "square", "bottom right"),), (), (Glyph("white", "circle", "top left"),)))
    frames, owner = render_labelled(scene, rng())
    for step, glyphs in enumerate(scene.steps):
        assert (owner[step] >= 0).sum() == len(glyphs)
        for glyph in glyphs:
            row, col = np.argwhere(owner[step] == 0)[0]
            down, right = row * CELL_PX >= FRAME_PX // 2, col * CELL_PX >= FRAME_PX // 2
            assert PLACES[2 * down + right] == glyph.place
            for frame in frames[step * FPS : (step + 1) * FPS]:
                middle = frame[row * CELL_PX + 6 : row * CELL_PX + 10, col * CELL_PX + 6 : col * CELL_PX + 10]
                assert np.abs(middle.reshape(-1, 3).mean(0) - RGB[glyph.color]).max() < 40


def test_answers_follow_from_the_scene():
    for seed in range(30):
        scene = make_scene(rng(seed))
        for question in make_questions(scene, rng(seed), 20):
            glyphs = scene.steps[question.step]
            assert set(question.targets) <= set(glyphs)
            words = f"{question.text} {question.answer}"
            if question.kind == "count":
                assert question.answer == str(len(glyphs))
            elif question.kind == "describe":
                assert question.targets == glyphs
                assert all(f"{g.phrase} at the {g.place}" in question.answer for g in glyphs)
                assert glyphs or question.answer == "nothing"
            elif question.answer == "nothing":
                assert not [glyph for glyph in glyphs if glyph.place in question.text]
            else:
                (glyph,) = question.targets
                assert glyph.color in words and glyph.shape in words
                assert glyph.place in words or question.kind not in ("where", "at")
            if question.kind not in ("when", "where"):
                assert f"step {question.step + 1}" in question.text
            if question.kind == "when":
                assert question.answer == f"at step {question.step + 1}"


def test_questions_cover_all_kinds_and_do_not_repeat():
    scene = make_scene(rng(1))
    questions = make_questions(scene, rng(1), 40)
    assert {question.kind for question in questions} == set(KINDS)
    assert len(KINDS) >= 6
    assert len({question.text for question in questions}) == len(questions)
    assert {q.kind for q in make_questions(scene, rng(2), 5, kinds=["where"])} == {"where"}
    assert {q.step for q in make_questions(scene, rng(2), 12, steps=[6])} == {6}


def test_both_spellings_of_color_are_asked():
    texts = [q.text for seed in range(10) for q in make_questions(make_scene(rng(seed)), rng(seed), 8, ["color"])]
    assert any("colour" in text for text in texts) and any("color" in text for text in texts)


def test_mp4_round_trip(tmp_path):
    scene = make_scene(rng(), num_steps=2)
    frames = render(scene, rng())
    write_mp4(frames, tmp_path / "video.mp4")
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert float(stream.average_rate) == FPS
        assert float(stream.duration * stream.time_base) == pytest.approx(scene.duration_s)
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 10


def test_descriptions_of_two_glyphs_take_at_least_ten_tokens():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    lengths: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for seed in range(20):
        scene = make_scene(rng(seed))
        for question in make_questions(scene, rng(seed), 12):
            length = len(tokenizer.encode(question.answer, add_special_tokens=False))
            lengths[question.kind].append(length)
            if question.kind == "describe" and len(question.targets) == 2:
                assert length >= 10
    assert sum(max(found) > 1 for found in lengths.values()) >= 2
