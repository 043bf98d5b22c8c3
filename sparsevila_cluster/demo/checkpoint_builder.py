"""What the demo checkpoint is made of: tokenizer, chat template, model configuration, and its directory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sparsevila_cluster.demo.drawing import FRAME_PX

PATCH_PX, MERGE, TEMPORAL_PATCH = 8, 2, 2
SAMPLE_FPS = 2.0
GRID_PATCHES = FRAME_PX // PATCH_PX
GRID_TOKENS = GRID_PATCHES // MERGE
TOKENS_PER_STEP = GRID_TOKENS**2
MIN_IMAGE_PX = 64 * 64

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{% if c['type'] == 'video' \
or 'video' in c %}<|vision_start|><|video_pad|><|vision_end|>{% elif c['type'] == 'image' or 'image' in c %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}\
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def train_tokenizer(corpus: Iterable[str], split: str) -> PreTrainedTokenizerFast:
    """split: the pattern of what may become one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, min_frequency=2, special_tokens=[], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|endoftext|>", "<|im_end|>")],
        model_max_length=4096,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@dataclass(frozen=True)
class TextSize:
    """How large the text model is; heads have 32 numbers each."""

    hidden: int = 192
    intermediate: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    max_positions: int = 8192


BUNDLED = TextSize()


def build_model(tokenizer: PreTrainedTokenizerFast, size: TextSize = BUNDLED) -> Qwen2_5_VLForConditionalGeneration:
    """Random parameters in the stock architecture: about 2.4 M at the size of the bundled checkpoint."""
    token = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": size.max_positions,
        "rms_norm_eps": 1e-6,
        # With head_dim 32 a small theta leaves too few slow pairs to compare contents irrespective of position.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.04,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "patch_size": PATCH_PX,
        "temporal_patch_size": TEMPORAL_PATCH,
        "spatial_merge_size": MERGE,
        "window_size": FRAME_PX // 2,
        "fullatt_block_indexes": [1],
        "out_hidden_size": text["hidden_size"],
        # two frames at 2 fps are one second: the temporal position is the number of the step
        "tokens_per_second": 1,
        "initializer_range": 0.04,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    generation = model.generation_config
    generation.bos_token_id, generation.do_sample = text["bos_token_id"], False
    generation.eos_token_id, generation.pad_token_id = text["eos_token_id"], text["pad_token_id"]
    return model


def processor_config() -> dict:
    """processor_config.json, written by hand: the library's own writer needs torchvision to be installed."""
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "merge_size": MERGE,
        "patch_size": PATCH_PX,
        "resample": 3,
        "rescale_factor": 1 / 255,
        # pixels of one frame or image: our own frames pass unscaled, larger ones are scaled down to as many tokens
        "size": {"shortest_edge": MIN_IMAGE_PX, "longest_edge": FRAME_PX * FRAME_PX},
        "temporal_patch_size": TEMPORAL_PATCH,
    }
    video = {
        "cap_pixels_per_frame": False,
        "do_sample_frames": False,
        "fps": SAMPLE_FPS,
        "min_frames": TEMPORAL_PATCH,
        "max_frames": 128,
        "max_video_tokens": 128000,
        "return_metadata": False,
        "video_processor_type": "Qwen2VLVideoProcessor",
    }
    return {
        "image_processor": {**common, "image_processor_type": "Qwen2VLImageProcessor"},
        "processor_class": "Qwen2_5_VLProcessor",
        "video_processor": {**common, **video},
    }


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, directory: str | Path) -> Path:
    """A complete checkpoint directory, as a model hub would serve it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().float().cpu() for name, value in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (directory / "processor_config.json").write_text(json.dumps(processor_config(), indent=2, sort_keys=True) + "\n")
    return directory


def num_parameters(model: torch.nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(parameter.numel() for parameter in model.parameters())
