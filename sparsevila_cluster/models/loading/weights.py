"""From tensors on disk to modules in memory: a skeleton without memory, filled with only the tensors that a worker needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models import vision_attention
from sparsevila_cluster.models.adapter import Part
from sparsevila_cluster.models.checkpoint import Checkpoint, one_line
from sparsevila_cluster.models.loading.quantization_scheme import Scheme
from sparsevila_cluster.models.loading.quantized_linears import find_linears
from sparsevila_cluster.models.loading.tensor_names import HEAD, VISION_MODULES, names_on_disk, part_of
from sparsevila_cluster.models.text import hf
from sparsevila_cluster.models.text.linear import AwqLinear, Int8Linear
from sparsevila_kernels import AwqWeight, Int8Weight

STORED_DTYPES = ("F64", "F32", "F16", "BF16")
"""What a plain weight may be stored as. Everything else (int8, float8) needs scales that a plain load would ignore."""


def fill(
    files: Checkpoint,
    config: Any,
    parts: Sequence[Part],
    device: torch.device,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    as_stored: bool = True,
    text_only: bool = False,
) -> Any:
    """A transformers model of which `parts` hold weights and everything else is gone.

    scheme: what config.json says of quantized weights. as_stored: they stay so, in the place of the linears that the files hold
    quantized; otherwise they become plain weights of `dtype`. text_only: the config is one of a language model without vision.

    Raises:
        BadCheckpoint: a tensor is missing, of a wrong shape or dtype, there twice, or unknown to the config; the message names it
            and its file.
    """
    skeleton = _skeleton(config, dtype, text_only)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    sources = names_on_disk(files, skeleton, shapes)
    stored = find_linears(files, scheme, skeleton, sources, parts)
    tied = _tied(files, config, skeleton, sources, "head" in parts)
    wanted = {tied.get(name, name) for name in shapes if part_of(name) in parts} - {f"{path}.weight" for path in stored}
    for name in sorted(wanted):
        _check_tensor(files, name, sources, shapes[name])
    target_of = {sources[name]: name for name in wanted}
    for source, tensor in files.read(target_of, device):
        _place(skeleton, target_of[source], tensor.to(dtype))
    for linear in stored.values():
        _place_quantized(skeleton, linear.path, linear.read(files, device), dtype, as_stored)
    for name, source in tied.items():
        if part_of(name) in parts:
            _place(skeleton, name, skeleton.get_parameter(source).data)
    _drop(skeleton, parts)
    _compute_buffers(skeleton, device)
    left = [name for name, tensor in (*skeleton.named_parameters(), *skeleton.named_buffers()) if tensor.is_meta]
    assert not left, f"without weights: {left[:4]}"
    return skeleton


def source_names(files: Checkpoint, config: Any, text_only: bool = False) -> dict[str, str]:
    """Names of the checkpoint's tensors: in memory -> on disk. config: one that no model was built from yet."""
    skeleton = _skeleton(config, torch.float32, text_only)
    return names_on_disk(files, skeleton, {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()})


def language_model_of(skeleton: Any) -> Any:
    """The text decoder of a model with or without vision."""
    return getattr(skeleton.model, "language_model", skeleton.model)


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

    A checkpoint may hold a tied head as a second copy of the embedding. Another head than that is one too many, unless the text
    part says that it is not tied: above it some configs read as tied when they say nothing, and are saved so.
    """
    told = bool(getattr(config, "tie_word_embeddings", False))
    inner = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    tied = {name: source for name, source in skeleton.get_expanded_tied_weights_keys().items() if name != HEAD}
    embed = next(name for name in skeleton.state_dict() if part_of(name) == "embed")
    if HEAD not in sources and (told or inner):
        tied[HEAD] = embed
    elif HEAD in sources and told and needs_head and embed in sources:
        names = {sources[HEAD]: "head", sources[embed]: "embed"}
        both = {names[source]: tensor for source, tensor in files.read(names, torch.device("cpu"))}
        if torch.equal(both["head"], both["embed"]):
            tied[HEAD] = embed
        elif inner or "text_config" not in files.config:
            raise BadCheckpoint(
                f"{files.file_of[sources[HEAD]]}: tensor {sources[HEAD]!r} differs from {sources[embed]!r}, although config.json "
                "ties them (tie_word_embeddings): which one is the head?"
            )
    return tied


def _skeleton(config: Any, dtype: torch.dtype, text_only: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    auto = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    names = hf.register() if text_only else {"text_config": hf.register(), "vision_config": vision_attention.register()}
    try:
        with torch.device("meta"), no_init_weights():
            skeleton = auto.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError, AttributeError) as error:
        raise BadCheckpoint(f"config.json: no model can be built from it: {one_line(error)}") from error
    skeleton.set_attn_implementation(names)
    return skeleton.eval().requires_grad_(False)


def _place(skeleton: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = skeleton.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _place_quantized(skeleton: nn.Module, path: str, weight: AwqWeight | Int8Weight, dtype: torch.dtype, as_stored: bool) -> None:
    """A module that holds everything it needs takes the linear's place, or the linear gets a plain weight; also where a CPU has no
    fast product for this one weight (a group size that torch's operator does not take).
    """
    linear: Any = skeleton.get_submodule(path)
    slow = isinstance(weight, AwqWeight) and weight.device.type == "cpu" and not weight.in_blocks
    if slow or not as_stored:
        plain = weight.dequantize(dtype)
        _place(skeleton, f"{path}.weight", plain.t().contiguous() if isinstance(weight, AwqWeight) else plain)
    elif isinstance(weight, AwqWeight):
        skeleton.set_submodule(path, AwqLinear(weight, linear.bias))
    else:
        skeleton.set_submodule(path, Int8Linear(weight, linear.bias))


def _drop(skeleton: Any, parts: Sequence[Part]) -> None:
    core, language_model = skeleton.model, language_model_of(skeleton)
    if "vision" not in parts:
        for name in VISION_MODULES:
            if hasattr(core, name):
                setattr(core, name, None)
    if language_model.embed_tokens.weight.is_meta or "embed" not in parts:
        language_model.embed_tokens = None
    if "head" not in parts:
        skeleton.lm_head = None


def _compute_buffers(skeleton: nn.Module, device: torch.device) -> None:
    """Rotary frequencies are on no disk: build their module again, off the meta device, in float32 whatever the dtype."""
    for name, buffer in list(skeleton.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            module = skeleton.get_submodule(path)
            module._buffers[leaf] = getattr(type(module)(module.config), leaf).to(device)
