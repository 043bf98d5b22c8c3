"""Quantized checkpoint directories for tests, and what their weights are worth, read in the plainest way.

Nothing here uses the product's own reading or packing: the oracle unpacks words nibble by nibble, as the format is published.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import tiny_qwen2_5_vl

GOLDEN = Path(os.environ.get("SPARSEVILA_TEST_CHECKPOINTS", Path(__file__).parents[3] / "shared" / "data")) / "awq_golden"
SHIFT_OF_COLUMN = (0, 16, 4, 20, 8, 24, 12, 28)
"""Column j of a word lies at this bit, as AutoAWQ interleaves them."""
VISION = {"bits": 8, "scheme": "w8a8", "weights": "per_channel", "activations": "per_token"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def awq_codes(words: Tensor) -> Tensor:
    """i32 [R, C / 8] -> i64 [R, C]."""
    return torch.stack([(words.long() >> shift) & 15 for shift in SHIFT_OF_COLUMN], -1).flatten(1)


def awq_words(codes: Tensor) -> Tensor:
    """i64 [R, C] -> i32 [R, C / 8]."""
    lanes = codes.long().unflatten(1, (-1, 8))
    words = sum(lanes[..., j] << shift for j, shift in enumerate(SHIFT_OF_COLUMN))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """nn.Linear's weight f32 [N, K]: (q - z) * s, exact."""
    group = len(qweight) // len(scales)
    zeros, steps = (rows.repeat_interleave(group, 0) for rows in (awq_codes(qzeros), scales.float()))
    return ((awq_codes(qweight) - zeros) * steps).t()


def quantize_rows(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """nn.Linear's weight [N, K] -> codes i64 [K, N], zeros i64 [K / g, N], scales f16 [K / g, N]; any 4-bit rounding would do."""
    groups = weight.float().t().unflatten(0, (-1, group))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-4).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (groups / scales.float()[:, None] + zeros[:, None]).round().clamp(0, 15)
    return codes.flatten(0, 1).long(), zeros.long(), scales


def weights_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, whatever its shards."""
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(source: Path, target: Path, weights: dict[str, Tensor], quantization: dict[str, Any] | None, shards: int = 1) -> Path:
    """`source` with other tensors and another quantization_config."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    tiny_qwen2_5_vl.write_weights(target, {name: tensor.contiguous() for name, tensor in weights.items()}, shards)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    (target / "config.json").write_text(json.dumps(config))
    return target


def config_of(directory: Path) -> dict[str, Any]:
    """What a directory's config.json says of its quantization."""
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def in_layers(name: str) -> bool:
    """Whether a name on disk is the weight of a linear inside a decoder layer, in either way of naming."""
    text = not name.startswith(("visual.", "model.visual.", "vision_tower.", "model.vision_tower."))
    return text and ".layers." in name and name.endswith("_proj.weight")


def as_awq(
    source: Path,
    target: Path,
    group: int = 32,
    dtype: torch.dtype = torch.float16,
    wanted: Callable[[str], bool] = in_layers,
    shards: int = 1,
    **keys: Any,
) -> Path:
    """A plain checkpoint as an AutoAWQ one: linears whose weight's name is `wanted` in 4 bits."""
    weights = {}
    for name, tensor in weights_of(source).items():
        if wanted(name):
            codes, zeros, scales = quantize_rows(tensor, group)
            base = name.removesuffix("weight")
            weights |= {f"{base}qweight": awq_words(codes), f"{base}qzeros": awq_words(zeros), f"{base}scales": scales.to(dtype)}
        else:
            weights[name] = tensor
    return rewrite(source, target, weights, {**AWQ, "group_size": group, **keys}, shards)


def plain_twin(source: Path, target: Path) -> Path:
    """An AutoAWQ checkpoint as a plain float32 one: the oracle of what it means."""
    found = weights_of(source)
    weights = {name: tensor.float() for name, tensor in found.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in found:
        if name.endswith(".qweight"):
            base = name.removesuffix("qweight")
            weights[f"{base}weight"] = awq_weight(found[name], found[f"{base}qzeros"], found[f"{base}scales"])
    return rewrite(source, target, weights, None)


def in_tower_blocks(name: str) -> bool:
    """Whether a name on disk may be the weight of a linear inside a block of the vision tower."""
    return re.search(r"vis(ual|ion_tower)\..*(blocks|layers?)\.\d+\..*weight$", name) is not None


def as_w8a8(source: Path, target: Path, quantization: dict[str, Any] | None = None, smooth: bool = True) -> Path:
    """A plain checkpoint with the blocks of its tower in 8 bits, beside what `quantization` says of the text."""
    weights, draw = {}, torch.Generator().manual_seed(0)
    for name, tensor in weights_of(source).items():
        weights[name] = tensor
        if in_tower_blocks(name) and tensor.dim() == 2:
            base = name.removesuffix("weight")
            by_input = torch.rand(tensor.shape[1], generator=draw) + 0.5 if smooth else torch.ones(tensor.shape[1])
            wide = tensor.float() * by_input
            scale = wide.abs().amax(1, keepdim=True) / 127
            weights |= {name: (wide / scale).round().to(torch.int8), f"{base}weight_scale": scale}
            if smooth:
                weights[f"{base}smooth"] = by_input
    return rewrite(source, target, weights, {**(quantization or {}), "vision": VISION})


def natural_words(codes: Tensor, dim: int) -> Tensor:
    """Codes packed along a dimension, the first of eight lowest: as compressed-tensors does."""
    lanes = codes.long().movedim(dim, -1).unflatten(-1, (-1, 8))
    words = sum(lanes[..., j] << 4 * j for j in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, dim)


def as_pack_quantized(source: Path, target: Path, symmetric: bool, group: int = 32) -> tuple[Path, dict[str, Tensor]]:
    """A plain checkpoint as llm-compressor writes it, from drawn codes; and the plain weights that it means."""
    draw = torch.Generator().manual_seed(0)
    stored, plain = {}, {}
    for name, tensor in weights_of(source).items():
        stored[name] = plain[name] = tensor
        if in_layers(name):
            num_out, num_in = tensor.shape
            values = torch.randint(-8, 8, (num_out, num_in), generator=draw)
            zeros = torch.zeros(num_out, num_in // group, dtype=torch.int64)
            if not symmetric:
                zeros = torch.randint(-8, 8, zeros.shape, generator=draw)
            scales = (0.01 + 0.02 * torch.rand(zeros.shape, generator=draw)).bfloat16()
            base = name.removesuffix("weight")
            del stored[name]
            stored |= {
                f"{base}weight_packed": natural_words(values + 8, 1),
                f"{base}weight_scale": scales,
                f"{base}weight_shape": torch.tensor([num_out, num_in]),
            }
            if not symmetric:
                stored[f"{base}weight_zero_point"] = natural_words(zeros + 8, 0)
            wide = (t.repeat_interleave(group, 1) for t in (zeros, scales.float()))
            plain[name] = (values - next(wide)) * next(wide)
    return rewrite(source, target, stored, pack_config(symmetric, group)), plain


def pack_config(symmetric: bool, group: int = 32, **weights: Any) -> dict[str, Any]:
    """quantization_config of llm-compressor."""
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": group, "symmetric": symmetric, "dynamic": False,
        "actorder": None, "observer": "minmax", **weights,
    }  # fmt: skip
    one = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": one}, "ignore": ["lm_head", "re:.*visual.*"], "kv_cache_scheme": None,
    }  # fmt: skip
