"""From tensors on disk to modules in memory: a skeleton without memory, filled with only the tensors that a worker needs.

Knows: names on disk and in memory, tied heads, shapes and dtypes, and which tensors belong to which part. Does not know: families,
preprocessing, text backends.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsevila_cluster.errors import BadCheckpoint
from sparsevila_cluster.models import hf, vision_attention
from sparsevila_cluster.models.adapter import Part
from sparsevila_cluster.models.checkpoint import Checkpoint, one_line

log = logging.getLogger(__name__)

HEAD, EMBED = "lm_head.weight", "model.language_model.embed_tokens.weight"
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
"""What a weight may be stored as. Everything else (int8, float8) needs scales that a plain load would ignore."""

_VISION_MODULES = ("visual", "vision_tower", "multi_modal_projector", "image_newline")
_TEXT_LAYER = re.compile(r"(^|\.)layers\.\d+\.")
# Left in old checkpoints; made anew from the config.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")


def part_of(name: str) -> Part:
    """The part that a tensor belongs to, by its name in memory."""
    if name.startswith("lm_head."):
        return "head"
    name = name.removeprefix("model.")
    if name.startswith(_VISION_MODULES):
        return "vision"
    return "embed" if name.startswith("language_model.embed_tokens.") else "llm"


def fill(files: Checkpoint, config: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype) -> Any:
    """A transformers model of which `parts` hold weights and everything else is gone.

    Raises:
        BadCheckpoint: a tensor is missing, of a wrong shape or dtype, there twice, or unknown to the config; the message names it
            and its file.
    """
    skeleton = _skeleton(config, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    sources = _sources(files, skeleton, shapes)
    tied = _tied(files, config, skeleton, sources, "head" in parts)
    wanted = {tied.get(name, name) for name in shapes if part_of(name) in parts}
    for name in sorted(wanted):
        _check_tensor(files, name, sources, shapes[name])
    target_of = {sources[name]: name for name in wanted}
    for source, tensor in files.read(target_of, device):
        _place(skeleton, target_of[source], tensor.to(dtype))
    for name, source in tied.items():
        if part_of(name) in parts:
            _place(skeleton, name, skeleton.get_parameter(source).data)
    _drop(skeleton, parts)
    _compute_buffers(skeleton, device)
    left = [name for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()) if tensor.is_meta]
    assert not left, f"without weights: {left[:4]}"
    return skeleton


def _check_tensor(files: Checkpoint, name: str, sources: dict[str, str], wanted: tuple[int, ...]) -> None:
    if name not in sources:
        raise BadCheckpoint(f"tensor {name!r} is missing from {', '.join(files.shards)}")
    source = sources[name]
    file = files.file_of[source]
    found, stored = files.shards[file].shapes[source], files.shards[file].dtypes[source]
    if found != wanted:
        raise BadCheckpoint(f"{file}: tensor {source!r} has shape {list(found)}; config.json calls for {list(wanted)}")
    if stored not in STORED_DTYPES:
        raise BadCheckpoint(
            f"{file}: tensor {source!r} is stored as {stored}, and config.json names no quantization that would explain it; "
            f"readable: {', '.join(STORED_DTYPES)}"
        )


def _tied(files: Checkpoint, config: Any, skeleton: Any, sources: dict[str, str], needs_head: bool) -> dict[str, str]:
    """Parameters that are another one's: the head and the embedding, if the config or its text part says so.

    A checkpoint may hold a tied head as a second copy of the embedding; another head than that would be one too many.
    """
    told = bool(getattr(config, "tie_word_embeddings", False))
    inner = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    tied = {name: source for name, source in skeleton.get_expanded_tied_weights_keys().items() if name != HEAD}
    if HEAD not in sources and (told or inner):
        tied[HEAD] = EMBED
    elif HEAD in sources and told and needs_head and EMBED in sources:
        names = {sources[HEAD]: "head", sources[EMBED]: "embed"}
        both = {names[source]: tensor for source, tensor in files.read(names, torch.device("cpu"))}
        if not torch.equal(both["head"], both["embed"]):
            raise BadCheckpoint(
                f"{files.file_of[sources[HEAD]]}: tensor {sources[HEAD]!r} differs from {sources[EMBED]!r}, although config.json "
                "ties them (tie_word_embeddings): which one is the head?"
            )
        tied[HEAD] = EMBED
    return tied


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
            raise BadCheckpoint(f"{files.file_of[source]}: tensor {source!r} is stored in a layout that needs more than a renaming")
        if name in sources:
            files_of = " and ".join(sorted({files.file_of[sources[name]], files.file_of[source]}))
            raise BadCheckpoint(f"{files_of}: tensors {sources[name]!r} and {source!r} are both {name!r}")
        if name not in shapes and not name.endswith(_COMPUTED):
            if part_of(name) == "llm" and _TEXT_LAYER.search(name):
                raise BadCheckpoint(f"{files.file_of[source]}: tensor {source!r} belongs to no layer that config.json describes")
            log.warning("%s: tensor %s is not used", files.file_of[source], source)
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
