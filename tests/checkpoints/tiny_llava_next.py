"""A complete tiny LLaVA-NeXT checkpoint with random weights (CLIP, Mistral), and its media for stock transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.tiny_llava_onevision import hub_name, published, stack

SPECIAL = ("<unk>", "<s>", "</s>")
ADDED = ("<image>", "<pad>")
# Writes what the published Mistral template writes.
TEMPLATE = (
    "{% for turn in messages %}{% if turn['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + turn['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}"
    "{% elif turn['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in turn['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)
CROP, PATCH = 56, 14
CANVASES = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
MODELS = {"mistral": {"sliding_window": None}, "llama": {}, "qwen2": {"use_sliding_window": False}}


def make_llava_next(
    directory: str | Path,
    seed: int = 0,
    layers: int = 3,
    hidden: int = 64,
    layout: Literal["hub", "modern"] = "hub",
    shards: int = 1,
    tie: bool = False,
    dtype: torch.dtype = torch.float32,
    text: Literal["mistral", "llama", "qwen2"] = "mistral",
    **config_changes: Any,
) -> Path:
    """Write a checkpoint: crops of 4x4 patches and a summary row, up to 2x2 tiles, features of the last layer but one of four.

    layout "hub": `language_model.model.*` and `vision_tower.vision_model.*`, preprocessor_config.json, template in
    chat_template.json, as the published checkpoints; "modern": what transformers 5 saves. text: the text model's model_type.
    config_changes: top-level keys of config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = _write_tokenizer(directory)
    if layout == "hub":
        tiny_qwen2_5_vl.write_json(directory / "chat_template.json", {"chat_template": TEMPLATE})
    else:
        (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = {**_config(text, layers, hidden, vocab_size, tie, dtype), **config_changes}
    tiny_qwen2_5_vl.write_json(directory / "config.json", published(config) if layout == "hub" else config)
    tiny_qwen2_5_vl.write_json(directory / "generation_config.json", {"eos_token_id": SPECIAL.index("</s>"), "bos_token_id": 1})
    _write_processor(directory, layout)
    weights = _random_weights(config, seed, dtype)
    if tie:
        del weights["lm_head.weight"]
    if layout == "hub":
        weights = {hub_name(name): tensor for name, tensor in weights.items()}
    tiny_qwen2_5_vl.write_weights(directory, weights, shards)
    return directory


def stock_inputs(model: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """Pixels as the stock model takes them; it takes no videos, so prompts with one are given as ("media", what to do)."""
    pixels = [model.family.pixel_values(media) for media in inputs]
    if any(media.kind == "video" for media in inputs):
        return {"media": [(media.kind, media.size, one) for media, one in zip(inputs, pixels, strict=True)]}
    return {"pixel_values": stack(pixels), "image_sizes": torch.tensor([media.size for media in inputs])}


def stock_features(stock: Any, given: dict[str, Any]) -> tuple[Tensor, Sequence[Tensor]]:
    """(visual embeddings [N, D], no levels) in prompt order. A frame of a video is a picture of one crop to the stock model."""
    core, config = stock.model, stock.config
    if "pixel_values" in given:
        return torch.cat(list(core.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output)), ()
    parts: list[Tensor] = []
    for kind, size, pixels in given["media"]:
        if kind == "image":
            parts += core.get_image_features(pixels[None], torch.tensor([size])).pooler_output
            continue
        states = core.vision_tower(pixels, output_hidden_states=True).hidden_states
        frames = core.multi_modal_projector(states[config.vision_feature_layer][:, 1:])
        parts += core.pack_image_features([frame[None] for frame in frames], [size] * len(frames), "default", core.image_newline)[0]
    return torch.cat(parts), ()


def _config(text: str, layers: int, hidden: int, vocab_size: int, tie: bool, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    text_config = {
        "model_type": text, "vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "initializer_range": 0.12,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": tie, "dtype": name, **MODELS[text],
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "patch_size": PATCH, "image_size": CROP, "projection_dim": 32, "initializer_factor": 1.5,
    }  # fmt: skip
    return {
        "architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next", "text_config": text_config,
        "vision_config": vision, "image_token_index": vocab_size - len(ADDED), "image_grid_pinpoints": CANVASES,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu",
        "use_image_newline_parameter": True, "tie_word_embeddings": tie, "dtype": name, "transformers_version": "5.0.0",
    }  # fmt: skip


def _random_weights(config: dict[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    return tiny_qwen2_5_vl.random_weights(LlavaNextForConditionalGeneration, LlavaNextConfig.from_dict(config), seed, dtype)


def _write_processor(directory: Path, layout: str) -> None:
    image = {
        "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "do_pad": True, "resample": 3,
        "do_convert_rgb": True, "rescale_factor": 1 / 255, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "size": {"shortest_edge": CROP},
        "crop_size": {"height": CROP, "width": CROP}, "image_grid_pinpoints": CANVASES,
        "image_processor_type": "LlavaNextImageProcessor",
    }  # fmt: skip
    own = {
        "processor_class": "LlavaNextProcessor", "image_token": "<image>", "patch_size": PATCH,
        "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
    }  # fmt: skip
    if layout == "hub":
        tiny_qwen2_5_vl.write_json(directory / "preprocessor_config.json", {**image, "processor_class": "LlavaNextProcessor"})
        tiny_qwen2_5_vl.write_json(directory / "processor_config.json", own)
        return
    tiny_qwen2_5_vl.write_json(directory / "processor_config.json", {**own, "image_processor": image})


def _write_tokenizer(directory: Path) -> int:
    """A BPE of the Llama kind: blanks as a visible letter, one put before every text, single bytes for what has no token, and a
    token at the start of every sequence. Returns the vocabulary size, the picture's placeholder and the padding last."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers

    def normalizer() -> Any:
        return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer()
    words = [word for text in tiny_qwen2_5_vl.TEXT for word in text.replace("\n", " ").split()]
    trained.train_from_iterator(words * 4, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    first = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [tuple(pair) for pair in _merges(trained)]
    letters = sorted({letter for text in (*tiny_qwen2_5_vl.TEXT, "▁") for letter in text.replace(" ", "▁").replace("\n", "")})
    names = [*first, *dict.fromkeys([*letters, *("".join(pair) for pair in merges)])]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [pair for pair in merges if all(part in vocabulary for part in pair)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizer()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *ADDED)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>", "legacy": True, "padding_side": "left", "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    tiny_qwen2_5_vl.write_json(directory / "tokenizer_config.json", config)
    return tokenizer.get_vocab_size()


def _merges(tokenizer: Any) -> list[Sequence[str]]:
    import json

    return json.loads(tokenizer.to_str())["model"]["merges"]
