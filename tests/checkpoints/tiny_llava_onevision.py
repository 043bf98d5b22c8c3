"""A complete tiny LLaVA-OneVision checkpoint with random weights (SigLIP, Qwen2), and its media for stock transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.checkpoints import tiny_qwen2_5_vl

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
# Writes what the published template writes: a blank after the role, pictures, then videos, then the text on its own line.
TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + ' ' }}"
    "{% for part in turn['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Five patches of 14 pixels and two pixels over, as the published 27 and six: odd, so that pooling rounds up.
CROP, PATCH = 72, 14
CANVASES = [[CROP * rows, CROP * cols] for rows, cols in ((1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 3))]
ASPECT = "anyres_max_2"


def make_llava_onevision(
    directory: str | Path,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    layout: Literal["hub", "modern"] = "hub",
    shards: int = 1,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    **config_changes: Any,
) -> Path:
    """Write a checkpoint: crops of 5x5 patches, up to 3x3 tiles shrunk to about two tiles' cells, 4 heads over 2 KV heads.

    layout "hub": `language_model.model.*` and `vision_tower.vision_model.*`, preprocessor_config.json and
    video_preprocessor_config.json, template in chat_template.json, as the published checkpoints; "modern": what transformers 5
    saves. config_changes: top-level keys of config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    template = None if layout == "hub" else TEMPLATE
    vocab_size = tiny_qwen2_5_vl.write_tokenizer(directory, layout, SPECIAL, template)
    if layout == "hub":
        tiny_qwen2_5_vl.write_json(directory / "chat_template.json", {"chat_template": TEMPLATE})
    special = {name: vocab_size - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}
    config = {**_config(layers, hidden, vocab_size, special, tie, dtype), **config_changes}
    tiny_qwen2_5_vl.write_json(directory / "config.json", published(config) if layout == "hub" else config)
    eos = [special["<|im_end|>"], special["<|endoftext|>"]]
    tiny_qwen2_5_vl.write_json(directory / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    _write_processor(directory, layout)
    weights = _random_weights(config, seed, dtype)
    if tie:
        del weights["lm_head.weight"]
    if layout == "hub":
        weights = {hub_name(name): tensor for name, tensor in weights.items()}
    tiny_qwen2_5_vl.write_weights(directory, weights, shards)
    return directory


def stock_inputs(model: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """Pixels as the stock model takes them; pictures of several sizes are filled up to one number of crops."""
    given: dict[str, Any] = {}
    images = [media for media in inputs if media.kind == "image"]
    videos = [media for media in inputs if media.kind == "video"]
    if images:
        given["pixel_values"] = stack([model.family.pixel_values(media) for media in images])
        given["image_sizes"] = torch.tensor([media.size for media in images])
        given["batch_num_images"] = torch.tensor([len(images)])
    if videos:
        given["pixel_values_videos"] = stack([model.family.pixel_values(media) for media in videos])
        given["frames"] = [len(media.pixels) for media in videos]
        if len(set(given["frames"])) == 1:
            del given["frames"]  # `generate` refuses what the model does not take
    return given


def stock_features(stock: Any, given: dict[str, Any]) -> tuple[Tensor, Sequence[Tensor]]:
    """(visual embeddings [N, D], no levels) in prompt order: pictures before videos, as the template writes them."""
    parts = []
    if "pixel_values" in given:
        sizes, num = given["image_sizes"], given["batch_num_images"]
        parts += stock.model.get_image_features(given["pixel_values"], sizes, batch_num_images=num).pooler_output
    if "pixel_values_videos" in given:
        videos = given["pixel_values_videos"]
        for video, num in zip(videos, given.get("frames", [videos.shape[1]] * len(videos)), strict=True):
            parts += stock.model.get_video_features(video[None, :num]).pooler_output
    return torch.cat(list(parts)), ()


def stack(pixels: Sequence[Tensor]) -> Tensor:
    """[media, most crops, 3, H, W], filled up with zeros."""
    most = max(len(one) for one in pixels)
    return torch.stack([torch.cat((one, one.new_zeros(most - len(one), *one.shape[1:]))) for one in pixels])


def hub_name(name: str) -> str:
    """The name of a tensor in published checkpoints of both LLaVA families."""
    if name == "lm_head.weight":
        return "language_model.lm_head.weight"
    name = name.removeprefix("model.")
    for ours, theirs in (("language_model.", "language_model.model."), ("vision_tower.", "vision_tower.vision_model.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def published(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it was published: `torch_dtype`, `rope_theta`, no `rope_parameters`."""
    text = dict(config["text_config"])
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text["torch_dtype"] = text.pop("dtype")
    old = {**config, "text_config": text, "torch_dtype": config["dtype"]}
    del old["dtype"]
    return old


def _config(layers: int, hidden: int, vocab_size: int, special: dict[str, int], tie: bool, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    text = {
        "model_type": "qwen2", "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "initializer_range": 0.12, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"], "tie_word_embeddings": tie, "dtype": name,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "patch_size": PATCH, "image_size": CROP, "vision_use_head": False,
    }  # fmt: skip
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision", "text_config": text,
        "vision_config": vision, "image_token_index": special["<image>"], "video_token_index": special["<video>"],
        "image_grid_pinpoints": CANVASES, "vision_aspect_ratio": ASPECT, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "projector_hidden_act": "gelu", "tie_word_embeddings": tie, "dtype": name,
        "transformers_version": "5.0.0",
    }  # fmt: skip


def _random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    return tiny_qwen2_5_vl.random_weights(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig.from_dict(config), seed, dtype
    )


def _write_processor(directory: Path, layout: str) -> None:
    common = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "size": {"height": CROP, "width": CROP},
    }  # fmt: skip
    image = {**common, "do_pad": True, "image_grid_pinpoints": CANVASES, "image_processor_type": "LlavaOnevisionImageProcessor"}
    video = {**common, "video_processor_type": "LlavaOnevisionVideoProcessor"}
    own = {
        "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>",
        "num_image_tokens": (CROP // PATCH) ** 2, "vision_feature_select_strategy": "full", "vision_aspect_ratio": ASPECT,
    }  # fmt: skip
    if layout == "hub":
        tiny_qwen2_5_vl.write_json(directory / "preprocessor_config.json", {**image, "processor_class": "LlavaOnevisionProcessor"})
        tiny_qwen2_5_vl.write_json(
            directory / "video_preprocessor_config.json", {**video, "processor_class": "LlavaOnevisionProcessor"}
        )
        tiny_qwen2_5_vl.write_json(directory / "processor_config.json", own)
        return
    tiny_qwen2_5_vl.write_json(directory / "processor_config.json", {**own, "image_processor": image, "video_processor": video})
