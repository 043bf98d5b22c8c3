"""Load the wanted parts of a checkpoint.

config.json -> family, rules, chat format -> tensors of the wanted parts -> family + text backend -> Model
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadConfig
from sparsevila_cluster.models.adapter import ALL_PARTS, Model, Part
from sparsevila_cluster.models.chat_template import TemplateChat
from sparsevila_cluster.models.checkpoint import Checkpoint, canonical_json, one_line
from sparsevila_cluster.models.families import CONVERTED, FAMILIES
from sparsevila_cluster.models.loading.device_placement import find_device, find_dtype, resolve_attention, runs_as_stored
from sparsevila_cluster.models.loading.quantization_scheme import read_scheme
from sparsevila_cluster.models.loading.text_backend import build_text, check_backend, check_text, kv_spec
from sparsevila_cluster.models.loading.weights import fill
from sparsevila_cluster.models.text.linear import weight_bytes


def load_model(
    directory: str | Path | Checkpoint,
    parts: Sequence[Part] = ALL_PARTS,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    text_backend: str = "auto",
    quantization: str = "auto",
    attention: str = "auto",
) -> Model:
    """Load `parts` of the checkpoint in `directory` (or one that is open already); tensors of other parts are never read.

    device: "auto" is a GPU if there is one. dtype: "auto" is float32 on a CPU and the checkpoint's own on a GPU, bfloat16 for a
    quantized checkpoint. text_backend: "lean", "hf", or "auto" for lean wherever it knows the text model. quantization: "auto" runs
    quantized weights as they are stored where that is fast (`runs_as_stored`), "none" makes them plain as they are loaded.
    attention: the kernels of the text decoder (`resolve_attention`).

    Raises:
        BadCheckpoint: the message names the file, tensor or rule. BadConfig: an unknown part, device, dtype, backend,
            quantization or attention, or kernels that cannot run here.
    """
    return load_modules(directory, parts, device, dtype, text_backend, quantization, attention)[0]


def load_modules(
    directory: str | Path | Checkpoint,
    parts: Sequence[Part] = ALL_PARTS,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    text_backend: str = "auto",
    quantization: str = "auto",
    attention: str = "auto",
) -> tuple[Model, Any]:
    """As `load_model`, and the transformers model that it is made of; the backend "hf" leaves the modules of the text in it."""
    target = find_device(device)
    kernels = resolve_attention(attention, target)
    parts = _parts(parts)
    check_backend(text_backend)
    files = directory if isinstance(directory, Checkpoint) else Checkpoint.open(directory)
    family_class = family_class_of(files)
    scheme = read_scheme(files.config)
    config = read_config(files)
    text_config = config.get_text_config()
    check_text(text_config)
    chosen = find_dtype(dtype, target, config, scheme)
    as_stored = runs_as_stored(quantization, target, chosen)
    rules = family_class.read_rules(config, files)
    default_eos = getattr(text_config, "eos_token_id", None)
    chat = TemplateChat(files, family_class.slots(config), family_class.visual_ids(config), default_eos)

    _check_ids(text_config, chat, family_class.visual_ids(config))
    skeleton = fill(files, config, parts, target, chosen, scheme, as_stored)
    fingerprint = files.fingerprint()
    spec = kv_spec(text_config, chosen, fingerprint)
    core = skeleton.model if "vision" in parts else None
    family = family_class(config, rules, core, target)  # lets go of weights that it has no use for
    num_bytes = weight_bytes(skeleton)
    text = build_text(text_config, spec, skeleton, parts, text_backend, kernels)
    model = Model(
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
        weight_bytes=num_bytes,
        attention=kernels,
    )
    return model, skeleton


def family_class_of(files: Checkpoint) -> Any:
    """The class that implements `Family` for a checkpoint. Raises BadCheckpoint: none does."""
    model_type = files.config.get("model_type")
    if model_type in CONVERTED:
        raise BadCheckpoint(f"config.json: model_type {model_type!r} is not supported: {CONVERTED[model_type]}")
    if model_type not in FAMILIES:
        raise BadCheckpoint(
            f"config.json: unsupported architecture: model_type {model_type!r}, architectures {files.config.get('architectures')}; "
            f"supported model types: {', '.join(sorted(FAMILIES))}"
        )
    module, _, name = FAMILIES[model_type].partition(":")
    return getattr(importlib.import_module(module), name)


def read_config(files: Checkpoint) -> Any:
    """config.json as transformers' config class of its model_type, without a word about quantization.

    Raises:
        BadCheckpoint: a value that the class does not take.
    """
    from transformers import CONFIG_MAPPING

    data = deepcopy(files.config)  # transformers writes into what it is given
    for part in (data, data.get("text_config")):
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    try:
        return CONFIG_MAPPING[data["model_type"]].from_dict(data)
    except Exception as error:  # strict config classes raise validation errors of several libraries
        raise BadCheckpoint(f"config.json: {one_line(error)}") from error


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


def _hash(data: Any) -> str:
    return hashlib.blake2b(canonical_json(data), digest_size=32).hexdigest()
