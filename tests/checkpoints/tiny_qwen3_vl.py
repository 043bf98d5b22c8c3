"""A complete tiny Qwen3-VL checkpoint with random weights: DeepStack levels, interleaved M-RoPE, query and key norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from tests.checkpoints import tiny_qwen2_5_vl

PATCH = 16


def make_qwen3_vl(
    directory: str | Path,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 64,
    layout: Literal["hub", "modern"] = "hub",
    shards: int = 1,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a Qwen3-VL checkpoint: patches of 16 pixels, 2x2 merged, three DeepStack levels, 4 heads over 2 KV heads of 32.

    layout "hub": `rope_scaling` and `torch_dtype` in config.json, one file for each processor, template in tokenizer_config.json,
    as the published checkpoints; "modern": what transformers 5 saves. Tensor names are the same in both.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = tiny_qwen2_5_vl.write_tokenizer(directory, layout)
    config = _config(layers, hidden, vocab_size, tie, dtype)
    tiny_qwen2_5_vl.write_json(directory / "config.json", _published(config) if layout == "hub" else config)
    first = vocab_size - len(tiny_qwen2_5_vl.SPECIAL)
    eos = [first + tiny_qwen2_5_vl.SPECIAL.index(name) for name in ("<|im_end|>", "<|endoftext|>")]
    tiny_qwen2_5_vl.write_json(directory / "generation_config.json", {"eos_token_id": eos, "do_sample": False})
    _write_processor(directory, layout)
    weights = _random_weights(config, seed, dtype)
    if tie:
        del weights["lm_head.weight"]
    tiny_qwen2_5_vl.write_weights(directory, weights, shards)
    return directory


def _config(layers: int, hidden: int, vocab_size: int, tie: bool, dtype: torch.dtype) -> dict[str, Any]:
    first = vocab_size - len(tiny_qwen2_5_vl.SPECIAL)
    special = {name: first + i for i, name in enumerate(tiny_qwen2_5_vl.SPECIAL)}
    name = str(dtype).removeprefix("torch.")
    text = {
        "model_type": "qwen3_vl_text", "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "initializer_range": 0.15, "attention_bias": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
        },
        "bos_token_id": special["<|im_start|>"], "eos_token_id": special["<|im_end|>"], "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": tie, "dtype": name,
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl_vision", "depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4,
        "in_channels": 3, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2], "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.1,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": text,
        "vision_config": vision, "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"],
        "tie_word_embeddings": tie, "dtype": name, "transformers_version": "5.0.0",
    }  # fmt: skip


def _published(config: dict[str, Any]) -> dict[str, Any]:
    text = dict(config["text_config"])
    rope = dict(text.pop("rope_parameters"))
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = rope
    vision = {**config["vision_config"], "model_type": "qwen3_vl"}
    del text["dtype"]
    text["torch_dtype"] = config["dtype"]
    return {**{k: v for k, v in config.items() if k != "dtype"}, "text_config": text, "vision_config": vision}


def _random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return tiny_qwen2_5_vl.random_weights(Qwen3VLForConditionalGeneration, Qwen3VLConfig.from_dict(config), seed, dtype)


def _write_processor(directory: Path, layout: str) -> None:
    common = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": PATCH,
        "temporal_patch_size": 2, "merge_size": 2,
    }  # fmt: skip
    image = {**common, "size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 64}}
    video = {**common, "size": {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 256}}
    image["image_processor_type"], video["video_processor_type"] = "Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor"
    if layout == "hub":
        tiny_qwen2_5_vl.write_json(directory / "preprocessor_config.json", {**image, "processor_class": "Qwen3VLProcessor"})
        tiny_qwen2_5_vl.write_json(directory / "video_preprocessor_config.json", {**video, "processor_class": "Qwen3VLProcessor"})
        return
    nested = {"image_processor": image, "video_processor": video, "processor_class": "Qwen3VLProcessor"}
    tiny_qwen2_5_vl.write_json(directory / "processor_config.json", nested)
