"""What a model of scenes is trained on: windows of encoded videos, questions about them, and where each answer token must look."""

import io
import re

import numpy as np
import pytest
import torch

from sparsevila_cluster.demo.checkpoint_builder import TOKENS_PER_STEP, TextSize, build_model
from sparsevila_cluster.demo.drawing import COLORS, GRID, PLACES
from sparsevila_cluster.demo.questions import KINDS, SceneQuestion
from sparsevila_cluster.demo.scenes import Thing
from sparsevila_cluster.demo.training.batches import BatchMaker, asked_for, group_at, keep_all, keep_salient
from sparsevila_cluster.demo.training.forward import retrieval_mask, retrieved, run_text, turns_apart_mask
from sparsevila_cluster.demo.training.lessons import LESSONS, ROWS, ROWS_PER_TURN, Showing
from sparsevila_cluster.demo.training.scene_videos import ALL_LETTERS, ALL_SHAPES, CONTENTS, contents_of, sample_scene, seed_of
from sparsevila_cluster.demo.training.text import TextStage, mean_of_answers
from sparsevila_cluster.demo.training.text_tokens import build_scene_tokenizer
from sparsevila_cluster.demo.training.tower import TowerStage
from sparsevila_cluster.demo.training.vision_runner import VisionRunner, patchify
from sparsevila_cluster.demo.training.windows import FACT_SIZES, EncodedVideos, crop

NUM_STEPS = 12
SMALL = TextSize(128, 256, 5, 4, 2, 2048)


@pytest.fixture(scope="module")
def tokenizer():
    return build_scene_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer, SMALL).eval()


@pytest.fixture(scope="module")
def videos():
    return [sample_scene(seed_of("training", seed), NUM_STEPS, "training", codec=False) for seed in range(3)]


@pytest.fixture(scope="module")
def encoded(model, videos):
    return EncodedVideos.encode(videos, len(videos), VisionRunner(model.model.visual))


def test_contents_say_what_lies_under_each_token(videos):
    for video in videos:
        found = contents_of(video)
        for step in range(NUM_STEPS):
            there = video.scene.at(step)
            letters = "".join(ALL_LETTERS[i] for i in found["letter"][step] if i < len(ALL_LETTERS))
            assert letters == "".join(stay.what for stay in there if isinstance(stay.what, str))
            things = {(stay.what.color, stay.what.shape, stay.what.mark) for stay in there if isinstance(stay.what, Thing)}
            names = {name: [*values, ""] for name, values in CONTENTS.items()}
            rows = zip(*(found[name][step] for name in ("color", "shape", "mark")), strict=True)
            read = {(names["color"][c], names["shape"][s], names["mark"][m]) for c, s, m in rows}
            assert read - {("", "", "")} == things


def test_most_videos_go_through_a_codec():
    kept = sample_scene(seed_of("validation", 1), 3, "validation", codec=False)
    coded = sample_scene(seed_of("validation", 1), 3, "validation", codec=True)
    assert kept.scene == coded.scene and kept.frames.shape == coded.frames.shape == (6, 128, 128, 3)
    assert 0 < np.abs(kept.frames.astype(int) - coded.frames).mean() < 12


def test_a_window_is_a_scene_of_its_own(videos):
    for video in videos:
        for first in (0, 3, NUM_STEPS - 4):
            window = crop(video.scene, first, 4)
            assert window.num_steps == 4
            for step in range(4):
                ours = [(stay.what, stay.place_at(step)) for stay in window.at(step)]
                assert ours == [(stay.what, stay.place_at(first + step)) for stay in video.scene.at(first + step)]
    assert crop(videos[0].scene, 0, NUM_STEPS) == videos[0].scene


def test_questions_name_steps_of_the_whole_video(encoded):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        window = encoded.window(rng, 4)
        for question in window.questions(rng, 6, KINDS):
            seen.add(question.kind)
            for number in map(int, re.findall(r"\bstep (\d+)", f"{question.text} {question.answer}")):
                assert number - 1 in window.steps
            for step, place in question.targets:
                there = encoded.scenes[window.video].at(step)
                assert step in window.steps and place in {stay.place_at(step) for stay in there}
    assert {"at", "listing", "when", "describe"} <= seen


def test_cells_of_a_look_are_those_of_what_is_there(encoded, videos):
    for number in range(4):
        window = encoded.window(np.random.default_rng(number), NUM_STEPS)
        video = videos[window.video]
        for index, stay in enumerate(video.scene.stays):
            for step in range(stay.begin, stay.end):
                mine = np.flatnonzero(video.owner[step].reshape(-1) == index)
                assert encoded.cells(window, (step, stay.place_at(step))) == mine.tolist()


