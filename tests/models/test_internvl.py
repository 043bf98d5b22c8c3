"""InternVL: tiles and prompts as its processor has them, the tower and its variants, salience."""

import json

import numpy as np
import pytest
import torch

from sparsevila_cluster.core.errors import BadMedia, BadRequest
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import DECODE_PARTS, load_model
from sparsevila_cluster.models.families.internvl import TileRules, shuffle
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.tiny_internvl import SIDE, SPECIAL, TOKENS, changed, internvl_features, internvl_inputs, make_internvl

PER_SIDE = 4  # tokens on one side of a tile


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, device="cpu")


@pytest.fixture(scope="module")
def stock(directory):
    return tiny_qwen2_5_vl.hf_model(directory)


@pytest.fixture(scope="module")
def processor(directory):
    """The reference processor on Pillow. It asks for a video processor, of which there is no form without torchvision."""
    from transformers import AutoTokenizer, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    class WithoutVideos(InternVLProcessor):
        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    pictures, tokenizer = GotOcr2ImageProcessorPil.from_pretrained(str(directory)), AutoTokenizer.from_pretrained(str(directory))
    return WithoutVideos(pictures, tokenizer, None, image_seq_length=TOKENS, chat_template=tokenizer.chat_template)


def picture(height, width, seed=0):
    return tiny_qwen2_5_vl.media("image", height=height, width=width, seed=seed)


def clip(frames=4, height=84, width=112, seed=0):
    return tiny_qwen2_5_vl.media(frames=frames, height=height, width=width, seed=seed)


# ---- tiles -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_the_canvas_equals_the_reference(seed):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    rng = np.random.default_rng(seed)
    low = int(rng.integers(1, 6))
    rules = TileRules(side=int(rng.integers(1, 20)) * 28, min_tiles=low, max_tiles=low + int(rng.integers(0, 12)))
    for _ in range(20):
        # Multiples of the side hit the ties between canvases of one aspect ratio.
        height, width = (int(x) for x in rng.integers(1, 1500, 2)) if rng.random() < 0.5 else (rules.side * rng.integers(1, 7, 2))
        height, width = int(height), int(width)
        cols, rows = get_optimal_tiled_canvas((height, width), (rules.side, rules.side), low, rules.max_tiles)
        assert rules.canvas(height, width) == (rows, cols)


SIZES = [(112, 112), (224, 336), (100, 90), (1, 1), (3, 700), (700, 40), (448, 447), (300, 211), (1, 60)]


@pytest.mark.parametrize("height,width", SIZES)
def test_images_equal_the_reference_processor(model, processor, height, width):
    """Prompt and tiles, in number and order. Pillow's fixed-point bicubic differs from torch's by single grey levels."""
    media = picture(height, width)
    inputs = model.family.patchify(media)
    want = processor(images=[media.frames[0]], text="<IMG_CONTEXT>", input_data_format="channels_last")
    plan = model.family.plan(model.chat.prefix_ids(["image"], None, [inputs.spelling]), [inputs])
    assert plan.ids.tolist()[-len(want["input_ids"][0]) :] == want["input_ids"][0]
    assert plan.positions.tolist() == [list(range(len(plan.ids)))] and plan.question_start_pos == len(plan.ids)
    assert inputs.pixels.dtype == torch.uint8
    got, expected = model.family.pixel_values(inputs), torch.as_tensor(np.stack(want["pixel_values"]))
    assert got.shape == expected.shape
    assert len(got) == processor.image_processor.get_number_of_image_patches(height, width, {"crop_to_patches": True})
    gap = (got - expected).abs()
    assert gap.max() < 0.04 and gap.mean() < 5e-3
    if height % SIDE == width % SIDE == 0:
        whole = height * width // SIDE**2
        assert gap[:whole].max() < 1e-5, "tiles that nobody resized are exact"


