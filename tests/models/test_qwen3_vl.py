"""Qwen3-VL: sizes and timestamps as its processor has them, positions, the tower with its DeepStack levels, salience."""

import numpy as np
import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.preprocess import ClipRules
from sparsevila_cluster.pruning.keep_salient import KeepSalient
from sparsevila_cluster.pruning.pruning_method import PruningInput
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import qwen_features, qwen_inputs, type_ids
from tests.checkpoints.tiny_qwen3_vl import make_qwen3_vl
from tests.checkpoints.transformers_oracle import Bench


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_qwen3_vl(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def stock(directory):
    return tiny_qwen2_5_vl.hf_model(directory)


def clip(frames, fps=2.0, height=84, width=112, seed=0):
    return tiny_qwen2_5_vl.media(frames=frames, height=height, width=width, seed=seed, fps=fps)


@pytest.mark.parametrize("seed", range(40))
def test_video_sizes_equal_the_reference_processor(seed):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    rng = np.random.default_rng(seed)
    frames, height, width = int(rng.integers(2, 300)), int(rng.integers(8, 900)), int(rng.integers(8, 1500))
    low, high = int(rng.integers(1, 200)) * 1024, int(rng.integers(300, 9000)) * 1024
    rules = ClipRules(patch_size=16, min_pixels=low, max_pixels=high)
    want = smart_resize(frames, height, width, temporal_factor=2, factor=32, min_pixels=low, max_pixels=high)
    assert rules.frame_size(height, width, frames) == want


def test_video_sizes_with_a_cap_per_frame():
    rules = ClipRules(patch_size=16, min_pixels=4096, max_pixels=1 << 20, max_video_tokens=16, cap_pixels_per_frame=True)
    height, width = rules.frame_size(720, 1280, 8)
    assert height * width <= 16 * 32 * 32
    assert (height, width) == (96, 160)


def test_a_video_is_written_as_timestamped_blocks(model):
    media = clip(5, fps=2.0)  # at 0, 0.5, 1, 1.5, 2 s; the last frame stands for its missing partner
    inputs = model.family.patchify(media)
    ids = model.chat.prefix_ids(["video"], None, [inputs.spelling])
    text = model.chat._core.decode(ids, skip_special_tokens=False)
    block = "<|vision_start|><|video_pad|><|vision_end|>"
    assert text.endswith(f"user\n<0.2 seconds>{block}<1.2 seconds>{block}<2.0 seconds>{block}")
    plan = model.family.plan(ids, [inputs], "max+1")
    assert int(plan.visual_mask.sum()) == inputs.num_tokens == len(inputs.group)


@pytest.mark.parametrize("names", ["video", "image", "image,video", "video,image,video"])
def test_positions_equal_transformers(model, stock, names):
    kinds = names.split(",")
    medias = [tiny_qwen2_5_vl.media(kind, frames=3 + 2 * i, height=60 + 40 * i, width=140, seed=i) for i, kind in enumerate(kinds)]
    inputs = [model.family.patchify(media) for media in medias]
    plan = model.family.plan(model.chat.prefix_ids(kinds, None, [one.spelling for one in inputs]), inputs, "max+1")
    question = model.chat.question_ids("where?", True, None)[0]
    ids = torch.cat((plan.ids, torch.tensor(question)))
    grids = {key: value for key, value in qwen_inputs(model, inputs).items() if key.endswith("thw")}
    expected, delta = stock.model.get_rope_index(ids[None], **type_ids(model, plan, inputs, len(question)), **grids)
    after = plan.question_start_pos + torch.arange(len(question)).expand(3, -1)
    assert torch.equal(torch.cat((plan.positions, after), dim=1), expected[:, 0])
    assert plan.question_start_pos + len(question) == len(ids) + int(delta)


@pytest.mark.parametrize("patches", [1, 70, 4096])
def test_tokens_and_levels_equal_the_stock_tower(model, stock, patches):
    inputs = [model.family.patchify(tiny_qwen2_5_vl.media("image", height=70, width=200)), model.family.patchify(clip(6))]
    model.family.patches_per_pass = patches
    with torch.inference_mode():
        embeds, levels = qwen_features(stock, qwen_inputs(model, inputs))
        got = model.family.encode(inputs)
    torch.testing.assert_close(got.embeds, embeds, atol=1e-5, rtol=1e-5)
    assert len(got.deepstack) == len(levels) == 3
    for ours, theirs in zip(got.deepstack, levels, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_salience_equals_weights_written_out(model, stock):
    from transformers.models.qwen3_vl import modeling_qwen3_vl as modeling

    media = model.family.patchify(clip(4))
    seen, original = [], modeling.eager_attention_forward

    def watched(module, *args, **kwargs):
        out, weights = original(module, *args, **kwargs)
        if module is stock.model.visual.blocks[-1].attn:
            seen.append(weights[0])
        return out, weights

    modeling.eager_attention_forward = watched
    try:
        with torch.inference_mode():
            qwen_features(stock, qwen_inputs(model, [media]))
    finally:
        modeling.eager_attention_forward = original
    want = torch.cat([w.mean((0, 1)) * w.shape[-1] for w in seen]).view(-1, 4).mean(-1)
    torch.testing.assert_close(model.family.encode([media]).salience, want, atol=1e-5, rtol=1e-5)


def test_every_level_is_pruned_with_the_same_index(model):
    """Zeroing a DeepStack level of kept tokens changes the KV; of pruned tokens, nothing."""
    media, family = clip(6, seed=3), model.family

    def keys(spoil):
        bench = Bench(model, build_config(model="unused", prune_keep=0.4, prefix_bytes=2**22, turn_bytes=2**22))
        original = family.encode

        def spoiled(inputs, **options):
            tokens = original(inputs, **options)
            kept = torch.zeros(len(tokens.embeds), dtype=torch.bool)
            [media] = inputs
            given = PruningInput(tokens.embeds, tokens.salience, tokens.group, tokens.cell, media.grids, media.kind)
            kept[KeepSalient(0.4, "per_group").keep(given)] = True
            if spoil is not None:
                tokens.deepstack[1][kept if spoil == "kept" else ~kept] = 0.0
            return tokens

        family.encode = spoiled
        try:
            return bench.prefix(media).extent.rows(3)[0].clone()
        finally:
            del family.encode

    plain = keys(None)
    assert torch.equal(keys("pruned"), plain)
    assert not torch.allclose(keys("kept"), plain, atol=1e-3)


def test_one_frame_is_a_video_too(model):
    inputs = model.family.patchify(clip(1))
    assert inputs.grid[0] == 1 and len(inputs.runs) == 1


def test_parts_without_vision(directory):
    decode = load_model(directory, parts=("embed", "llm", "head"))
    media = Media(np.zeros((2, 64, 64, 3), np.uint8), np.arange(2.0), "video", "x", 2.0)
    assert decode.family.patchify(media).num_tokens > 0
    with pytest.raises(AssertionError, match="vision"):
        decode.family.encode([decode.family.patchify(media)])


def test_bfloat16_is_near_float32(tmp_path):
    directory = make_qwen3_vl(tmp_path, dtype=torch.bfloat16, layout="modern")
    exact, rounded = load_model(directory, dtype="float32"), load_model(directory, dtype="bfloat16")
    inputs = [exact.family.patchify(clip(4))]
    one, other = exact.family.encode(inputs), rounded.family.encode(inputs)
    assert other.embeds.dtype == torch.bfloat16
    assert float((one.embeds - other.embeds.float()).norm() / one.embeds.norm()) < 0.05
    torch.testing.assert_close(one.salience, other.salience, atol=0.1, rtol=0.1)
