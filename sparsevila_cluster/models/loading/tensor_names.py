"""Names of tensors: on disk, in memory, and which part of a model they belong to.

visual.blocks.0.attn.qkv.weight  -> model.visual.blocks.0.attn.qkv.weight
model.layers.0.mlp.up_proj.qweight -> model.language_model.layers.0.mlp.up_proj.qweight     as its .weight would be renamed
"""

from __future__ import annotations

import logging
import re
from typing import Any

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models.adapter import Part
from sparsevila_cluster.models.checkpoint import Checkpoint

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
VISION_MODULES = ("visual", "vision_tower", "multi_modal_projector", "image_newline")
STORED_AS = {
    "gemm": ("qweight", "qzeros", "scales"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "w8a8": ("weight", "weight_scale", "smooth"),
}
"""Form of a quantized linear -> the leaves under its name, the one that holds the weights first."""

_QUANTISED = frozenset(leaf for leaves in STORED_AS.values() for leaf in leaves) - {"weight"}
_TEXT_LAYER = re.compile(r"(^|\.)layers\.\d+\.")
# Left in old checkpoints; made anew from the config.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")


def part_of(name: str) -> Part:
    """The part that a tensor belongs to, by its name in memory."""
    if name.startswith("lm_head."):
        return "head"
    name = name.removeprefix("model.")
    if name.startswith(VISION_MODULES):
        return "vision"
    return "embed" if name.removeprefix("language_model.").startswith("embed_tokens.") else "llm"


def in_text_layer(name: str) -> bool:
    """Whether a name in memory is inside one of the decoder layers."""
    return part_of(name) == "llm" and _TEXT_LAYER.search(name) is not None


def names_on_disk(files: Checkpoint, skeleton: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in memory -> name on disk, of every tensor in the files. shapes: of the skeleton's own tensors.

    A tensor of a quantized linear is renamed as the linear's `.weight` would be, so that both ways of naming modules work for it.

    Raises:
        BadCheckpoint: two tensors under one name, one that needs more than a new name, or one of a decoder layer that is not there.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    sources: dict[str, str] = {}
    for source in files.file_of:
        base, _, leaf = source.rpartition(".")
        stand_in = f"{base}.weight" if leaf in _QUANTISED else source
        name, converted = rename_source_key(stand_in, renamings, converters, skeleton.base_model_prefix, shapes)
        if converted is not None:
            raise BadCheckpoint(f"{files.file_of[source]}: tensor {source!r} is stored in a layout that needs more than a renaming")
        known = name in shapes
        if stand_in is not source:
            name = f"{name.removesuffix('.weight')}.{leaf}"
        if name in sources:
            files_of = " and ".join(sorted({files.file_of[sources[name]], files.file_of[source]}))
            raise BadCheckpoint(f"{files_of}: tensors {sources[name]!r} and {source!r} are both {name!r}")
        if not known and not name.endswith(_COMPUTED):
            if in_text_layer(name):
                raise BadCheckpoint(f"{files.file_of[source]}: tensor {source!r} belongs to no layer that config.json describes")
            log.warning("%s: tensor %s is not used", files.file_of[source], source)
        sources[name] = source
    return sources
