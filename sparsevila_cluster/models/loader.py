"""Load the wanted parts of a checkpoint.

Knows: which families exist, what a config must not ask for, devices and dtypes. Does not know: architectures (their file says), how
tensors find their modules (`weights`), preprocessing, engines.

    config.json -> family, rules, chat format -> tensors of the wanted parts -> family + text backend -> Model
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsevila_cluster.errors import BadCheckpoint, BadConfig
from sparsevila_cluster.kv import KVSpec
from sparsevila_cluster.models import hf, lean
from sparsevila_cluster.models.adapter import ALL_PARTS, Model, Part
from sparsevila_cluster.models.chat import TemplateChat
from sparsevila_cluster.models.checkpoint import Checkpoint, canonical_json, one_line
from sparsevila_cluster.models.computing import resolve_attention
from sparsevila_cluster.models.lean_kernels import KernelDecoder
from sparsevila_cluster.models.weights import fill

FAMILIES = {
    "internvl": "sparsevila_cluster.models.internvl:InternVL",
    "llava_next": "sparsevila_cluster.models.llava_next:LlavaNext",
    "llava_onevision": "sparsevila_cluster.models.llava_onevision:LlavaOnevision",
    "qwen2_5_vl": "sparsevila_cluster.models.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "sparsevila_cluster.models.qwen3_vl:Qwen3VL",
}
"""model_type -> the class that implements `Family`, imported when a checkpoint needs it."""

TWINS = {
    "internvl_chat": "it runs by code of its own, which is never loaded; take the twin that is published for transformers, named "
    "with -hf at the end: OpenGVLab/InternVL3-8B-hf for OpenGVLab/InternVL3-8B, OpenGVLab/InternVL3_5-8B-HF for InternVL3_5-8B",
}
"""model_type of checkpoints that are also published in a form that is supported -> where to find that."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic")
"""Frequencies that depend on the lengths in a batch (longrope) would make a sequence depend on its neighbours. "dynamic" are the
default ones up to max_position_embeddings, and no sequence goes on beyond: `Model.max_position`."""


def load_model(
    directory: str | Path | Checkpoint,
    parts: Sequence[Part] = ALL_PARTS,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    text_backend: str = "auto",
    attention: str = "auto",
) -> Model:
    """Load `parts` of the checkpoint in `directory` (or one that is open already); tensors of other parts are never read.

    device: "auto" is a GPU if there is one. dtype: "auto" is float32 on a CPU and the checkpoint's own on a GPU. text_backend:
    "lean", "hf", or "auto" for lean wherever it knows the text model. attention: see `resolve_attention`.

    Raises:
        BadCheckpoint: the message names the file, tensor or rule. BadConfig: an unknown part, device, dtype or backend, or kernels
        that cannot run here.
    """
    target = _device(device)
    kernels = resolve_attention(attention, target)
    parts = _parts(parts)
    if text_backend not in ("auto", "lean", "hf"):
        raise BadConfig(f"text_backend must be auto, lean or hf, got {text_backend!r}")
    files = directory if isinstance(directory, Checkpoint) else Checkpoint.open(directory)
    family_class = _family_class(files)
    config = _read_config(files)
    text_config = config.get_text_config()
    _check_text(text_config)
    chosen = _dtype(dtype, target, config)
    rules = family_class.read_rules(config, files)
    default_eos = getattr(text_config, "eos_token_id", None)
    chat = TemplateChat(files, family_class.slots(config), family_class.visual_ids(config), default_eos)

    _check_ids(text_config, chat, family_class.visual_ids(config))
    skeleton = fill(files, config, parts, target, chosen)
    fingerprint = files.fingerprint()
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    spec = KVSpec(text_config.num_hidden_layers, text_config.num_key_value_heads, head_dim, chosen, fingerprint)
    core = skeleton.model
    family = family_class(config, rules, core if "vision" in parts else None, target)  # lets go of weights that it has no use for
    weight_bytes = _weight_bytes(skeleton)
    language_model = core.language_model
    embed = language_model.embed_tokens
    backend = text_backend
    if backend == "auto":
        backend = "hf" if lean.unsupported(text_config) else "lean"
    text: lean.LeanDecoder | hf.HFDecoder
    if backend == "lean":
        decoder = KernelDecoder if kernels == "triton" else lean.LeanDecoder
        text = decoder.from_modules(text_config, spec, language_model)
    else:
        text = hf.HFDecoder(text_config, spec, language_model)
    text.embed_weight = embed.weight if "embed" in parts else None
    text.head_weight = skeleton.lm_head.weight if "head" in parts else None
    return Model(
        family=family,
        text=text,
        chat=chat,
        spec=spec,
        fingerprint=fingerprint,
        parts=parts,
        device=target,
        config=config,
        processor_hash=_hash(rules.as_dict()),
        max_position=int(text_config.max_position_embeddings),
        weight_bytes=weight_bytes,
        attention=kernels,
    )


