"""Whether the engines' switches change nothing but time: tokens of one small random model, every way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.engine_pair import EnginePair, endless
from benchmarks.lib.limit_check import Check, Skipped
from benchmarks.lib.midsize_checkpoint import Recipe, make_media
from benchmarks.lib.ops.op_case import error_of, random
from benchmarks.lib.random_weights import RandomCheckpoint
from sparsevila_cluster.models import Model, load_model

RECIPE = Recipe(
    hidden=256, num_layers=3, num_heads=4, num_kv_heads=2, intermediate=384, vocab=400, vision_hidden=64, vision_layers=2,
    vision_heads=2, vision_intermediate=96, full_layers=(1,), patch_px=8, window_px=48, frame_px=80,
)  # fmt: skip
GROUP_SIZE = 64
NUM_TOKENS = 24
BATCH = 3


def checks(target: torch.device) -> Iterator[Check]:
    """Tokens with graphs, without, and with torch's attention; 4-bit logits against the same weights dequantised."""
    made = cache(partial(_model, target))

    @cache
    def answers(variant: str, attention: str, graphs: str) -> list[tuple[int, ...]]:
        return _answers(made(attention=attention), variant, graphs)

    def compare(variant: str, attention: str, graphs: str) -> float:
        if target.type != "cuda":
            raise Skipped("needs a GPU")
        pairs = zip(answers(variant, attention, graphs), answers(variant, "torch", "none"), strict=True)
        return float(sum(a != b for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)))

    for variant in ("dense", "sparse"):
        for graphs in ("none", "auto"):
            name = f"engine, {variant}: tokens that differ from torch's, kernels, graphs {graphs}"
            yield Check(name, partial(compare, variant, "triton", graphs))
        yield Check(f"engine, {variant}: tokens that differ on a second run", partial(_differ, made, variant))

    def in_4_bits() -> float:
        return error_of(*(_logits(made(group_size=GROUP_SIZE, quantization=how)) for how in ("auto", "none")))

    yield Check("engine, 4 bits against the same dequantised: logits", in_4_bits, 2e-2)


def _model(target: torch.device, group_size: int = 0, **how: Any) -> Model:
    """float32 dense; bfloat16 where weights may be in 4 bits."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = RandomCheckpoint.make(RECIPE, Path(folder), group_size=group_size)
        dtype = "bfloat16" if group_size and how.get("quantization") == "auto" else "float32"
        return load_model(checkpoint, device=target, dtype=dtype, **how)


def _differ(made: Callable[..., Model], variant: str) -> float:
    first, second = (_answers(made(), variant, "auto") for _ in range(2))
    return float(sum(a != b for a, b in zip(first, second, strict=True)))


def _answers(model: Model, variant: str, graphs: str) -> list[tuple[int, ...]]:
    """Tokens of one conversation, then of a batch that steps together."""
    video = make_media(4, RECIPE.frame_px)
    with endless(model):
        pair = EnginePair(model, variant, 128, 1 + BATCH, decode_graphs=graphs)
        session = pair.run_session(video, NUM_TOKENS)
        told = [session.tokens]
        pair.fill(session.prefix, BATCH, NUM_TOKENS)
        turns = list(pair.decode.turns.values())
        for _ in range(NUM_TOKENS // 2):
            pair.decode.step()
        told += [tuple(turn.answer.tokens) for turn in turns]
    return told


class _NoAttention:
    """Every row sees itself alone: nothing but matrices is compared."""

    def __init__(self, num_rows: int, model: Model):
        shape = (num_rows, model.spec.num_kv_heads, model.spec.head_dim)
        self._k, self._v = (torch.zeros(shape, dtype=model.spec.dtype, device=model.device) for _ in range(2))
        self._slots = torch.arange(num_rows, device=model.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        pass

    def target(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._k, self._v, self._slots

    def attend_written(self, layer: int, q: torch.Tensor, scale: float) -> torch.Tensor:
        return self.attend(layer, q, self._k, self._v, scale)


@torch.inference_mode()
def _logits(model: Model) -> torch.Tensor:
    hidden = random((5, RECIPE.hidden), torch.float32, model.device).to(model.spec.dtype)
    positions = torch.zeros(3, 5, dtype=torch.int64, device=model.device)
    return model.text.logits(model.text.forward(hidden, positions, _NoAttention(len(hidden), model)))
