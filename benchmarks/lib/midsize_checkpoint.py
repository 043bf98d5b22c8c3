"""A checkpoint of a useful size that nobody has to download: Qwen2.5-VL's shape, seeded random weights, a byte-level tokenizer.

Speed does not depend on what the weights say; answers of this checkpoint are noise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import string
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsevila_cluster.demo.checkpoint_builder import CHAT_TEMPLATE, IMAGE_MEAN, IMAGE_STD, SPECIAL_TOKENS
from sparsevila_cluster.media import Media

# The split pattern of Qwen2: words with their leading space, digits one by one.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LAYOUT = 2  # change it whenever other files would be written for the same recipe
FPS = 2.0


@dataclass(frozen=True)
class Recipe:
    """Sizes of a checkpoint. The default has 140 M text parameters and 81 visual tokens per two frames of 252 x 252 pixels; its
    vision tower of 13 M parameters costs less than the dense prefill behind it.
    """

    hidden: int = 1024
    num_layers: int = 12
    num_heads: int = 16
    num_kv_heads: int = 4
    intermediate: int = 2816
    vocab: int = 4096
    vision_hidden: int = 320
    vision_layers: int = 8
    vision_heads: int = 5
    vision_intermediate: int = 864
    full_layers: tuple[int, ...] = (3, 7)
    patch_px: int = 14
    window_px: int = 112
    frame_px: int = 252
    seed: int = 0

    @property
    def name(self) -> str:
        told = json.dumps([LAYOUT, asdict(self)], sort_keys=True).encode()
        return f"midsize-{hashlib.blake2b(told, digest_size=6).hexdigest()}"


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsevila"


def make_checkpoint(cache: Path, recipe: Recipe | None = None) -> Path:
    """The directory of the recipe's checkpoint below `cache`, made on first use. Complete or absent, never half written."""
    recipe = recipe or Recipe()
    directory = cache / recipe.name
    if directory.is_dir():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    try:
        _write(scratch, recipe)
        scratch.rename(directory)
    except OSError:
        if not directory.is_dir():  # else another process was faster with the same files
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def make_media(num_frames: int, frame_px: int, seed: int = 0) -> Media:
    """A synthetic video in memory: a moving gradient under noise, two frames per second."""
    rng = np.random.default_rng(seed)
    ramp = np.arange(frame_px, dtype=np.uint8)
    noise = rng.integers(0, 64, (num_frames, frame_px, frame_px, 3), dtype=np.uint8)
    shift = (3 * np.arange(num_frames, dtype=np.uint8))[:, None, None]
    picture = (ramp[:, None] // 2 + ramp[None, :] // 2)[None] + shift
    frames = picture[..., None] // 2 + noise
    name = hashlib.blake2b(f"{num_frames} {frame_px} {seed}".encode(), digest_size=32).hexdigest()
    return Media(frames, np.arange(num_frames) / FPS, "video", name, num_frames / FPS)


def write_layout(directory: Path, recipe: Recipe) -> None:
    """Everything of a checkpoint but its config and its weights."""
    _tokenizer(recipe.vocab).save_pretrained(directory)
    common = {
        "patch_size": recipe.patch_px,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "size": {"shortest_edge": 4 * recipe.patch_px**2, "longest_edge": recipe.frame_px**2},
    }
    processor = {
        "processor_class": "Qwen2_5_VLProcessor",
        "image_processor": {**common, "image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": {**common, "video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (directory / "processor_config.json").write_text(json.dumps(processor, indent=2))
    ends = {name: SPECIAL_TOKENS.index(token) for name, token in (("eos", "<|im_end|>"), ("pad", "<|endoftext|>"))}
    (directory / "generation_config.json").write_text(json.dumps({f"{name}_token_id": i for name, i in ends.items()}))


def _write(directory: Path, recipe: Recipe) -> None:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    state = torch.random.get_rng_state()
    torch.manual_seed(recipe.seed)
    try:
        model = Qwen2_5_VLForConditionalGeneration(config_of(recipe)).float()
    finally:
        torch.random.set_rng_state(state)
    model.save_pretrained(directory)
    write_layout(directory, recipe)


def config_of(recipe: Recipe) -> Any:
    """The transformers config of a recipe."""
    from transformers import Qwen2_5_VLConfig

    token = SPECIAL_TOKENS.index
    head_dim = recipe.hidden // recipe.num_heads
    time = head_dim // 8
    text = {
        "vocab_size": recipe.vocab,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [time, *[(head_dim // 2 - time) // 2] * 2]},
        "bos_token_id": token("<|im_start|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": recipe.vision_layers,
        "hidden_size": recipe.vision_hidden,
        "intermediate_size": recipe.vision_intermediate,
        "num_heads": recipe.vision_heads,
        "patch_size": recipe.patch_px,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": recipe.window_px,
        "fullatt_block_indexes": list(recipe.full_layers),
        "out_hidden_size": recipe.hidden,
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
    )


def _tokenizer(vocab: int):
    """Control tokens, the 256 bytes, then pairs of letters until the vocabulary is full."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = string.ascii_letters + string.digits
    pairs = [(a, b) for a in letters for b in letters][: vocab - len(alphabet) - len(SPECIAL_TOKENS)]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(a + b for a, b in pairs)]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated", invert=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
