"""One step's rows through the text model: with torch, with kernels, or as a decode step that a CUDA graph may hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import Segment
from sparsevila_cluster.attention.torch_backend import TurnBatch
from sparsevila_cluster.attention.triton_backend import Arenas, TritonBatch
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.engine.cuda_graph import DecodeGraphs
from sparsevila_cluster.models.adapter import Model


class ModelRunner:
    """Runs the steps of one decode engine. graphs: of its decode steps; None where no step is captured."""

    def __init__(self, model: Model, arenas: Arenas, config: EngineConfig):
        """arenas: of media prefixes, of turns. Captures graphs of decode steps now if it may: no turn has KV yet."""
        self._model, self._arenas = model, arenas
        self.graphs: DecodeGraphs | None = None
        if config.decode_graphs == "auto" and model.device.type == "cuda" and can_capture(model):
            self.graphs = DecodeGraphs(model, arenas, config.max_batch, capture=True)

    def forward(
        self, ids: Sequence[int], positions: Sequence[int], segments: list[Segment], rows: Sequence[int]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write all KV of a step. Logits f32 [len(rows), V] of `rows` of it, None without any, and where it is known already the
        likeliest token i64 [len(rows)] of each. Read from them what is wanted before the next call.
        """
        if self.graphs is not None and len(rows) == len(ids) and self.graphs.can_run(segments):
            return self.graphs.run(ids, positions, segments)
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


def can_capture(model: Model) -> bool:
    """Whether a decode step of this model is the same operations every time, whatever its rows."""
    return model.attention == "triton" and model.text.name == "lean"
