"""Load a language model by itself: the same decoders, weights and quantized forms, for tools and oracles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadConfig
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.models.adapter import Part, TextBackend
from sparsevila_cluster.models.chat_template import load_tokenizer
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.families import FAMILIES
from sparsevila_cluster.models.loading.device_placement import find_device, find_dtype, runs_as_stored
from sparsevila_cluster.models.loading.loader import read_config
from sparsevila_cluster.models.loading.quantization_scheme import read_scheme
from sparsevila_cluster.models.loading.text_backend import build_text, check_backend, check_text, kv_spec
from sparsevila_cluster.models.loading.weights import fill
from sparsevila_cluster.models.text.linear import weight_bytes

TEXT_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
TEXT_PARTS: tuple[Part, ...] = ("embed", "llm", "head")


@dataclass
class TextModel:
    """tokenizer: a transformers tokenizer, None if the directory holds none. The other fields are `Model`'s."""

    text: TextBackend
    tokenizer: Any
    spec: KVSpec
    fingerprint: str
    device: torch.device
    config: Any
    max_position: int
    weight_bytes: int


def load_text(
    directory: str | Path | Checkpoint,
    parts: Sequence[Part] = TEXT_PARTS,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    text_backend: str = "auto",
    quantization: str = "auto",
) -> TextModel:
    """Load a text-only checkpoint, or only the language model of one with vision. The arguments are `load_model`'s; parts are drawn
    from "embed", "llm" and "head", with "llm".

    Raises:
        BadCheckpoint: as `load_model`, and for a model_type that is not supported. BadConfig: an argument outside its range.
    """
    target = find_device(device)
    if "llm" not in parts or not set(parts) <= set(TEXT_PARTS):
        raise BadConfig(f"parts must be drawn from {', '.join(TEXT_PARTS)} and hold 'llm', got {list(parts)}")
    check_backend(text_backend)
    files = directory if isinstance(directory, Checkpoint) else Checkpoint.open(directory)
    model_type = files.config.get("model_type")
    text_only = model_type in TEXT_MODELS
    if not text_only and model_type not in FAMILIES:
        raise BadCheckpoint(
            f"config.json: model_type {model_type!r} is no text model that is supported: {', '.join(sorted(TEXT_MODELS))}; "
            f"nor one with vision: {', '.join(sorted(FAMILIES))}"
        )
    scheme = read_scheme(files.config)
    config = read_config(files)
    text_config = config.get_text_config()
    check_text(text_config)
    chosen = find_dtype(dtype, target, config, scheme)
    as_stored = runs_as_stored(quantization, target, chosen)
    skeleton = fill(files, config, parts, target, chosen, scheme, as_stored, text_only)
    fingerprint = files.fingerprint()
    spec = kv_spec(text_config, chosen, fingerprint)
    num_bytes = weight_bytes(skeleton)
    return TextModel(
        text=build_text(text_config, spec, skeleton, parts, text_backend),
        tokenizer=load_tokenizer(files) if (files.directory / "tokenizer.json").is_file() else None,
        spec=spec,
        fingerprint=fingerprint,
        device=target,
        config=config,
        max_position=int(text_config.max_position_embeddings),
        weight_bytes=num_bytes,
    )
