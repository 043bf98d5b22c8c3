"""Both LLaVA families against their stock processors: pixels, counts, prompts; configs that do not fit are refused by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sparsevila_cluster.core.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import load_model
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import FAMILIES
from tests.models.test_llava_families import NAMES, PROMPTS, patchify


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory):
    return FAMILIES[request.param].make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


def stock_processor(directory, model):
    """The checkpoint's own processor with the image processor that needs no torchvision."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    own = json.loads((directory / "processor_config.json").read_text())
    common = {"tokenizer": model.chat._tokenizer, "chat_template": model.chat._template}
    common["vision_feature_select_strategy"] = own["vision_feature_select_strategy"]
    if model.family.name == "llava_next":
        images = LlavaNextImageProcessorPil.from_pretrained(str(directory))
        return LlavaNextProcessor(images, patch_size=own["patch_size"], num_additional_image_tokens=1, **common)

    class Unchecked(LlavaOnevisionProcessor):
        """Without a video processor: that one imports torchvision."""

        def check_argument_for_proper_class(self, argument_name, argument):
            return type(argument)

    images = LlavaOnevisionImageProcessorPil.from_pretrained(str(directory))
    counts = {name: own[name] for name in ("num_image_tokens", "vision_aspect_ratio")}
    return Unchecked(images, video_processor=None, **counts, **common)


@pytest.mark.parametrize("name", ["image", "tall image", "wide image", "two images"])
def test_pictures_and_prompts_equal_the_stock_processor(directory, model, name):
    """Pixels to single grey levels, as Pillow's fixed-point bicubic differs from torch's; ids exactly."""
    inputs, medias = patchify(model, PROMPTS[name])
    text = model.chat._tokenizer.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image"} for _ in medias), {"type": "text", "text": "what is it?"}]}],
        chat_template=model.chat._template, tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    pictures = [Image.fromarray(media.frames[0]) for media in medias]
    want = stock_processor(directory, model)(images=[pictures], text=[text], return_tensors="pt")
    prefix = model.chat.prefix_ids([media.kind for media in medias], None, [one.spelling for one in inputs])
    plan = model.family.plan(prefix, inputs)
    question = model.chat.question_ids("what is it?", True, None)[0]
    assert plan.ids.tolist() + question == want["input_ids"][0].tolist()
    assert torch.equal(plan.positions, torch.arange(len(plan.ids))[None]) and plan.question_start_pos == len(plan.ids)
    given = FAMILIES[model.family.name].stock_inputs(model, inputs)
    assert torch.equal(given["image_sizes"], want["image_sizes"])
    for ours, theirs, media in zip(given["pixel_values"], want["pixel_values"], inputs, strict=True):
        gap = (ours - theirs)[: len(media.pixels)].abs()
        assert gap.max() < 0.13 and gap.mean() < 0.01


def test_pictures_that_need_no_resizing_are_exact(directory, model):
    """A picture of just one tile, and the tiles of one as large as its canvas."""
    side = model.config.vision_config.image_size
    processor = stock_processor(directory, model).image_processor
    for height, width in ((side, side), (2 * side, 2 * side), (side, 2 * side)):
        media = tiny_qwen2_5_vl.media("image", height=height, width=width)
        want = processor([Image.fromarray(media.frames[0])], return_tensors="pt")["pixel_values"][0]
        got = model.family.pixel_values(model.family.patchify(media))
        tiles = slice(int((height, width) != (side, side)), len(got))
        torch.testing.assert_close(got[tiles], want[tiles], atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(25))
def test_counts_equal_the_stock_processor(directory, model, seed):
    rng = np.random.default_rng(seed)
    height, width = (int(x) for x in rng.integers(1, 500, 2))
    counts = stock_processor(directory, model)._get_num_multimodal_tokens(image_sizes=[(height, width)])
    assert (
        model.family.patchify(tiny_qwen2_5_vl.media("image", height=height, width=width)).num_tokens == counts.num_image_tokens[0]
    )


def test_a_frame_is_a_base_view(model):
    """Squashed to a square whatever its shape, as the base view of a picture is."""
    video = tiny_qwen2_5_vl.media("video", frames=3, height=50, width=120)
    frames = model.family.pixel_values(model.family.patchify(video))
    for i, frame in enumerate(frames):
        alone = Media(video.frames[i : i + 1], np.zeros(1), "image", "x", 0.0)
        torch.testing.assert_close(frame, model.family.pixel_values(model.family.patchify(alone))[0])


@pytest.mark.parametrize("shape", [(0, 28, 28, 3), (1, 0, 28, 3), (1, 28, 28, 4)])
def test_frames_of_a_wrong_shape_are_refused(model, shape):
    for kind in ("image", "video"):
        with pytest.raises(BadMedia, match="frames must be uint8"):
            model.family.patchify(Media(np.zeros(shape, np.uint8), np.zeros(1), kind, "x", 0.0))


BROKEN_CONFIG = {
    "vision_feature_layer 9": {"vision_feature_layer": 9},
    "vision_feature_layer 0": {"vision_feature_layer": 0},
    r"vision_feature_layer \[\]": {"vision_feature_layer": []},
    "vision_feature_select_strategy": {"vision_feature_select_strategy": None},
    "config.json: image_grid_pinpoints must be a list": {"image_grid_pinpoints": [336, 672]},
    "image_grid_pinpoints.*multiples": {"image_grid_pinpoints": [[100, 100]]},
    "image_grid_pinpoints.*is not config.json's": {"image_grid_pinpoints": [[720 * 7, 720 * 7]]},
    "vision tower 'vit' is not supported": {"vision_config": {"model_type": "vit", "image_size": 56, "patch_size": 14}},
}


@pytest.mark.parametrize("message", sorted(BROKEN_CONFIG))
def test_configs_that_do_not_fit_are_refused(directory, tmp_path, message):
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = copy / "config.json"
    config = json.loads(path.read_text())
    changes = dict(BROKEN_CONFIG[message])
    if "vision_feature_select_strategy" in changes:
        other = {"full": "default", "default": "full"}[config["vision_feature_select_strategy"]]
        changes["vision_feature_select_strategy"] = other
    path.write_text(json.dumps({**config, **changes}))
    with pytest.raises(BadCheckpoint, match=message):
        load_model(copy)


BROKEN_PROCESSOR = {
    "preprocessor_config.json: do_resize": {"do_resize": False},
    "preprocessor_config.json: size": {"size": {"height": 64, "width": 72}},
    "preprocessor_config.json: crop_size": {"crop_size": {"height": 30, "width": 30}},
    "preprocessor_config.json: resample 1": {"resample": 1},
    "preprocessor_config.json: image_mean": {"image_mean": [0.5]},
    "preprocessor_config.json: could not convert": {"image_std": ["a", 1, 1]},
    "preprocessor_config.json: image_grid_pinpoints .* is not config.json's": {"image_grid_pinpoints": [[56, 56]]},
    "preprocessor_config.json: image_grid_pinpoints must be a list": {"image_grid_pinpoints": [["a", 56]]},
}


@pytest.mark.parametrize("message", sorted(BROKEN_PROCESSOR))
def test_processors_that_do_not_fit_are_refused(directory, tmp_path, message):
    copy = shutil.copytree(directory, tmp_path / "copy")
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **BROKEN_PROCESSOR[message]}))
    with pytest.raises(BadCheckpoint, match=message):
        load_model(copy)