@pytest.mark.parametrize(
    ("answer", "num_groups", "parts"),
    [
        ("a red star at the top left and an orange ring at the top right", 2, {"red": 0, "star": 0, "orange": 1}),
        ("step 3: a red star at the top left; step 4: nothing; step 5: the word BAT at the top left", 2,
         {"red": 0, "nothing": -1, "BAT": 1}),
        ("from the top left to the bottom right", 2, {"top left": 0, "bottom right": 1}),
        ("an orange ring", 2, {"orange": 0, "ring": 0}),  # found by another thing, which is not named
        ("for 3 steps", 1, {"3": 0}),
        ("no", 0, {"no": -1}),
    ],
)  # fmt: skip
def test_each_part_of_an_answer_has_its_own_looks(answer, num_groups, parts):
    groups = tuple(((i, PLACES[0]),) for i in range(num_groups))
    found = group_at(SceneQuestion("any", "", answer, groups))
    assert len(found) == len(answer)
    assert {part: found[answer.index(part)] for part in parts} == parts


def test_what_a_question_names():
    assert asked_for("color", "What color is the ring at step 64?")[2] == 64
    color, shape, step, place, kind = asked_for("at", "What is at the bottom left at step 5?")
    assert (step, PLACES[place], KINDS[kind]) == (5, "bottom left", "at")
    assert asked_for("exists", "Is there a red star in the video?")[:2] != (color, shape)


def test_answer_tokens_look_at_what_they_name(encoded, tokenizer, videos):
    maker, rng = BatchMaker(tokenizer, encoded), np.random.default_rng(2)
    contents = [contents_of(video) for video in videos]
    checked = set()
    kinds = ("color", "read", "describe", "listing", "shape")
    for _ in range(12):
        windows = [encoded.window(rng, 6) for _ in range(2)]
        batch = maker.batch(windows, [window.questions(rng, 8, kinds) for window in windows], keep_all(windows))
        looks = batch.looks
        for item, row, turn, targets in zip(looks.item, looks.row, looks.turn, looks.targets, strict=True):
            kind = batch.turns.questions[int(turn)].kind
            said = tokenizer.decode(batch.labels[item, row + 1]).strip()
            under = contents[windows[int(item)].video]
            slots, cells = batch.slots[item][targets], batch.cells[item][targets]
            assert len(slots) > 0
            for name in ("color", "shape", "letter"):
                if said in CONTENTS[name] and (name != "letter" or len(slots) == 1):
                    assert {CONTENTS[name][under[name][slot, cell]] for slot, cell in zip(slots, cells, strict=True)} >= {said}
                    checked.add((kind, name))
    assert {("color", "color"), ("shape", "shape"), ("describe", "color"), ("listing", "shape"), ("listing", "letter")} <= checked


def test_letters_are_looked_at_one_by_one(tokenizer, model):
    videos = [sample_scene(seed_of("training", seed), 30, "training", codec=False) for seed in range(40, 43)]
    encoded = EncodedVideos.encode(videos, 3, VisionRunner(model.model.visual))
    maker, rng, num = BatchMaker(tokenizer, encoded), np.random.default_rng(2), 0
    for _ in range(10):
        window = encoded.window(rng, 30)
        questions = window.questions(rng, 2, ("read",))
        if not questions:
            continue
        batch = maker.batch([window], [questions], keep_all([window]))
        for turn, question in enumerate(questions):
            mine = batch.looks.turn == turn
            letters = [
                ALL_LETTERS[contents_of(videos[window.video])["letter"][batch.slots[0][one][0], batch.cells[0][one][0]]]
                for one in batch.looks.targets[mine]
            ]
            assert "".join(letters) == question.answer
            assert batch.looks.targets[mine].sum(1).tolist() == [1] * len(letters)
            num += 1
    assert num > 3


