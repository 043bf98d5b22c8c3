"""The trainer: what it optimises is the stock model, and one command leaves a checkpoint that loads."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from sparsevila_cluster.demo import train as trainer
from sparsevila_cluster.demo.checkpoint_builder import build_model, build_tokenizer, num_parameters
from sparsevila_cluster.demo.dialogue_batches import BatchBuilder, keep_glyphs, keep_salient
from sparsevila_cluster.demo.step_dataset import StepDataset
from sparsevila_cluster.demo.text_trainer import TrainingOptions
from sparsevila_cluster.demo.training_forward import retrieval_mask, retrieved, run_text, turns_apart_mask
from sparsevila_cluster.demo.training_monitor import VIEWS, Evaluator
from sparsevila_cluster.demo.video_feed import make_held_out_video, training_videos
from sparsevila_cluster.demo.vision_trainer import VisionRunner, patchify
from sparsevila_cluster.demo.world import make_questions, make_video

GRID = torch.tensor([[8, 16, 16]])


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(num_scenes=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


@pytest.fixture(scope="module")
def videos():
    source = training_videos(seed=1, num_steps=8)
    return [next(source) for _ in range(2)]


@pytest.fixture(scope="module")
def dataset(model, videos):
    encoded = StepDataset.encode(videos, len(videos), VisionRunner(model.model.visual))
    # the dataset is stored in half precision; comparisons with the stock model want all digits
    patches = patchify(np.stack([video.frames for video in videos]))
    with torch.no_grad():
        exact = VisionRunner(model.model.visual)(patches).tokens
    return StepDataset(encoded.steps, exact, encoded.salience, encoded.owner, encoded.steps_per_video)


@pytest.fixture(scope="module")
def dialogue(dataset):
    rng = np.random.default_rng(0)
    shown = [dataset.whole(0), dataset.whole(1)]
    return shown, [make_questions(video.scene, rng, 4) for video in shown]


def stock_inputs(tokenizer, batch):
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    media = torch.full((len(batch.prefix_ids), 512), pad)
    ids = torch.cat([batch.prefix_ids, media, batch.suffix_ids], 1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == pad).int() * 2,
        "video_grid_thw": GRID.expand(len(ids), -1),
        "second_per_grid_ts": torch.ones(len(ids)),
    }


@torch.no_grad()
def test_vision_equals_the_stock_tower(model, videos, dataset):
    patches = patchify(np.stack([video.frames for video in videos]))
    stock = model.model.visual(patches.flatten(0, 1), grid_thw=GRID.expand(len(videos), -1)).pooler_output
    assert torch.allclose(dataset.tokens.flatten(0, 1), stock, atol=1e-5)
    assert torch.allclose(dataset.salience.mean(1), torch.ones(len(dataset.salience)), atol=1e-4)


@torch.no_grad()
def test_dense_training_forward_equals_the_stock_one(model, tokenizer, videos, dataset, dialogue):
    batch = BatchBuilder(tokenizer).batch(dataset, *dialogue)
    inputs = stock_inputs(tokenizer, batch)
    pixels = patchify(np.stack([video.frames for video in videos])).flatten(0, 1)
    stock = model(pixel_values_videos=pixels, **inputs).logits
    ours = model.lm_head(run_text(model, batch).hidden)
    assert torch.allclose(ours, stock, atol=2e-5)
    positions, _ = model.model.get_rope_index(**inputs)
    assert torch.equal(positions, batch.positions)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.25, 0.1])
def test_dropped_training_forward_equals_the_stock_text_model(model, tokenizer, dataset, dialogue, ratio):
    """Dropped tokens leave; the others keep the positions that they have in the whole video."""
    batches, (shown, _) = BatchBuilder(tokenizer), dialogue
    rng = np.random.default_rng(1)
    whole = batches.batch(dataset, *dialogue)
    for keep in (keep_salient(dataset, shown, ratio), keep_glyphs(dataset, shown, ratio, rng)):
        batch = batches.batch(dataset, *dialogue, keep)
        text = model.model.language_model
        for item in range(len(shown)):
            rows = torch.cat([torch.arange(4), 4 + keep[item], torch.arange(516, whole.labels.shape[1])])
            embeds = torch.cat(
                [
                    text.embed_tokens(whole.prefix_ids[item]),
                    dataset.tokens[list(shown[item].rows)].flatten(0, 1)[keep[item]],
                    text.embed_tokens(whole.suffix_ids[item]),
                ]
            )
            positions = whole.positions[:, item : item + 1, rows]
            stock = text(inputs_embeds=embeds[None], position_ids=positions, use_cache=False).last_hidden_state
            assert torch.allclose(run_text(model, batch).hidden[item], stock[0], atol=2e-5)


def test_salient_tokens_are_kept_per_step(dataset, dialogue):
    keep = keep_salient(dataset, dialogue[0], 0.25)
    assert keep.shape == (2, 128)
    assert (torch.bincount(keep[0] // 64) == 16).all()
    assert (keep.diff() > 0).all()


def test_targets_are_the_glyphs_asked_for(tokenizer, dataset, dialogue):
    batch = BatchBuilder(tokenizer).batch(dataset, *dialogue)
    for turn, question in enumerate(batch.turns.questions):
        assert int(batch.turns.targets[turn].sum()) == len(question.targets)
        steps = batch.slots[batch.turns.item[turn]][batch.turns.targets[turn]]
        assert set(steps.tolist()) <= {question.step}


def test_masks_hide_other_turns_and_unretrieved_tokens(model, tokenizer, dataset, dialogue):
    batch = BatchBuilder(tokenizer).batch(dataset, *dialogue)
    turns, media = batch.turns, batch.visual_rows
    apart = turns_apart_mask(batch)[0, 0]
    second = int(turns.prompt_row[1])
    assert apart[second, : media.stop + 1].all()
    assert not apart[second, int(turns.prompt_row[0]) : int(turns.end_row[0])].any()

    chosen = retrieved(model, batch, 0.1)
    assert len(chosen) == 4
    assert all((layer.sum(1) == 51).all() for layer in chosen)
    mask = retrieval_mask(batch, chosen[0])[:, 0]
    for turn, item in enumerate(turns.item.tolist()):
        prompt, end = int(turns.prompt_row[turn]), int(turns.end_row[turn])
        assert mask[item, prompt, media].all() and mask[item, end, media].all()
        for row in range(prompt + 1, end):
            assert torch.equal(mask[item, row, media], chosen[0][turn])


def test_held_out_videos_of_the_monitor_are_those_of_the_world():
    assert make_held_out_video(7).scene == make_video(7)[0]


@pytest.fixture
def small_batches(monkeypatch, tokenizer):
    """Two videos in a batch instead of a dozen, and words of fewer scenes."""

    def small(stage):
        return replace(stage, portions=tuple(replace(portion, batch=2) for portion in stage.portions))

    monkeypatch.setattr(trainer, "build_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(trainer, "VISION_BATCH", 2)
    monkeypatch.setattr(trainer, "SHARED", tuple(map(small, trainer.SHARED)))
    for tail in ("SPARSE_TAIL", "DENSE_TAIL"):
        monkeypatch.setattr(trainer, tail, small(getattr(trainer, tail)))


def test_a_tiny_run_leaves_a_checkpoint_that_loads(tmp_path, small_batches):
    options = TrainingOptions(tmp_path, minutes=0.01, vision_updates=1, dataset_videos=2, monitor_videos=1, final_videos=1)
    marks = trainer.train(options)
    assert set(marks) == set(VIEWS)
    directory = tmp_path / "checkpoint"
    loaded = AutoModelForImageTextToText.from_pretrained(directory)
    assert type(loaded).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 0.9e6 < num_parameters(loaded) < 1.5e6
    assert AutoConfig.from_pretrained(directory).vision_config.window_size == 64
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer.encode("Describe step 3. Größe?")) == "Describe step 3. Größe?"
    batches = BatchBuilder(tokenizer)
    held_out = StepDataset.encode(map(make_held_out_video, count()), 1, VisionRunner(loaded.model.visual))
    assert Evaluator(held_out, batches).evaluate(loaded.eval())["num_questions"] == 8
    assert (tmp_path / "training_log.jsonl").stat().st_size > 0

    twin = TrainingOptions(
        tmp_path / "twin",
        0.01,
        dense_only=True,
        resume_stage=tmp_path / "shared.pt",
        dataset_videos=2,
        monitor_videos=1,
        final_videos=1,
    )
    assert set(trainer.train(twin)) == set(VIEWS)
