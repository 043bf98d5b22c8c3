"""What a checkpoint says of its quantization: `quantization_config` of config.json, read into one frozen value.

Whether the files keep what the config says shows when they are read.

{"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": true, "version": "gemm", "modules_to_not_convert": [...]}
{"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {...}, "ignore": ["lm_head", ...]}
{..., "vision": {"bits": 8, "scheme": "w8a8", "weights": "per_channel", "activations": "per_token"}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from sparsevila_cluster.core.errors import BadCheckpoint

SUPPORTED = (
    "AutoAWQ (quant_method 'awq', version 'gemm', 4 bits, zero_point), "
    "compressed-tensors (format 'pack-quantized', 4 bits in groups)"
)
VISION_SECTION = {"bits": 8, "scheme": "w8a8", "weights": "per_channel", "activations": "per_token"}
"""The only 8-bit form of a vision tower that is read and written."""

_KEY = "quantization_config"
_WHOLE_INPUT = -1  # group_size of one group that spans all inputs


@dataclass(frozen=True)
class TextScheme:
    """4-bit weights of the language model. form: how their tensors are named and packed. group_size: inputs that share a scale, -1
    for all. symmetric: no zero points are stored. spared: names or "re:" patterns of modules that are not quantized.
    """

    form: Literal["gemm", "pack-quantized"]
    group_size: int
    symmetric: bool = False
    spared: tuple[str, ...] = ()

    def group_of(self, num_in: int) -> int:
        """Inputs in one group of a linear with `num_in` inputs."""
        return num_in if self.group_size == _WHOLE_INPUT else self.group_size

    def spares(self, names: Sequence[str]) -> bool:
        """Whether every reader would take a linear for one that is not quantized: an entry is whole parts of one of its names."""
        return any(_is_part(entry, name) for entry in self.spared for name in names)

    def may_spare(self, names: Sequence[str]) -> bool:
        """Whether some reader would: AutoAWQ takes an entry for a piece of text, in the middle of a word too."""
        return self.spares(names) or any(entry in name for entry in self.spared for name in names)


@dataclass(frozen=True)
class Scheme:
    """text: how the language model is quantized, None if it is not. vision: whether the linears of the vision tower are W8A8."""

    text: TextScheme | None
    vision: bool


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The quantization that config.json (as parsed) describes, at its top or in its text_config; None if it speaks of none.

    Raises:
        BadCheckpoint: a kind that cannot be served, or values that contradict each other; names the value and what is supported.
    """
    text = config.get("text_config")
    found = [data[_KEY] for data in (config, text) if isinstance(data, dict) and data.get(_KEY) is not None]
    if not found:
        return None
    if len(found) == 2 and found[0] != found[1]:
        raise _refusal("at the top and in text_config differ; one of them must go")
    data = found[0]
    if not isinstance(data, dict):
        raise _refusal(f"must be an object, got {data!r}; supported: {SUPPORTED}")
    vision = _read_vision(data["vision"]) if data.get("vision") is not None else False
    method = data.get("quant_method")
    if method == "awq":
        return Scheme(_read_awq(data), vision)
    if method == "compressed-tensors":
        return Scheme(_read_compressed(data), vision)
    if method is None and vision:
        return Scheme(None, vision)
    raise _refusal(f"quant_method {method!r} is not supported; supported: {SUPPORTED}")


def _read_awq(data: dict[str, Any]) -> TextScheme:
    """AutoAWQ's keys. gptqmodel repeats `version` as `format` and `checkpoint_format`; its other keys have no say here."""
    for key in ("version", "format", "checkpoint_format"):
        value = data.get(key)
        if value is not None and str(value).lower() != "gemm":
            raise _refusal(f"{key} {value!r} of quant_method 'awq' is not supported; supported: 'gemm'")
    _expect(data, "bits", 4, "4")
    if data.get("zero_point", True) is not True:
        raise _refusal(f"zero_point {data['zero_point']!r} is not supported; supported: true")
    if data.get("desc_act"):
        raise _refusal(f"desc_act {data['desc_act']!r} is not supported: inputs in another order; supported: false")
    return TextScheme("gemm", _group_size(data, whole=True), spared=_names(data, "modules_to_not_convert"))


def _read_compressed(data: dict[str, Any]) -> TextScheme:
    groups = data.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        num = len(groups) if isinstance(groups, dict) else 0
        raise _refusal(f"config_groups must hold one group, got {num}; linears of several kinds are not supported")
    ((name, group),) = groups.items()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise _refusal(f"config_groups: {name!r} has no weights")
    for key, value in (("format", data.get("format")), (f"{name}: format", group.get("format", "pack-quantized"))):
        if value != "pack-quantized":
            raise _refusal(f"{key} {value!r} of quant_method 'compressed-tensors' is not supported; supported: 'pack-quantized'")
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            raise _refusal(f"{name}: {key} must be null: 4-bit weights are served with activations as they are")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if data.get(key):
            raise _refusal(f"{key} is set and not supported; supported: null")
    if "Linear" not in _names(group, "targets"):
        raise _refusal(f"{name}: targets {group.get('targets')!r} is not supported; supported: ['Linear']")
    _expect(weights, "num_bits", 4, "4")
    _expect(weights, "type", "int", "'int'")
    _expect(weights, "strategy", "group", "'group'")
    if weights.get("dynamic"):
        raise _refusal(f"{name}: dynamic weights are not supported")
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static"):
        raise _refusal(f"{name}: actorder {order!r} is not supported: inputs in another order; supported: null, 'weight'")
    return TextScheme("pack-quantized", _group_size(weights), bool(weights.get("symmetric", True)), _names(data, "ignore"))


def _read_vision(data: Any) -> Literal[True]:
    if data != VISION_SECTION:
        raise _refusal(f"vision {data!r} is not supported; supported: {VISION_SECTION}")
    return True


def _expect(data: dict[str, Any], key: str, wanted: Any, supported: str) -> None:
    if data.get(key) != wanted:
        raise _refusal(f"{key} {data.get(key)!r} is not supported; supported: {supported}")


def _group_size(data: dict[str, Any], whole: bool = False) -> int:
    size = data.get("group_size")
    if _is_whole_number(size) and (size > 0 and size % 16 == 0 or whole and size == _WHOLE_INPUT):
        return size
    raise _refusal(f"group_size {size!r} is not supported; supported: multiples of 16" + ", or -1 for all inputs" * whole)


def _is_whole_number(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(data: dict[str, Any], key: str) -> tuple[str, ...]:
    """A list of names that may be missing or null."""
    names = data.get(key)
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _refusal(f"{key} must be a list of names or null, got {names!r}")
    for name in names:
        if name.startswith("re:"):
            try:
                re.compile(name[3:])
            except re.error as error:
                raise _refusal(f"{key}: {name!r} is no regular expression: {error}") from error
    return tuple(names)


def _is_part(entry: str, name: str) -> bool:
    """So that "visual" is a part of "model.visual.blocks.0" and not of "audiovisual.blocks"."""
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return f".{entry.strip('.')}." in f".{name}."


def _refusal(why: str) -> BadCheckpoint:
    return BadCheckpoint(f"config.json: {_KEY}: {why}")