def test_facts_are_those_of_the_scene(encoded):
    rng, names = np.random.default_rng(9), list(FACT_SIZES)
    for num_steps in (3, 7, NUM_STEPS):
        window = encoded.window(rng, num_steps)
        scene, facts = window.scene, encoded.facts(window)
        assert (facts < torch.tensor([*FACT_SIZES.values()])).all()
        held = sum(len(encoded.cells(window, (window.first + step, stay.place_at(step))))
                   for step in range(num_steps) for stay in scene.at(step))  # fmt: skip
        assert (facts[..., 0] >= 0).sum() == held
        things = list(scene.things())
        for number, (stay, thing) in enumerate(things):
            last = stay.end - 1
            (cell,) = encoded.cells(window, (window.first + last, stay.places[-1]))
            known = dict(zip(names, facts[last, cell].tolist(), strict=True))
            seen = [other for before, other in things if before.begin < stay.end and (before.begin < last or before is stay)]
            assert (COLORS[known["color"]], ALL_SHAPES[known["shape"]]) == (thing.color, thing.shape)
            assert PLACES[known["place"]] == stay.places[-1] and known["age"] == len(stay.places)
            assert PLACES[known["begin place"]] == stay.places[0]
            assert known["rank"] == 1 + scene.at(last).index(stay) and known["things"] == 1 + scene.things_at(last).index(
                (stay, thing)
            )
            assert known["color count"] == sum(other.color == thing.color for other in seen)
            assert known["shape count"] == sum(other.shape == thing.shape for other in seen)
            before = things[number - 1][1] if number else None
            assert [*COLORS, None][known["color before"]] == (before and before.color)
            assert [*ALL_SHAPES, None][known["shape before"]] == (before and before.shape)
            assert known["letter before"] == known["second letter before"] == -1
        for stay, word in scene.words():
            cells = encoded.cells(window, (window.first + stay.begin, stay.places[0]))
            read = [[[*ALL_LETTERS, ""][fact] for fact in facts[stay.begin, cell, -2:]] for cell in cells]
            assert read == [[word[i - 1] if i else "", word[i - 2] if i > 1 else ""] for i in range(len(word))]


def test_what_is_found_by_way_of_something_else_has_two_looks(encoded, tokenizer):
    maker, rng, num = BatchMaker(tokenizer, encoded), np.random.default_rng(7), 0
    for _ in range(8):
        window = encoded.window(rng, NUM_STEPS)
        questions = window.questions(rng, 4, ("before", "after", "beside", "color"))
        batch = maker.batch([window], [questions], keep_all([window]))
        tokens = batch.slots[0] * TOKENS_PER_STEP + batch.cells[0]
        for turn, question in enumerate(questions):
            mine, looks = batch.looks.turn == turn, batch.looks
            by_hop = [{int(token) for row in looks.targets[mine & (looks.hop == hop)] for token in tokens[row]} for hop in (0, 1)]
            ways, ends = ({step * TOKENS_PER_STEP + cell for step, place in some for cell in encoded.cells(window, (step, place))}
                          for some in (question.via, [look for group in question.looks for look in group]))  # fmt: skip
            expected = {"beside": [ways, ends], "before": [ways, set()]}
            assert by_hop == expected.get(question.kind, [ends, set()])
            num += question.kind in expected
    assert num > 6


def test_rows_of_a_description_are_told_where_they_are(encoded, tokenizer):
    maker, rng, ranks = BatchMaker(tokenizer, encoded), np.random.default_rng(11), set()
    for _ in range(6):
        window = encoded.window(rng, 6)
        batch = maker.batch([window], [window.questions(rng, 4, ("describe", "listing", "when"))], keep_all([window]))
        looks = batch.looks
        for turn, targets, (step, rank) in zip(looks.turn, looks.targets, looks.address.tolist(), strict=True):
            if batch.turns.questions[int(turn)].kind == "when":
                assert (step, rank) == (-1, -1)
            elif step >= 0:
                stay = window.scene.at(step - window.first)[rank - 1]
                cells = encoded.cells(window, (step, stay.place_at(step - window.first)))
                assert {step * TOKENS_PER_STEP + cell for cell in cells} >= {
                    int(token) for token in (batch.slots[0] * TOKENS_PER_STEP + batch.cells[0])[targets]
                }
                ranks.add(rank)
    assert ranks >= {1, 2, 3}


def test_half_of_the_looks_are_those_of_every_other_token(encoded, tokenizer):
    rng = np.random.default_rng(8)
    window = encoded.window(rng, NUM_STEPS)
    questions = window.questions(rng, 6, ("listing", "describe", "color"))
    every, half = (BatchMaker(tokenizer, encoded, part).batch([window], [questions], keep_all([window])).looks for part in (1, 2))
    assert half.first.sum() == every.first.sum() and 0.4 < len(half.row) / len(every.row) < 0.7
    assert set(zip(half.row.tolist(), half.turn.tolist(), strict=True)) < set(
        zip(every.row.tolist(), every.turn.tolist(), strict=True)
    )