@pytest.mark.parametrize("height,width", [(300, 500), (60, 640)])
def test_cells_say_where_in_the_picture_a_token_is(model, height, width):
    """Rows and columns of brightness, read back from the pixels of each token's patches."""
    down, right = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    frame = np.stack([down, right, 0 * down], -1).astype(np.uint8)
    inputs = model.family.patchify(Media(frame[None], np.zeros(1), "image", "x", 0.0))
    assert len(inputs.grids) == 2 and inputs.grids[1] == (PER_SIDE, PER_SIDE) and inputs.frame_of_group == (0, 0)
    rows, cols = inputs.grids[0]
    assert len(inputs.pixels) == rows * cols // TOKENS + 1
    patches = inputs.pixels.float().unfold(2, 28, 28).unfold(3, 28, 28).mean((-1, -2)).permute(0, 2, 3, 1).reshape(-1, 3)
    grid = torch.tensor(inputs.grids)[inputs.group.long()]
    expected = (inputs.cell + 0.5) / grid * 255
    torch.testing.assert_close(patches[:, :2], expected, atol=3.0, rtol=0)
    assert len(torch.cat((inputs.group[:, None], inputs.cell), 1).unique(dim=0)) == inputs.num_tokens


def test_frames_are_one_tile_each(model):
    media = clip(5, height=50, width=300)
    inputs = model.family.patchify(media)
    assert inputs.pixels.shape == (5, 3, SIDE, SIDE) and inputs.runs == (TOKENS,) * 5
    assert inputs.grids == ((PER_SIDE, PER_SIDE),) * 5 and inputs.frame_of_group == tuple(range(5))
    alone = [model.family.patchify(Media(media.frames[i : i + 1], np.zeros(1), "video", "x", 0.5)) for i in range(5)]
    assert torch.equal(inputs.pixels, torch.cat([one.pixels for one in alone]))
    with pytest.raises(BadMedia, match="frames must be uint8"):
        model.family.patchify(Media(np.zeros((1, 0, 28, 3), np.uint8), np.zeros(1), "image", "x", 0.0))


@pytest.mark.parametrize("limits,num", [({"max_patches": 1}, 1), ({"max_patches": 4}, 5), ({"min_patches": 9}, 10)])
def test_the_number_of_tiles_obeys_the_checkpoint(directory, tmp_path, model, limits, num):
    other = load_model(changed(directory, tmp_path / "x", "preprocessor_config.json", **limits), DECODE_PARTS, device="cpu")
    assert len(other.family.patchify(picture(300, 300)).pixels) == num
    assert other.processor_hash != model.processor_hash


# ---- the prompt --------------------------------------------------------------------------------------------------------------

QUESTIONS = ["what colour is the star?", "\n\nyes", " and\nnew lines ", "ünïcode 😀", ""]


@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("kinds", ["video", "image", "image,video,image", "video,video"])
def test_prompts_equal_the_reference_processor(model, processor, kinds, system):
    """Prefix and question, tokenized apart, against the whole with the processor's own words for each media."""
    kinds = kinds.split(",")
    inputs = [
        model.family.patchify(clip(2 + i, seed=i) if kind == "video" else picture(150, 200 + 100 * i))
        for i, kind in enumerate(kinds)
    ]
    words = [
        processor.replace_video_token({"pixel_values_videos": [media.pixels]}, 0)
        if media.kind == "video"
        else processor.replace_image_token({"num_patches": [len(media.pixels)]}, 0)
        for media in inputs
    ]
    plan = model.family.plan(model.chat.prefix_ids(kinds, system, [media.spelling for media in inputs]), inputs, "hf5")
    assert processor.tokenizer.decode(plan.ids[-1:]) == "</img>"
    for question in QUESTIONS:
        messages = [] if system is None else [{"role": "system", "content": system}]
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        text = processor.apply_chat_template([*messages, {"role": "user", "content": content}], add_generation_prompt=True)
        pieces = text.replace("<IMG_CONTEXT>", "\0").replace("<video>", "\0").split("\0")
        text = "".join(piece + word for piece, word in zip(pieces, [*words, ""], strict=True))
        got, start, stop = model.chat.question_ids(question, True, None)
        assert plan.ids.tolist() + got == processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.decode(got[start:stop]) in ("\n" + question, question)
    assert plan.visual_mask.sum() == sum(media.num_tokens for media in inputs)


@pytest.mark.parametrize("token", SPECIAL)
def test_control_tokens_are_refused(model, token):
    with pytest.raises(BadRequest, match="control token"):
        model.chat.question_ids(f"what {token} now", True, None)


# ---- the tower ---------------------------------------------------------------------------------------------------------------

MEDIA = {
    "image": [picture(112, 100)],
    "wide image": [picture(90, 500)],
    "tall image": [picture(640, 120)],
    "video": [clip(5)],
    "video between images": [picture(224, 230), clip(3), picture(40, 40)],
}