def _family_class(files: Checkpoint) -> Any:
    model_type = files.config.get("model_type")
    if model_type in TWINS:
        raise BadCheckpoint(f"config.json: model_type {model_type!r} is not supported: {TWINS[model_type]}")
    if model_type not in FAMILIES:
        raise BadCheckpoint(
            f"config.json: unsupported architecture: model_type {model_type!r}, architectures {files.config.get('architectures')}; "
            f"supported model types: {', '.join(sorted(FAMILIES))}"
        )
    module, _, name = FAMILIES[model_type].partition(":")
    return getattr(importlib.import_module(module), name)


def _read_config(files: Checkpoint) -> Any:
    from transformers import CONFIG_MAPPING

    text = files.config.get("text_config")
    for data in (files.config, text if isinstance(text, dict) else {}):
        if (quantization := data.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise BadCheckpoint(f"config.json: quantization_config: quant_method {method!r} is not supported; supported: none")
    try:
        return CONFIG_MAPPING[files.config["model_type"]].from_dict(files.config)
    except Exception as error:  # strict config classes raise validation errors of several libraries
        raise BadCheckpoint(f"config.json: {one_line(error)}") from error


def _check_text(config: Any) -> None:
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


def _check_ids(config: Any, chat: TemplateChat, visual_ids: Sequence[int]) -> None:
    """Every id that the tokenizer or a config can name must have an embedding."""
    for what, ids in (("the tokenizer", [chat.max_id]), ("eos_token_id", chat.eos_ids), ("a visual placeholder", visual_ids)):
        over = [i for i in ids if not 0 <= i < config.vocab_size]
        if over:
            raise BadCheckpoint(f"config.json: vocab_size {config.vocab_size} has no token {over[0]}, which {what} names")


def _parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    unknown = [part for part in parts if part not in ALL_PARTS]
    if unknown or "llm" not in parts:
        raise BadConfig(f"parts must be drawn from {', '.join(ALL_PARTS)} and hold 'llm', got {list(parts)}")
    return tuple(part for part in ALL_PARTS if part in parts)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise BadConfig(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise BadConfig(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    num = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= num:
        raise BadConfig(f"device {str(device)!r} does not exist here: {num} CUDA devices")
    return target


def _dtype(dtype: str | torch.dtype, device: torch.device, config: Any) -> torch.dtype:
    if dtype == "auto":
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        own = DTYPES.get(own) if isinstance(own, str) else own
        return torch.float32 if device.type == "cpu" or own is None or own not in DTYPES.values() else own
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise BadConfig(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return found


def _weight_bytes(module: nn.Module) -> int:
    return sum({p.data_ptr(): p.nbytes for p in module.parameters()}.values())


def _hash(data: Any) -> str:
    return hashlib.blake2b(canonical_json(data), digest_size=32).hexdigest()
