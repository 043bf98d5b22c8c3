"""The text decoder of a filled transformers model: which backend runs it, and what its config must not ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadConfig
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.models.adapter import Part, TextBackend
from sparsevila_cluster.models.loading.device_placement import Kernels
from sparsevila_cluster.models.loading.weights import language_model_of
from sparsevila_cluster.models.text import hf, lean
from sparsevila_cluster.models.text.lean_kernels import KernelDecoder

BACKENDS = ("auto", "lean", "hf")
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic")
"""Frequencies that depend on the lengths in a batch (longrope) would make a sequence depend on its neighbours. "dynamic" are the
default ones up to max_position_embeddings, and no sequence goes on beyond: `Model.max_position`."""


def check_backend(text_backend: str) -> None:
    """Raises BadConfig: no such backend."""
    if text_backend not in BACKENDS:
        raise BadConfig(f"text_backend must be auto, lean or hf, got {text_backend!r}")


def check_text(config: Any) -> None:
    """Raises BadCheckpoint: a text config with positions, windows or heads that no backend computes."""
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope not in STATIC_ROPE:
        raise BadCheckpoint(f"config.json: rope_type {rope!r} is not supported; supported: {', '.join(STATIC_ROPE)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (config.model_type == "mistral" and config.sliding_window):
        raise BadCheckpoint(f"config.json: only full attention is supported, got {', '.join(sorted(kinds))} with a sliding window")
    if config.num_attention_heads % config.num_key_value_heads:
        raise BadCheckpoint(
            f"config.json: num_attention_heads {config.num_attention_heads} is no multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )


def kv_spec(config: Any, dtype: torch.dtype, fingerprint: str) -> KVSpec:
    """What a text config says of the KV."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KVSpec(config.num_hidden_layers, config.num_key_value_heads, head_dim, dtype, fingerprint)


def build_text(
    config: Any, spec: KVSpec, skeleton: Any, parts: Sequence[Part], text_backend: str, kernels: Kernels = "torch"
) -> TextBackend:
    """The backend over a filled transformers model, which it may empty. "auto" is lean wherever it knows the text model.

    Raises:
        BadCheckpoint: "lean" is asked for and does not know the text model.
    """
    language_model = language_model_of(skeleton)
    embed = language_model.embed_tokens
    if text_backend == "auto":
        text_backend = "hf" if lean.unsupported(config) else "lean"
    text: lean.LeanDecoder | hf.HFDecoder
    if text_backend == "lean":
        decoder = KernelDecoder if kernels == "triton" else lean.LeanDecoder
        text = decoder.from_modules(config, spec, language_model)
    else:
        text = hf.HFDecoder(config, spec, language_model)
    text.embed_weight = embed.weight if "embed" in parts else None
    text.head_weight = skeleton.lm_head.weight if "head" in parts else None
    return text