@pytest.mark.parametrize("name", MEDIA)
@pytest.mark.parametrize("crops", [1, 3, 64])
def test_tokens_equal_the_stock_model(model, stock, name, crops, monkeypatch):
    inputs = [model.family.patchify(media) for media in MEDIA[name]]
    monkeypatch.setattr(model.family, "crops_per_pass", crops)
    with torch.inference_mode():
        want, _ = internvl_features(stock, internvl_inputs(model, inputs))
    seen = []
    got = model.family.encode(inputs, report=lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(got.embeds, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.family.encode(inputs, needs=()).embeds, want, atol=1e-5, rtol=1e-5)
    assert len(got.embeds) == len(got.salience) == len(got.group) == len(got.cell) == sum(media.num_tokens for media in inputs)
    assert got.group.max() + 1 == sum(len(media.grids) for media in inputs)
    done = [at for at, _ in seen]
    assert done == sorted(done) and done[0] == 0 and done[-1] == seen[0][1] == len(internvl_inputs(model, inputs)["pixel_values"])
    assert max(b - a for a, b in zip(done, done[1:], strict=False)) <= crops


def explicit_salience(stock, pixels):
    """Column means of the last layer's weights times the rows of a tile, patch by patch into the token that holds it."""
    stock.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = stock.model.vision_tower(pixels, output_attentions=True).attentions[-1]  # [tiles, heads, S, S]
    received = weights.mean((1, 2)) * weights.shape[-1]
    side, found = 2 * PER_SIDE, []
    for tile in received[:, 1:].tolist():
        for row in range(PER_SIDE):
            for col in range(PER_SIDE):
                four = [tile[(2 * row + i) * side + 2 * col + j] for i in (0, 1) for j in (0, 1)]
                found.append(sum(four) / 4)
    return torch.tensor(found)


@pytest.mark.parametrize("name", MEDIA)
def test_salience_equals_weights_written_out(model, stock, name):
    inputs = [model.family.patchify(media) for media in MEDIA[name]]
    want = explicit_salience(stock, internvl_inputs(model, inputs)["pixel_values"])
    for crops in (1, 64):
        model.family.crops_per_pass = crops
        got = model.family.encode(inputs).salience
        torch.testing.assert_close(got, want, atol=2e-5, rtol=0)
    assert got.dtype == torch.float32 and got.std() > 0.02
    assert torch.equal(model.family.encode(inputs, needs=()).salience, torch.ones(len(want)))


VARIANTS = {
    "query and key norms": {"vision": {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}},
    "class pooling": {"vision": {"use_mean_pooling": False}},
    "mask token, no positions": {"vision": {"use_mask_token": True}},
    "layer -2": {"vision_feature_layer": -2, "vision": {"use_mean_pooling": False}},
    "layer 3 of 3": {"vision_feature_layer": 3, "vision": {"use_mean_pooling": False}},
    "layer 1": {"vision_feature_layer": 1},
    "no shuffle": {"downsample_ratio": 1.0, "image_seq_length": 64},
    "4x4 shuffle": {"downsample_ratio": 0.25, "image_seq_length": 4},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_tower_equal_the_stock_model(tmp_path, name):
    directory = make_internvl(tmp_path, layers=1, **VARIANTS[name])
    if "image_seq_length" in VARIANTS[name]:
        path = directory / "processor_config.json"
        path.write_text(json.dumps({"image_seq_length": VARIANTS[name]["image_seq_length"]}))
    model, stock = load_model(directory, device="cpu"), tiny_qwen2_5_vl.hf_model(directory)
    inputs = [model.family.patchify(picture(130, 240))]
    with torch.inference_mode():
        want, _ = internvl_features(stock, internvl_inputs(model, inputs))
    got = model.family.encode(inputs)
    torch.testing.assert_close(got.embeds, want, atol=1e-5, rtol=1e-5)
    layer = model.config.vision_feature_layer
    assert len(model.family._tower.layers) == (4 + layer if layer < 0 else layer), "no layer runs in vain"


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_shuffle_joins_neighbours(merge):
    rows, cols = 2 * merge, 3 * merge
    names = torch.arange(rows * cols).view(1, rows, cols, 1)
    tokens = shuffle(names, merge)[0, :, :, 0].tolist()
    assert tokens == [
        [(row * merge + i) * cols + col * merge + j for i in range(merge) for j in range(merge)]
        for row in range(2)
        for col in range(3)
    ]
