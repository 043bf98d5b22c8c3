"""Prompt plans: placeholders and M-RoPE positions against transformers' get_rope_index."""

import pytest
import torch

from sparsevila_cluster.models.families.qwen_vl import GridInputs
from sparsevila_cluster.models.prompt_plan import grid_places
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import qwen_inputs, type_ids


def grid_of(kind, groups, rows, cols, seconds_per_group=1.0):
    """Inputs without pixels: a plan reads grids only."""
    group, cell = grid_places([(rows, cols)] * groups)
    return GridInputs(
        pixels=torch.empty(0, 1176), kind=kind, spelling=(f"<|{kind}_pad|>",), runs=(groups * rows * cols,), group=group,
        cell=cell, grids=((rows, cols),) * groups, frame_of_group=tuple(range(0, 2 * groups, 2)), grid=(groups, rows, cols),
        seconds_per_group=0.0 if kind == "image" else seconds_per_group,
    )  # fmt: skip


PROMPTS = {
    "image": [grid_of("image", 1, 3, 5)],
    "tall image": [grid_of("image", 1, 9, 2)],
    "video": [grid_of("video", 4, 3, 5)],
    "long video": [grid_of("video", 16, 4, 4, 2.0)],
    "slow video": [grid_of("video", 5, 2, 2, 1 / 3)],
    "one group": [grid_of("video", 1, 2, 2, 0.7)],
    "two images": [grid_of("image", 1, 3, 5), grid_of("image", 1, 2, 2)],
    "image, video, image": [grid_of("image", 1, 2, 2), grid_of("video", 8, 2, 3, 1.5), grid_of("image", 1, 4, 1)],
    "two videos": [grid_of("video", 3, 2, 2, 0.5), grid_of("video", 6, 3, 2, 1.001)],
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_hf5_positions_equal_transformers(model, oracle, name):
    inputs = PROMPTS[name]
    plan = model.family.plan(model.chat.prefix_ids([media.kind for media in inputs], None), inputs, "hf5")
    question = model.chat.question_ids("where is it?", True, None)[0]
    ids = torch.cat((plan.ids, torch.tensor(question)))
    stock = {key: value for key, value in qwen_inputs(model, inputs).items() if not key.startswith("pixel")}
    expected, delta = oracle.model.get_rope_index(ids[None], **type_ids(model, plan, inputs, len(question)), **stock)
    after = plan.question_start_pos + torch.arange(len(question)).expand(3, -1)
    assert torch.equal(torch.cat((plan.positions, after), dim=1), expected[:, 0])
    first_generated = max(plan.question_start_pos + len(question), plan.generation_floor)
    assert first_generated == len(ids) + int(delta)


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_default_positions_go_on_after_the_largest(model, name):
    inputs = PROMPTS[name]
    plan = model.family.plan(model.chat.prefix_ids([media.kind for media in inputs], None), inputs, "max+1")
    assert plan.generation_floor == 0
    assert plan.question_start_pos == int(plan.positions.max()) + 1
    assert plan.visual_mask.sum() == sum(media.num_tokens for media in inputs)
    text = plan.positions[:, ~plan.visual_mask]
    assert (text == text[0]).all() and (text[0].diff() >= 1).all()
    at = 0
    for t, visual in zip(plan.positions.max(0).values.tolist(), plan.visual_mask.tolist(), strict=True):
        assert visual or t >= at, "text stands after everything before it"
        at = max(at, t + 1)


def test_images_are_the_same_in_both_modes(model):
    inputs = PROMPTS["two images"]
    ids = model.chat.prefix_ids(["image", "image"], None)
    one, other = (model.family.plan(ids, inputs, mode) for mode in ("max+1", "hf5"))
    assert torch.equal(one.positions, other.positions) and one.question_start_pos == other.question_start_pos


def test_seconds_per_group_follow_the_duration(model):
    media = tiny_qwen2_5_vl.media(frames=16, fps=2.0)
    assert model.family.patchify(media).seconds_per_group == 1.0
    assert model.family.patchify(tiny_qwen2_5_vl.media(frames=5, fps=4.0)).seconds_per_group == 0.5
    assert model.family.patchify(tiny_qwen2_5_vl.media("image")).seconds_per_group == 0.0
