"""Complete tiny checkpoint directories with random weights, and stock transformers models as oracles for them.

Random weights show equality, never answer quality. They are sharpened (larger queries and keys, perturbed norms), so that
logits depend on every position and a wrong one shows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEXT = (
    "system user assistant You are a helpful assistant.",
    "what colour is the star in step 3? red green blue yellow",
    "where is the circle, and how many squares are there in the first frame of the video?",
)
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_qwen2_5_vl(
    directory: str | Path,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    layout: Literal["hub", "modern"] = "hub",
    shards: int = 1,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a Qwen2.5-VL checkpoint: patches of 14 pixels, 2x2 merged, windows of 2x2 tokens, 4 heads over 2 KV heads.

    layout "hub": flat config.json, `visual.*` and `model.layers.*`, preprocessor_config.json, template in tokenizer_config.json,
    as the published checkpoints; "modern": what transformers 5 saves (nested configs, `model.visual.*`, chat_template.jinja).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(directory, layout)
    config = _config(layers, hidden, vocab_size, tie, dtype)
    write_json(directory / "config.json", _flat(config) if layout == "hub" else config)
    eos = [SPECIAL.index("<|im_end|>"), SPECIAL.index("<|endoftext|>")]
    first = vocab_size - len(SPECIAL)
    write_json(directory / "generation_config.json", {"eos_token_id": [first + i for i in eos], "do_sample": False})
    _write_processor(directory, layout)
    weights = _random_weights(config, seed, dtype)
    if tie:
        del weights["lm_head.weight"]
    if layout == "hub":
        weights = {_hub_name(name): tensor for name, tensor in weights.items()}
    write_weights(directory, weights, shards)
    return directory


def hf_model(directory: str | Path) -> Any:
    """The stock transformers model of a checkpoint, float32, eager attention, eval mode."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        str(directory), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def media(kind: Literal["video", "image"] = "video", frames: int = 6, height: int = 84, width: int = 112, seed: int = 0, fps=2.0):
    """Random `Media`: smooth blobs plus noise, so that resizing and salience have something to see."""
    from sparsevila_cluster.media import Media

    rng = np.random.default_rng(seed)
    num = 1 if kind == "image" else frames
    coarse = torch.from_numpy(rng.uniform(0, 255, (num, 3, 5, 5)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear").permute(0, 2, 3, 1).numpy()
    pixels = np.clip(smooth + rng.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    duration_s = 0.0 if kind == "image" else num / fps
    times_s = np.zeros(1) if kind == "image" else np.arange(num) / fps
    return Media(pixels, times_s, kind, f"{kind}-{seed}", duration_s)


def _config(layers: int, hidden: int, vocab_size: int, tie: bool, dtype: torch.dtype) -> dict[str, Any]:
    first = vocab_size - len(SPECIAL)
    special = {name: first + i for i, name in enumerate(SPECIAL)}
    half = hidden // 4 // 2
    side = 3 * half // 8
    name = str(dtype).removeprefix("torch.")
    text = {
        "model_type": "qwen2_5_vl_text", "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "initializer_range": 0.15, "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * side, side, side]},
        "bos_token_id": special["<|im_start|>"], "eos_token_id": special["<|im_end|>"], "pad_token_id": special["<|endoftext|>"],
        "tie_word_embeddings": tie, "dtype": name,
    }  # fmt: skip
    vision = {
        "model_type": "qwen2_5_vl_vision", "depth": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "in_channels": 3,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1, 3],
        "out_hidden_size": hidden, "tokens_per_second": 2, "hidden_act": "silu", "initializer_range": 0.1,
    }  # fmt: skip
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "text_config": text,
        "vision_config": vision, "image_token_id": special["<|image_pad|>"], "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"], "vision_end_token_id": special["<|vision_end|>"],
        "tie_word_embeddings": tie, "dtype": name, "transformers_version": "5.0.0",
    }  # fmt: skip


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The published form: text keys at the top level, M-RoPE under `rope_scaling`."""
    text = dict(config["text_config"])
    rope = text.pop("rope_parameters")
    del text["model_type"], text["dtype"]
    vision = dict(config["vision_config"])
    vision["in_chans"], vision["spatial_patch_size"] = vision.pop("in_channels"), vision["patch_size"]
    flat = {**text, **{key: value for key, value in config.items() if key not in ("text_config", "dtype")}}
    return {
        **flat, "vision_config": vision, "torch_dtype": config["dtype"], "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }  # fmt: skip


def random_weights(model_class: Any, config: Any, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict of a randomly initialised, sharpened transformers model; the global generator stays as it was."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(2.0)
    torch.random.set_rng_state(state)
    return {name: tensor.detach().to(dtype).clone() for name, tensor in model.state_dict().items()}


def _random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    return random_weights(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig.from_dict(config), seed, dtype)


def _hub_name(name: str) -> str:
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_weights(directory: Path, weights: dict[str, Tensor], shards: int) -> None:
    from safetensors.torch import save_file

    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: weights[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_processor(directory: Path, layout: str) -> None:
    common = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    }  # fmt: skip
    low, high = 56 * 56, 28 * 28 * 64
    if layout == "hub":
        data = {**common, "min_pixels": low, "max_pixels": high, "image_processor_type": "Qwen2VLImageProcessor"}
        write_json(directory / "preprocessor_config.json", {**data, "processor_class": "Qwen2_5_VLProcessor"})
        return
    size = {"shortest_edge": low, "longest_edge": high}
    nested = {
        "image_processor": {**common, "size": size, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {**common, "size": size, "video_processor_type": "Qwen2VLVideoProcessor"},
        "processor_class": "Qwen2_5_VLProcessor",
    }
    write_json(directory / "processor_config.json", nested)


def write_tokenizer(directory: Path, layout: str, special: Sequence[str] = SPECIAL, template: str | None = TEMPLATE) -> int:
    """A byte-level BPE with the Qwen split; returns the vocabulary size, control tokens last. template None: none is written."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": [token for token in special if token not in ("<|im_end|>", "<|endoftext|>")],
        "model_max_length": 4096, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    if template is not None and layout == "hub":
        config["chat_template"] = template
    elif template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(directory / "tokenizer_config.json", config)
    return tokenizer.get_vocab_size()


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
