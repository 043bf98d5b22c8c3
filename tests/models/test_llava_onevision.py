"""LLaVA-OneVision: what is tiled depends on the whole prompt, in which order media stand, and where padded pictures lie."""

import json

import numpy as np
import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.engine.prefill_engine import PrefillEngine
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.families.llava import max_tiles
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.tiny_llava_onevision import make_llava_onevision
from tests.checkpoints.transformers_oracle import Bench


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_llava_onevision(tmp_path_factory.mktemp("onevision")))


def picture(height=84, width=140, seed=0):
    return tiny_qwen2_5_vl.media("image", height=height, width=width, seed=seed)


def clip(frames=4):
    return tiny_qwen2_5_vl.media("video", frames=frames, height=50, width=90)


def shapes(model, medias):
    """(number of crops, groups) of each media of one prompt."""
    engine = PrefillEngine(model, build_config(model="unused"))
    return [(len(one.pixels), len(one.grids)) for one in engine.patchify(medias)[0]]


def test_only_a_lone_picture_is_tiled(model):
    tiled = shapes(model, [picture()])[0]
    assert tiled[0] > 2 and tiled[1] == 2
    assert shapes(model, [picture(), clip()]) == [tiled, (4, 4)], "a video beside it changes nothing"
    assert shapes(model, [picture(), picture(seed=1)]) == [(1, 1)] * 2
    assert shapes(model, [picture(), picture(seed=1), clip(3)]) == [(1, 1), (1, 1), (3, 3)]
    assert shapes(model, [clip(2), clip(5)]) == [(2, 2), (5, 5)]


def test_a_newline_ends_each_row_picture_and_video(model):
    lone, video = model.family.patchify(picture()), model.family.patchify(clip())
    several = model.family.patchify(picture(), alone=False)
    rows, cols = lone.grids[1]
    ends = (lone.cell[:, 0] < 0).nonzero()[:, 0].tolist()
    assert ends == [25 + (cols + 1) * (row + 1) - 1 for row in range(rows)]
    for one, num in ((several, 26), (video, 4 * 9 + 1)):
        assert (one.cell[:, 0] < 0).nonzero()[:, 0].tolist() == [num - 1] and one.runs == (num,)
    assert video.grids == ((3, 3),) * 4 and video.frame_of_group == (0, 1, 2, 3)
    assert int(video.group[-1]) == 3, "the newline belongs to the last frame"


def test_the_template_s_order_is_asked_for(model):
    engine = PrefillEngine(model, build_config(model="unused"))
    assert engine.plan(engine.patchify([picture(), clip()])[0]).visual_mask.any()
    with pytest.raises(BadRequest, match="in the order <image>, <video>; give them in this order"):
        engine.plan(engine.patchify([clip(), picture()])[0])


def test_a_bright_spot_is_found_in_a_padded_picture(model):
    """The evidence cell of the only crop that differs lies where the picture differs, padding or not."""
    for height, width, at in ((40, 160, (1, 5)), (160, 40, (9, 0)), (90, 90, (4, 2))):
        plain = np.full((1, height, width, 3), 128, np.uint8)
        spot = plain.copy()
        side = max(height, width) // 10
        spot[0, at[0] * side : (at[0] + 1) * side, at[1] * side : (at[1] + 1) * side] = 255
        one, other = (model.family.patchify(Media(frames, np.zeros(1), "image", "x", 0.0), alone=False) for frames in (plain, spot))
        gap = (one.pixels.int() - other.pixels.int()).abs().sum((0, 1))[:70, :70].view(5, 14, 5, 14).sum((1, 3))
        ordinal = int(gap.flatten().argmax())
        (rows, cols), (row, col) = other.grids[0], other.cell[ordinal].tolist()
        middle = ((at[0] + 0.5) * side / height, (at[1] + 0.5) * side / width)
        assert abs((row + 0.5) / rows - middle[0]) <= 1 / rows and abs((col + 0.5) / cols - middle[1]) <= 1 / cols


def test_padding_has_the_mean_colour(model):
    crop = model.family.pixel_values(model.family.patchify(picture(20, 144), alone=False))[0]
    assert crop[:, :20].abs().max() < 1 / 100 and crop[:, 32:40].abs().max() > 0.1


def test_structural_tokens_survive_any_pruning(model):
    bench = Bench(model, build_config(model="unused", prefix_bytes=2**22, turn_bytes=2**22, prune_keep=0.01))
    for medias in ([picture()], [picture(), picture(seed=1)], [clip()], [picture(), clip()]):
        inputs, plan = bench.unpruned(medias)
        prefix = bench.prefix(medias, key=str(len(medias)) + medias[0].kind + medias[-1].kind)
        newlines = sum(int((one.cell[:, 0] < 0).sum()) for one in inputs)
        text = int((~plan.visual_mask).sum())
        assert int((~prefix.metadata.is_visual).sum()) == text + newlines
        assert prefix.metadata.num_visual == sum(one.num_tokens for one in inputs) - newlines


@pytest.mark.parametrize("value", ["anyres", "anyres_max_", "anyres_max_0", "anyres_max_-1", "square"])
def test_unknown_ways_of_tiling_are_refused(value):
    with pytest.raises(BadCheckpoint, match="vision_aspect_ratio"):
        max_tiles(value)


def test_the_tiles_budget_is_part_of_the_processor_hash(tmp_path, model):
    other = load_model(make_llava_onevision(tmp_path, vision_aspect_ratio="anyres_max_9"))
    assert other.processor_hash != model.processor_hash
    assert other.family.patchify(picture(144, 144)).grids[1] == (10, 10)
    assert model.family.patchify(picture(144, 144)).grids[1] == (7, 7)


def test_a_clip_tower_drops_its_summary_row(tmp_path):
    """The other tower under this family: the salience is then the summary row's."""
    directory = make_llava_onevision(
        tmp_path, vision_feature_layer=-2, vision_feature_select_strategy="default",
        vision_config={
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
            "num_attention_heads": 4, "patch_size": 14, "image_size": 72, "projection_dim": 32,
        },
    )  # fmt: skip
    model, stock = load_model(directory), tiny_qwen2_5_vl.hf_model(directory)
    assert json.loads((directory / "config.json").read_text())["vision_config"]["model_type"] == "clip_vision_model"
    inputs = model.family.patchify(picture())
    with torch.inference_mode():
        want = stock.model.get_image_features(model.family.pixel_values(inputs)[None], torch.tensor([inputs.size])).pooler_output[0]
    torch.testing.assert_close(model.family.encode([inputs]).embeds, want, atol=1e-5, rtol=1e-5)
