"""A complete tiny InternVL checkpoint with random weights, in the form that transformers reads: tiles of 112 pixels, 16 tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.checkpoints import tiny_qwen2_5_vl

SIDE, PATCH, TOKENS = 112, 14, 16
# As the published tokenizers have them: <video> came last, and the embedding has no row for it.
SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
NAMED = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
}  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
# The kinds of text model that the family is published with: InternVL 3, 2.5 and 3.5.
TEXTS = {"qwen2": {}, "llama": {"attention_bias": False}, "qwen3": {"head_dim": 32, "attention_bias": False}}


def make_internvl(
    directory: str | Path,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    layout: Literal["hub", "modern"] = "hub",
    shards: int = 1,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    text: str = "qwen2",
    vision: dict[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Write an InternVL checkpoint: 8x8 patches of 14 pixels a tile, 2x2 shuffled into 16 tokens, 4 heads over 2 KV heads.

    layout "hub": `language_model.model.*`, `vision_tower.*`, no word on tying at the top of config.json, `rope_scaling`, one file
    for each processor, template in tokenizer_config.json, as the published checkpoints; "modern": nested configs, `model.*` names.
    text: a key of TEXTS; vision and top: more keys of `vision_config` and of config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    token_id = _write_tokenizer(directory, layout)
    config = _config(layers, hidden, token_id, tie, dtype, text, vision or {}, top)
    tiny_qwen2_5_vl.write_json(directory / "config.json", _published(config) if layout == "hub" else config)
    eos = [token_id["<|im_end|>"], token_id["<|endoftext|>"]]
    tiny_qwen2_5_vl.write_json(directory / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    _write_processor(directory, layout)
    weights = _random_weights(config, seed, dtype)
    if tie:
        del weights["lm_head.weight"]
    if layout == "hub":
        weights = {_hub_name(name): tensor for name, tensor in weights.items()}
    tiny_qwen2_5_vl.write_weights(directory, weights, shards)
    return directory


def internvl_inputs(model: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """Tiles of all media in prompt order; none if there is no media."""
    return {"pixel_values": torch.cat([model.family.pixel_values(media) for media in inputs])} if inputs else {}


def internvl_features(stock: Any, given: dict[str, Any]) -> tuple[Tensor, Sequence[Tensor]]:
    """Visual embeddings [N, D] in prompt order; the family has no DeepStack levels."""
    return stock.model.get_image_features(given["pixel_values"]).pooler_output.flatten(0, 1), []


def changed(directory: Path, target: Path, name: str, **changes: Any) -> Path:
    """A copy of a checkpoint with other keys in one of its JSON files; None removes a key."""
    shutil.copytree(directory, target)
    path = target / name
    data = {**json.loads(path.read_text()), **changes}
    tiny_qwen2_5_vl.write_json(path, {key: value for key, value in data.items() if value is not None})
    return target


def _config(
    layers: int, hidden: int, token_id: dict[str, int], tie: bool, dtype: torch.dtype, text: str, vision: dict, top: dict
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    text_config = {
        "model_type": text, "vocab_size": token_id["<video>"], "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "bos_token_id": token_id["<|im_start|>"], "eos_token_id": token_id["<|im_end|>"],
        "pad_token_id": token_id["<|endoftext|>"], "tie_word_embeddings": tie, "dtype": name, **TEXTS[text],
    }  # fmt: skip
    vision_config = {
        "model_type": "internvl_vision", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "attention_bias": True,
        "use_qk_norm": False, "norm_type": "layer_norm", "layer_scale_init_value": 0.5, "use_mean_pooling": True,
        "hidden_act": "gelu", "initializer_range": 0.1, **vision,
    }  # fmt: skip
    return {
        "architectures": ["InternVLForConditionalGeneration"], "model_type": "internvl", "text_config": text_config,
        "vision_config": vision_config, "image_token_id": token_id["<IMG_CONTEXT>"], "image_seq_length": TOKENS,
        "downsample_ratio": 0.5, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": tie, "dtype": name,
        "transformers_version": "5.0.0", **top,
    }  # fmt: skip


def _published(config: dict[str, Any]) -> dict[str, Any]:
    text = dict(config["text_config"])
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"], text["torch_dtype"] = rope.pop("rope_theta"), text.pop("dtype")
    text["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    top = {key: value for key, value in config.items() if key not in ("dtype", "tie_word_embeddings")}
    return {**top, "text_config": text, "torch_dtype": config["dtype"]}


def _random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    weights = tiny_qwen2_5_vl.random_weights(InternVLForConditionalGeneration, InternVLConfig.from_dict(config), seed, dtype)
    # Zero at initialisation, and then a tower would not notice where a patch is.
    noise = torch.Generator().manual_seed(seed)
    for name in ("cls_token", "position_embeddings"):
        tensor = weights[f"model.vision_tower.embeddings.{name}"]
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=noise))
    return weights


def _hub_name(name: str) -> str:
    if name.startswith("lm_head"):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name


def _write_processor(directory: Path, layout: str) -> None:
    common = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "size": {"height": SIDE, "width": SIDE}, "do_center_crop": None, "crop_size": None,
    }  # fmt: skip
    # `crop_to_patches` is written so, and overruled by the processor that holds this one.
    image = {**common, "crop_to_patches": False, "min_patches": 1, "max_patches": 12}
    image["image_processor_type"] = "GotOcr2ImageProcessorFast"
    video = {**common, "video_processor_type": "InternVLVideoProcessor"}
    whole = {"image_seq_length": TOKENS, "processor_class": "InternVLProcessor"}
    if layout == "hub":
        tiny_qwen2_5_vl.write_json(directory / "preprocessor_config.json", {**image, "processor_class": "InternVLProcessor"})
        tiny_qwen2_5_vl.write_json(directory / "video_preprocessor_config.json", {**video, "processor_class": "InternVLProcessor"})
        tiny_qwen2_5_vl.write_json(directory / "processor_config.json", whole)
        return
    tiny_qwen2_5_vl.write_json(directory / "processor_config.json", {**whole, "image_processor": image, "video_processor": video})


def _write_tokenizer(directory: Path, layout: str) -> dict[str, int]:
    """The tiny Qwen tokenizer with the family's own tokens behind it; returns the id of every control token."""
    from tokenizers import AddedToken, Tokenizer

    tiny_qwen2_5_vl.write_tokenizer(directory, layout)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(NAMED, tokenizer_class="Qwen2Tokenizer")
    if layout == "hub":
        config["additional_special_tokens"] += SPECIAL[:-1]
        config.update(extra_special_tokens=NAMED, chat_template=TEMPLATE)
    else:
        config["extra_special_tokens"] = config.pop("additional_special_tokens") + list(SPECIAL[:-1])
        config["model_specific_special_tokens"] = NAMED
        (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tiny_qwen2_5_vl.write_json(path, config)
    return {token: tokenizer.token_to_id(token) for token in (*tiny_qwen2_5_vl.SPECIAL, *SPECIAL)}
