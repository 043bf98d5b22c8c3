"""A checkpoint whose weights are made where they are wanted: seeded random numbers, dense or in 4 bits, on no disk.

The loader reads it like any other (`Checkpoint`), tensor by tensor and straight into the memory of the device, so that a model of
15 GB needs no file of 15 GB. Every tensor has a seed of its own, made of its name: the dense checkpoint and the one in 4 bits hold
the same numbers, the latter rounded to nearest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.midsize_checkpoint import Recipe, config_of, write_layout
from sparsevila_cluster.models.checkpoint import Checkpoint, Shard
from sparsevila_kernels import awq_format

FILE = "random"
STORED = {"BF16": torch.bfloat16, "F32": torch.float32}
_IN_4_BITS = ("qweight", "qzeros", "scales")

# Qwen2.5-VL-7B, its processor taking frames of 364 x 364 pixels: 169 visual tokens for every two frames.
SEVEN_B = Recipe(
    hidden=3584, num_layers=28, num_heads=28, num_kv_heads=4, intermediate=18944, vocab=152064,
    vision_hidden=1280, vision_layers=32, vision_heads=16, vision_intermediate=3420, full_layers=(7, 15, 23, 31), frame_px=364,
)  # fmt: skip


@dataclass(frozen=True)
class RandomCheckpoint(Checkpoint):
    """group_size: of 4-bit weights; 0 leaves all of them dense."""

    seed: int = 0
    group_size: int = 0

    @classmethod
    def make(cls, recipe: Recipe, directory: Path, stored: str = "BF16", group_size: int = 0) -> RandomCheckpoint:
        """`directory` gets the tokenizer and the rules of the processor, and no weights."""
        directory.mkdir(parents=True, exist_ok=True)
        write_layout(directory, recipe)
        config = config_of(recipe).to_dict() | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        config["dtype"] = str(STORED[stored]).removeprefix("torch.")
        shapes: dict[str, tuple[int, ...]] = {}
        dtypes: dict[str, str] = {}
        for name, shape in _shapes(recipe).items():
            if group_size and _is_quantised(name):
                base, (num_out, num_in) = name.removesuffix(".weight"), shape
                words = {"qweight": (num_in, num_out // 8), "qzeros": (num_in // group_size, num_out // 8)}
                shapes |= {f"{base}.{leaf}": size for leaf, size in words.items()}
                dtypes |= {f"{base}.{leaf}": "I32" for leaf in words}
                shapes[f"{base}.scales"], dtypes[f"{base}.scales"] = (num_in // group_size, num_out), "F16"
            else:
                shapes[name], dtypes[name] = shape, stored
        if group_size:
            config["quantization_config"] = {
                "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": ["visual"],
            }  # fmt: skip
        config = json.loads(json.dumps(config))
        (directory / "config.json").write_text(json.dumps(config, indent=1))
        shard = Shard(directory / FILE, json.dumps(dtypes, sort_keys=True).encode(), shapes, dtypes)
        return cls(directory, config, {FILE: shard}, dict.fromkeys(shapes, FILE), recipe.seed, group_size)

    def read(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) for the wanted tensors, in order of their names: the three of one 4-bit matrix are made once."""
        made: tuple[str, tuple[Tensor, ...]] = ("", ())
        shapes = self.shards[FILE].shapes
        for name in sorted(names):
            base, _, leaf = name.rpartition(".")
            if leaf in _IN_4_BITS:
                if made[0] != base:
                    weight = self._number(f"{base}.weight", (shapes[f"{base}.scales"][1], shapes[f"{base}.qweight"][0]), device)
                    made = (base, awq_format.quantize_rtn(weight, self.group_size))
                yield name, made[1][_IN_4_BITS.index(leaf)]
            else:
                yield name, self._number(name, shapes[name], device).to(STORED[self.shards[FILE].dtypes[name]])

    def fingerprint(self) -> str:
        """BLAKE2b-256 hex of config, names, shapes and seed."""
        shard = self.shards[FILE]
        told = [self.config, sorted(shard.shapes.items()), self.seed]
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=32).hexdigest()

    def _number(self, name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """float32: norms are 1, biases 0; a matrix keeps the size of what it multiplies, about."""
        if len(shape) == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(shape, device=device)
        told = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(told))
        values = torch.randn(shape, generator=generator, device=device)
        return values.mul_(0.02 if "embed_tokens" in name else values[0].numel() ** -0.5)


def _is_quantised(name: str) -> bool:
    """The linears of the text layers: what AutoAWQ converts."""
    return "language_model.layers." in name and name.endswith("_proj.weight")


def _shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        skeleton: Any = Qwen2_5_VLForConditionalGeneration(config_of(recipe))
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