def test_salient_tokens_are_kept_step_by_step(encoded):
    windows = [encoded.window(np.random.default_rng(0), 3), encoded.window(np.random.default_rng(1), 3)]
    keep = keep_salient(encoded, windows, 5)
    assert keep.shape == (2, 15) and (keep.diff(dim=1) > 0).all()
    for window, kept in zip(windows, keep, strict=True):
        for step in range(3):
            mine = kept[kept // TOKENS_PER_STEP == step] % TOKENS_PER_STEP
            scores = encoded.salience[window.video, window.first + step]
            assert scores[mine].min() >= scores.topk(5).values.min()


def test_a_batch_is_what_the_stock_model_sees(encoded, tokenizer, model, videos):
    """A window that begins at step 0 is a video of its own. Text goes on behind the largest position, as the engine has it."""
    rng = np.random.default_rng(1)
    window = next(w for w in iter(lambda: encoded.window(rng, 10), None) if w.first == 0)
    maker = BatchMaker(tokenizer, encoded)
    batch = maker.batch([window], [window.questions(rng, 3, KINDS)], keep_all([window]))
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    ids = torch.cat([batch.prefix_ids, torch.full((1, 10 * TOKENS_PER_STEP), pad), batch.suffix_ids], 1)
    inputs = {"mm_token_type_ids": 2 * (ids == pad).int(), "video_grid_thw": torch.tensor([[10, 2 * GRID, 2 * GRID]])}
    positions, _ = model.model.get_rope_index(ids, **inputs, second_per_grid_ts=torch.tensor([1.0]))
    end = batch.visual_rows.stop
    assert torch.equal(positions[..., :end], batch.positions[..., :end])
    assert batch.positions[0, 0, end:].tolist() == list(range(int(positions[..., :end].max()) + 1, ids.shape[1] - end + 4 + 10))
    patches = patchify(videos[window.video].frames[None, :20]).flatten(0, 1)
    with torch.no_grad():
        stock = model.model(input_ids=ids, position_ids=batch.positions, pixel_values_videos=patches, **inputs).last_hidden_state
        ours = run_text(model, batch).hidden
    torch.testing.assert_close(ours, stock, atol=0.05, rtol=0.05)  # tokens are kept in half precision


@torch.no_grad()
def test_dropped_tokens_leave_the_others_where_they_are(encoded, tokenizer, model):
    rng = np.random.default_rng(6)
    windows = [encoded.window(rng, 5) for _ in range(2)]
    dialogues = [window.questions(rng, 4, KINDS) for window in windows]
    maker, keep = BatchMaker(tokenizer, encoded), keep_salient(encoded, windows, 9)
    whole, batch = maker.batch(windows, dialogues, keep_all(windows)), maker.batch(windows, dialogues, keep)
    text, media = model.model.language_model, whole.visual_rows
    for item, kept in enumerate(keep):
        rows = torch.cat([torch.arange(media.start), media.start + kept, torch.arange(media.stop, whole.labels.shape[1])])
        parts = (text.embed_tokens(whole.prefix_ids[item]), whole.visual[item], text.embed_tokens(whole.suffix_ids[item]))
        positions = whole.positions[:, item : item + 1, rows]
        stock = text(inputs_embeds=torch.cat(parts)[rows][None], position_ids=positions, use_cache=False).last_hidden_state
        torch.testing.assert_close(run_text(model, batch).hidden[item], stock[0], atol=2e-5, rtol=1e-5)


def test_masks_hide_other_turns_and_tokens_not_retrieved(encoded, tokenizer, model):
    rng = np.random.default_rng(3)
    windows = [encoded.window(rng, 6) for _ in range(2)]
    dialogues = [window.questions(rng, 4, KINDS) for window in windows]
    batch = BatchMaker(tokenizer, encoded).batch(windows, dialogues, keep_all(windows))
    turns, media = batch.turns, batch.visual_rows
    apart, second = turns_apart_mask(batch)[0, 0], int(turns.prompt_row[1])
    assert apart[second, : media.stop + 1].all()
    assert not apart[second, int(turns.prompt_row[0]) : int(turns.end_row[0])].any()
    chosen = retrieved(model, batch, 0.1)
    assert len(chosen) == SMALL.layers
    assert all((layer.sum(1) == round(0.1 * 6 * TOKENS_PER_STEP)).all() for layer in chosen)
    mask = retrieval_mask(batch, chosen[0])[:, 0]
    for turn, item in enumerate(turns.item.tolist()):
        prompt, end = int(turns.prompt_row[turn]), int(turns.end_row[turn])
        assert mask[item, prompt, media].all() and mask[item, end, media].all()
        for row in range(prompt + 1, end):
            assert torch.equal(mask[item, row, media], chosen[0][turn])


def test_a_tower_learns_and_its_projector_says_what_it_reads(tokenizer, videos):
    torch.manual_seed(0)
    stage = TowerStage(VisionRunner(build_model(tokenizer, SMALL).model.visual))
    first, *_, last = [stage.update(videos, number / 12, number) for number in range(12)]
    assert last["color"] < 0.8 * first["color"] and {"letter", "mark", "salience", "row"} <= set(last)
    assert set(stage.report(videos)) == {"color", "shape", "mark", "letter", "row", "col", "in_top_6", "in_top_16"}
    norms = stage.start_projector(videos)
    assert 3 < norms["held"] < 30
    assert "salience" not in TowerStage(VisionRunner(build_model(tokenizer, SMALL).model.visual), salience=False).update(
        videos, 0.0, 0
    )


def test_a_run_goes_on_where_an_earlier_one_was(encoded, tokenizer):
    def stage():
        torch.manual_seed(3)
        return TextStage(build_model(tokenizer, SMALL), tokenizer, encoded, seed=1)

    whole, cut = stage(), stage()
    short = Showing(2, 10, 6, apart=True)
    for _ in range(3):
        whole.update(short)
    accuracy = whole.examine(encoded, short)
    assert set(accuracy) <= {*KINDS, "all"} and 0 <= accuracy["all"] <= 100
    for _ in range(3):
        cut.update(short)
    cut.examine(encoded, short)
    saved = io.BytesIO()
    torch.save(cut.state(), saved)
    saved.seek(0)
    resumed = stage()
    resumed.restore(torch.load(saved, weights_only=False))
    longer = Showing(4, 16, 8, retrieve_keep=0.1)
    later = [(whole.update(longer), resumed.update(longer)) for _ in range(2)]
    assert all(one == other for one, other in later)
    assert resumed.num_updates == 5 and resumed.accuracy == whole.accuracy


def test_a_long_answer_does_not_outweigh_short_ones(encoded, tokenizer):
    rng = np.random.default_rng(4)
    window = encoded.window(rng, 8)
    maker = BatchMaker(tokenizer, encoded)
    questions = window.questions(rng, 1, ("listing",)) + window.questions(rng, 1, ("color",))
    batch = maker.batch([window], [questions], keep_all([window]))
    lengths = [len(tokenizer.encode(question.answer)) + 1 for question in questions]
    losses = torch.cat([torch.full((length,), float(value)) for length, value in zip(lengths, (0, 1), strict=True)])
    long, short = (length**0.5 for length in lengths)
    assert mean_of_answers(losses, batch).item() == pytest.approx(short / (long + short))


def test_a_batch_in_which_nothing_is_to_be_looked_at_teaches_its_answers(encoded, tokenizer):
    torch.manual_seed(0)
    stage = TextStage(build_model(tokenizer, SMALL), tokenizer, encoded)
    nothing = SceneQuestion("exists", "Is there a red star in the video?", "no")
    windows = [encoded.window(stage.rng, 2)]
    batch = stage.maker.batch(windows, [[nothing, nothing]], keep_all(windows))
    assert batch.looks.targets.shape == (0, 2 * TOKENS_PER_STEP)
    losses = stage.heads.losses(stage.model, batch, run_text(stage.model, batch))
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["answer_grounding"] == 0


def test_lessons_bound_their_batches():
    rng = np.random.default_rng(0)
    for lesson in LESSONS:
        for dense in (False, True):
            for _ in range(40):
                showing = lesson.draw(rng, dense=dense)
                rows = showing.num_steps * showing.num_per_step + ROWS_PER_TURN * showing.num_turns
                assert showing.num_items == 1 or showing.num_items * rows <= ROWS
                assert showing.retrieve_keep == 1.0 or not (dense or showing.apart)
                assert not dense or showing.num_per_step == TOKENS_PER_STEP
    rates = [rate for lesson in LESSONS for rate in lesson.rates]
    assert rates == sorted(rates, reverse=True) and rates[0] == 1.0 and rates[-1] < 0.05
    assert [LESSONS[-1].rate(count) for count in (0, LESSONS[-1].updates)] == pytest.approx(LESSONS[-1].rates)
