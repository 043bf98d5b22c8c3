"""Load the wanted parts of a checkpoint: a skeleton without memory, filled with only the tensors that a worker needs.

Knows: which families exist, how names on disk become names of modules, devices and dtypes. Does not know: architectures (their
file says), preprocessing, engines.

    config.json -> skeleton on the meta device -> tensors of the wanted parts -> family + text backend -> Model
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevila_cluster.errors import BadCheckpoint, BadConfig
from sparsevila_cluster.kv import KVSpec
from sparsevila_cluster.models import hf, lean, vision_attention
from sparsevila_cluster.models.adapter import ALL_PARTS, Model, Part
from sparsevila_cluster.models.chat import TemplateChat
from sparsevila_cluster.models.checkpoint import Checkpoint, canonical_json, one_line

FAMILIES = {
    "llava_next": "sparsevila_cluster.models.llava_next:LlavaNext",
    "llava_onevision": "sparsevila_cluster.models.llava_onevision:LlavaOnevision",
    "qwen2_5_vl": "sparsevila_cluster.models.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "sparsevila_cluster.models.qwen3_vl:Qwen3VL",
}
"""model_type -> the class that implements `Family`, imported when a checkpoint needs it."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Frequencies that depend on the lengths in a batch (dynamic, longrope) would make a sequence depend on its neighbours."""

_VISION_MODULES = ("visual", "vision_tower", "multi_modal_projector", "image_newline")


def load_model(
    directory: str | Path,
    parts: Sequence[Part] = ALL_PARTS,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    text_backend: str = "auto",
) -> Model:
    """Load `parts` of the checkpoint in `directory`; tensors of other parts are never read.

    device: "auto" is a GPU if there is one. dtype: "auto" is float32 on a CPU and the checkpoint's own on a GPU. text_backend:
    "lean", "hf", or "auto" for lean wherever it knows the text model.

    Raises:
        BadCheckpoint: the message names the file, tensor or rule. BadConfig: an unknown part, device, dtype or backend.
    """
    target = _device(device)
    parts = _parts(parts)
    if text_backend not in ("auto", "lean", "hf"):
        raise BadConfig(f"text_backend must be auto, lean or hf, got {text_backend!r}")
    files = Checkpoint.open(directory)
    family_class = _family_class(files)
    config = _read_config(files)
    text_config = config.get_text_config()
    _check_text(text_config)
    chosen = _dtype(dtype, target, config)
    rules = family_class.read_rules(config, files)
    default_eos = getattr(text_config, "eos_token_id", None)
    chat = TemplateChat(files, family_class.slots(config), family_class.visual_ids(config), default_eos)

    skeleton = _fill(files, config, parts, target, chosen)
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
    text = lean.LeanDecoder.from_modules(text_config, spec, language_model) if backend == "lean" else None
    text = text or hf.HFDecoder(text_config, spec, language_model)
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
    )


def part_of(name: str) -> Part:
    """The part that a tensor belongs to, by its name in memory."""
    if name.startswith("lm_head."):
        return "head"
    name = name.removeprefix("model.")
    if name.startswith(_VISION_MODULES):
        return "vision"
    return "embed" if name.startswith("language_model.embed_tokens.") else "llm"


def _fill(files: Checkpoint, config: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model of which `parts` hold weights and everything else is gone."""
    skeleton = _skeleton(config, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    tied = skeleton.get_expanded_tied_weights_keys()
    wanted = {name for name in shapes if part_of(name) in parts}
    wanted = {tied.get(name, name) for name in wanted}
    sources = _sources(files, skeleton, shapes)
    for name in sorted(wanted):
        if name not in sources:
            raise BadCheckpoint(f"tensor {name!r} is missing from {', '.join(files.shards)}")
        shard, found = files.file_of[sources[name]], files.shards[files.file_of[sources[name]]].shapes[sources[name]]
        if found != shapes[name]:
            raise BadCheckpoint(
                f"{shard}: tensor {sources[name]!r} has shape {list(found)}; config.json calls for {list(shapes[name])}"
            )
    target_of = {sources[name]: name for name in wanted}
    for source, tensor in files.read(target_of, device):
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        _place(skeleton, target_of[source], tensor)
    for name, source in tied.items():
        if part_of(name) in parts:
            _place(skeleton, name, skeleton.get_parameter(source).data)
    _drop(skeleton, parts)
    _compute_buffers(skeleton, device)
    left = [name for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()) if tensor.is_meta]
    assert not left, f"without weights: {left[:4]}"
    return skeleton


def _skeleton(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    names = {"text_config": hf.register(), "vision_config": vision_attention.register()}
    try:
        with torch.device("meta"), no_init_weights():
            skeleton = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise BadCheckpoint(f"config.json: no model can be built from it: {one_line(error)}") from error
    skeleton.set_attn_implementation(names)
    return skeleton.eval().requires_grad_(False)


def _sources(files: Checkpoint, skeleton: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in memory -> name on disk. Older checkpoints use other module names; transformers knows the renamings."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    sources: dict[str, str] = {}
    for source in files.file_of:
        name, converted = rename_source_key(source, renamings, converters, skeleton.base_model_prefix, shapes)
        if converted is not None:
            raise BadCheckpoint(f"tensor {source!r} is stored in a layout that needs more than a renaming")
        if name in sources:
            raise BadCheckpoint(f"tensors {sources[name]!r} and {source!r} are both {name!r}")
        sources[name] = source
    return sources


def _place(skeleton: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = skeleton.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _drop(skeleton: Any, parts: Sequence[Part]) -> None:
    core = skeleton.model
    if "vision" not in parts:
        for name in _VISION_MODULES:
            if hasattr(core, name):
                setattr(core, name, None)
    if core.language_model.embed_tokens.weight.is_meta or "embed" not in parts:
        core.language_model.embed_tokens = None
    if "head" not in parts:
        skeleton.lm_head = None


def _compute_buffers(skeleton: nn.Module, device: torch.device) -> None:
    """Rotary frequencies are on no disk: build their module again, off the meta device, in float32 whatever the dtype."""
    for name, buffer in list(skeleton.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            module = skeleton.get_submodule(path)
            module._buffers[leaf] = getattr(type(module)(module.config), leaf).to(device)


def _family_class(files: Checkpoint) -> Any:
    model_type = files.config.get("model_type")
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
        if data.get("quantization_config"):
            method = data["quantization_config"].get("quant_method") if isinstance(data["quantization_config"], dict) else None
            raise BadCheckpoint(f"config.json: quantization_config (quant_method {method!r}) is not supported yet")
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
        own = DTYPES.get(own, own) if isinstance(own, str) else own
        return torch.float32 if device.type == "cpu" or own not in DTYPES.values() else own
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise BadConfig(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return found


def _weight_bytes(module: nn.Module) -> int:
    return sum({p.data_ptr(): p.nbytes for p in module.parameters()}.values())


def _hash(data: Any) -> str:
    return hashlib.blake2b(canonical_json(data), digest_size=32).hexdigest()
