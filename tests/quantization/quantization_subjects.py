"""Checkpoints and materials that are small enough to quantize in a second, for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparsevila_cluster.quantization.calibration import Reading
from sparsevila_cluster.quantization.job import Settings
from sparsevila_cluster.quantization.materials import Material
from tests.checkpoints import tiny_qwen2_5_vl

READING = Reading(text_tokens=64, max_frames=4)
TURNS = (("what colour is the star?", "red"), ("where is it?", "in the first frame"))


def settings(**fields: Any) -> Settings:
    """Few steps: tests want the same arithmetic, not the best result."""
    return Settings(**{"num_steps": 4, "search_rows": 256, "reading": READING, **fields})


def texts(num: int = 6, length: int = 64, vocab_size: int = 250, seed: int = 0) -> list[Material]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (num, length), generator=generator).tolist()
    return [Material(f"text {i}", ids=tuple(row)) for i, row in enumerate(ids)]


def dialogue(kind: str = "video", seed: int = 0) -> Material:
    return Material(f"{kind} {seed}", media=(tiny_qwen2_5_vl.media(kind, frames=4, seed=seed),), turns=TURNS)


def make_text_model(directory: Path, kind: str = "qwen2", seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A language model without vision: 2 layers, hidden 64, 4 heads over 2 KV heads, in transformers' own layout."""
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = tiny_qwen2_5_vl.write_tokenizer(directory, "hub")
    prefix = {"qwen2": "Qwen2", "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}[kind]
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15, "tie_word_embeddings": False,
        "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    extra = {"sliding_window": None} if kind == "mistral" else {}
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **extra, **fields}, dtype=str(dtype).removeprefix("torch."))
    model_class = getattr(transformers, f"{prefix}ForCausalLM")
    config.architectures = [model_class.__name__]
    config.save_pretrained(directory)
    tiny_qwen2_5_vl.write_weights(directory, tiny_qwen2_5_vl.random_weights(model_class, config, seed, dtype), 1)
    return directory
