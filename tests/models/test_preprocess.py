"""Our preprocessing against the stock image processor, and its rules for videos, odd sizes and config layouts."""

import json

import numpy as np
import pytest
import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.families.qwen2_5_vl import Qwen25VL
from sparsevila_cluster.models.preprocess import PixelRules, cut_patches, normalize, read_rules, resize
from tests.checkpoints import tiny_qwen2_5_vl

LOW, HIGH = 56 * 56, 28 * 28 * 64
SIZES = [(84, 112), (28, 28), (1, 1), (90, 100), (57, 56), (3, 500), (1, 200), (300, 37), (720, 1280), (1080, 1920)]


def run(frames, rules):
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    height, width = rules.frame_size(*frames.shape[1:3], len(frames))
    patches, grid = cut_patches(resize(pixels, height, width, rules.resample), rules)
    return normalize(patches, rules), grid


@pytest.mark.parametrize("height,width", SIZES)
def test_images_equal_the_stock_processor(height, width):
    """Without resizing to float rounding. With resizing, the stock processor that runs here uses Pillow, whose fixed-point
    bicubic differs from torch's by single grey levels (0.015 after normalization)."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = tiny_qwen2_5_vl.media("image", height=height, width=width).frames
    stock = Qwen2VLImageProcessorPil(size={"shortest_edge": LOW, "longest_edge": HIGH})
    expected = stock(images=[image[0]], return_tensors="pt", input_data_format="channels_last")
    got, (groups, rows, cols) = run(image, PixelRules(min_pixels=LOW, max_pixels=HIGH))
    assert expected["image_grid_thw"].tolist() == [[groups, rows * 2, cols * 2]]
    gap = (got - expected["pixel_values"]).abs()
    resized = (rows * 28, cols * 28) != (height, width) and height * width > 1
    assert gap.max() < (0.07 if resized else 1e-6)
    assert gap.mean() < 5e-3


@pytest.mark.parametrize("frames", [2, 6])
def test_a_group_of_equal_frames_is_the_patches_of_their_image(frames):
    image = tiny_qwen2_5_vl.media("image", height=100, width=90).frames
    rules = PixelRules(min_pixels=LOW, max_pixels=HIGH)
    expected, (_, rows, cols) = run(image, rules)
    got, grid = run(np.repeat(image, frames, axis=0), rules)
    assert grid == (frames // 2, rows, cols)
    assert torch.equal(got, expected.repeat(frames // 2, 1))


def test_patch_order():
    """One pixel per patch and value: every coordinate can be read back."""
    rules = PixelRules(patch_size=1, temporal_patch_size=2, merge_size=2)
    frames = torch.arange(4 * 3 * 4 * 6).to(torch.uint8).view(4, 3, 4, 6)
    patches, grid = cut_patches(frames, rules)
    assert grid == (2, 2, 3) and patches.shape == (48, 6)
    order = [(g, 2 * r + i, 2 * c + j) for g in range(2) for r in range(2) for c in range(3) for i in range(2) for j in range(2)]
    for patch, (g, row, col) in zip(patches, order, strict=True):
        assert patch.tolist() == [int(frames[2 * g + f, ch, row, col]) for ch in range(3) for f in range(2)]


def test_odd_frame_counts_repeat_the_last_frame(model):
    media = tiny_qwen2_5_vl.media(frames=5)
    filled = Media(np.concatenate((media.frames, media.frames[-1:])), media.times_s, "video", "x", media.duration_s)
    odd, even = model.family.patchify(media), model.family.patchify(filled)
    assert odd.grid == even.grid and odd.grid[0] == 3
    assert torch.equal(odd.pixels, even.pixels) and odd.pixels.dtype == torch.uint8
    assert odd.frame_of_group == (0, 2, 4)


# (frames, height, width, cap, max_video_tokens) -> (height, width); as the stock video processor, run once with torchvision.
VIDEO_SIZES = {
    (64, 720, 1280, False, 128000): (448, 840),
    (64, 720, 1280, True, 128000): (448, 840),
    (64, 720, 1280, True, 2000): (140, 280),
    (4, 300, 200, True, 2000): (308, 196),
    (1, 90, 100, True, 2000): (84, 112),
}


@pytest.mark.parametrize("case", VIDEO_SIZES)
def test_video_pixel_budget(case):
    frames, height, width, cap, tokens = case
    rules = PixelRules(min_pixels=LOW, max_pixels=HIGH * 8, cap_pixels_per_frame=cap, max_video_tokens=tokens)
    assert rules.frame_size(height, width, frames) == VIDEO_SIZES[case]


@pytest.mark.parametrize("height,width", [(1, 201), (20100, 100)])
def test_extreme_aspect_ratios_are_refused(model, height, width):
    media = Media(np.zeros((1, height, width, 3), np.uint8), np.zeros(1), "image", "x", 0.0)
    with pytest.raises(BadMedia, match="aspect ratio 201"):
        model.family.patchify(media)


@pytest.mark.parametrize("shape", [(0, 28, 28, 3), (1, 0, 28, 3), (1, 28, 28, 4), (28, 28, 3)])
def test_frames_of_a_wrong_shape_are_refused(model, shape):
    with pytest.raises(BadMedia, match="frames must be uint8"):
        model.family.patchify(Media(np.zeros(shape, np.uint8), np.zeros(1), "image", "x", 0.0))


def rules_of(tmp_path, files):
    (tmp_path / "config.json").write_text("{}")
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    return read_rules(Checkpoint(tmp_path, {}, {}, {}), Qwen25VL.image_defaults, Qwen25VL.video_defaults)


SIZE = {"shortest_edge": 1024, "longest_edge": 9216}
NESTED = {"image_processor": {"size": SIZE}, "video_processor": {"size": {**SIZE, "longest_edge": 4096}, "patch_size": 8}}
LAYOUTS = {
    "min and max": ({"preprocessor_config.json": {"min_pixels": 1024, "max_pixels": 9216}}, (1024, 9216), (1024, 9216)),
    "size": ({"preprocessor_config.json": {"size": SIZE}}, (1024, 9216), (1024, 9216)),
    "min and max in size": (
        {"preprocessor_config.json": {"size": {"min_pixels": 1024, "max_pixels": 9216}}}, (1024, 9216), (1024, 9216)
    ),
    "both: min and max win": ({"preprocessor_config.json": {"size": SIZE, "max_pixels": 2048}}, (1024, 2048), (1024, 2048)),
    "own video file": (
        {"preprocessor_config.json": {"size": SIZE}, "video_preprocessor_config.json": {"min_pixels": 3136}},
        (1024, 9216), (3136, 28 * 28 * 768),
    ),
    "nested": ({"processor_config.json": NESTED}, (1024, 9216), (1024, 4096)),
    "nested wins": ({"processor_config.json": NESTED, "preprocessor_config.json": {"min_pixels": 1}}, (1024, 9216), (1024, 4096)),
    "not nested": ({"processor_config.json": {"processor_class": "X"}, "preprocessor_config.json": {"size": SIZE}},
                   (1024, 9216), (1024, 9216)),
    "defaults": ({"preprocessor_config.json": {}}, (3136, 28 * 28 * 1280), (128 * 28 * 28, 28 * 28 * 768)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_config_layouts(tmp_path, name):
    files, image_limits, video_limits = LAYOUTS[name]
    rules = rules_of(tmp_path, files)
    image, video = rules["image"], rules["video"]
    assert (image.min_pixels, image.max_pixels) == image_limits
    assert (video.min_pixels, video.max_pixels) == video_limits


BROKEN = {
    "resample 1": {"resample": 1},
    "image_mean": {"image_mean": [0.5]},
    "image_std": {"image_std": [0.5, 0.0, 0.5]},
    "max_pixels 10 is below": {"min_pixels": 100, "max_pixels": 10},
    "patch_size must be at least 1": {"patch_size": 0},
    "processor config": {"patch_size": "a"},
    "`size`": {"size": 224},
}


@pytest.mark.parametrize("message", sorted(BROKEN))
def test_illegal_processor_configs_are_named(tmp_path, message):
    with pytest.raises(BadCheckpoint, match=message):
        rules_of(tmp_path, {"preprocessor_config.json": BROKEN[message]})
