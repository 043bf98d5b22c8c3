"""A LLaVA-OneVision checkpoint of two parts: ours, which ships with this package, and SmolLM2, which another package brings."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from sparsevila_cluster.demo.drawing import FRAME_PX
from sparsevila_cluster.demo.witness.language_model import IMAGE_TOKEN, VIDEO_TOKEN, load_smollm, load_smollm_tokenizer

PATCH_PX = 8
OURS = Path(__file__).parent / "weights" / "vision.safetensors"
# As SmolLM2's own, without its system prompt, media first.
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\\n' }}"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}"
    "{% for part in turn['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'video' %}{{ '<video>\\n' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 160,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": PATCH_PX,
    "image_size": FRAME_PX,
    "vision_use_head": False,
}


def build_witness(text: Any, tokenizer: Any) -> LlavaOnevisionForConditionalGeneration:
    """The stock architecture: SmolLM2's weights, and random ones of our part. text: what `load_smollm` gives.

    The vocabulary grows by the two tokens that stand for media; their embeddings are never read.
    """
    text_config = text.config.to_dict() | {"vocab_size": len(tokenizer)}
    text_config.pop("quantization_config", None)
    config = LlavaOnevisionConfig(
        text_config=text_config,
        vision_config=VISION,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO_TOKEN),
        image_grid_pinpoints=[[FRAME_PX, FRAME_PX], [FRAME_PX, 2 * FRAME_PX], [2 * FRAME_PX, FRAME_PX]],
        vision_aspect_ratio="anyres_max_9",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    theirs = text.model.state_dict()
    rows = len(tokenizer) - len(theirs["embed_tokens.weight"])
    theirs["embed_tokens.weight"] = torch.cat(
        [theirs["embed_tokens.weight"], theirs["embed_tokens.weight"].new_zeros(rows, text.config.hidden_size)]
    )
    model.model.language_model.load_state_dict(theirs)
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.tie_weights()
    return model


def our_part(model: LlavaOnevisionForConditionalGeneration) -> dict[str, torch.Tensor]:
    """What of it is not the language model, in bfloat16."""
    return {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(("model.language_model.", "lm_head."))
    }


def save_our_part(model: LlavaOnevisionForConditionalGeneration, file: Path = OURS) -> None:
    """Write what ships."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(our_part(model), file)


def assemble(directory: Path, ours: Path = OURS) -> Path:
    """A complete checkpoint directory, made whole under another name first: who finds it finds all of it.

    Raises:
        BadCheckpoint: SmolLM2 is not installed.
    """
    if (directory / "config.json").is_file():
        return directory
    tokenizer = load_smollm_tokenizer()
    model = build_witness(load_smollm(), tokenizer)
    model.load_state_dict({name: value.float() for name, value in load_file(ours).items()}, strict=False)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        write_checkpoint(model, tokenizer, partial)
        try:
            os.rename(partial, directory)
        except OSError:
            if not (directory / "config.json").is_file():  # else somebody else was sooner
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def write_checkpoint(model: LlavaOnevisionForConditionalGeneration, tokenizer: Any, directory: Path) -> None:
    """As a model hub would serve it."""
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.do_sample = False
    model.save_pretrained(directory)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    common = {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "size": {"height": FRAME_PX, "width": FRAME_PX},
    }  # fmt: skip
    pinpoints = model.config.image_grid_pinpoints
    image = {**common, "do_pad": True, "image_grid_pinpoints": pinpoints, "image_processor_type": "LlavaOnevisionImageProcessor"}
    processor = {
        "processor_class": "LlavaOnevisionProcessor", "image_token": IMAGE_TOKEN, "video_token": VIDEO_TOKEN,
        "num_image_tokens": (FRAME_PX // PATCH_PX) ** 2, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": model.config.vision_aspect_ratio, "image_processor": image,
        "video_processor": {**common, "video_processor_type": "LlavaOnevisionVideoProcessor"},
    }  # fmt: skip
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2, sort_keys=True) + "\n")
