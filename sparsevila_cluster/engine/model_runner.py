"""One step's rows through the text model, the best way that there is for them.

Knows: three ways to attend (torch, kernels, and the repeatable step that a CUDA graph may hold) and which of them a step can take.
Does not know: turns, what rows mean, or who samples from the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import Segment
from sparsevila_cluster.attention.torch_backend import TurnBatch
from sparsevila_cluster.attention.triton_backend import Arenas, TritonBatch
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.engine.cuda_graph import DecodeSteps
from sparsevila_cluster.models.adapter import Model


class ModelRunner:
    """arenas: of media prefixes, of turns. Where it may, it captures graphs of decode steps now: no turn has KV yet.

    steps: the repeatable decode step; None where every step is made anew.
    """

    def __init__(self, model: Model, arenas: Arenas, config: EngineConfig):
        self._model, self._arenas = model, arenas
        self.steps: DecodeSteps | None = None
        if config.decode_graphs == "auto" and model.device.type == "cuda" and can_repeat(model):
            self.steps = DecodeSteps(model, arenas, config.max_batch, capture=True)

    def __call__(
        self, ids: Sequence[int], positions: Sequence[int], segments: list[Segment], rows: Sequence[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write all KV of a step. Logits f32 [len(rows), V] of `rows` of it, None without any, and where it is known already the
        likeliest token i64 [len(rows)] of each. Read from them what is wanted before the next call.
        """
        if self.steps is not None and len(rows) == len(ids) and self.steps.takes(segments):
            return self.steps.step(ids, positions, segments)
        device, text = self._model.device, self._model.text
        hidden = text.forward(
            text.embed(torch.tensor(ids, device=device)),
            torch.tensor(positions, device=device).expand(text.num_position_rows, -1),
            self._batch_of(segments),
        )
        if not rows:
            return None, None
        return text.logits(hidden if len(rows) == len(ids) else hidden[torch.tensor(rows, device=device)]), None

    def _batch_of(self, segments: list[Segment]) -> TurnBatch | TritonBatch:
        return TurnBatch(segments, self._arenas[1]) if self._model.attention == "torch" else TritonBatch(segments, self._arenas)


def can_repeat(model: Model) -> bool:
    """Whether a decode step of this model is the same operations every time, whatever its rows."""
    return model.attention == "triton" and model.text.name == "lean"
