"""What a text decoder calls once per layer: write new KV rows, attend. One class for media, one for turns.

Knows: which rows of a flattened step belong to whom and where their keys lie. Does not know: models, policies, scheduling.

    flattened step:  [ decode row | decode row | question rows ........ | question rows ... ]
                       turn a       turn b       turn c                   turn d
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsevila_cluster.attention import Capture, Span, attend_causal, attend_question, attend_spans
from sparsevila_cluster.kv import Arena, Extent


class MediaBatch:
    """The one prefill of a media prefix: rows go to an extent of the prefix arena and see themselves and all before them."""

    def __init__(self, extent: Extent, check: Callable[[int], None] = lambda layer: None):
        self._extent = extent
        self._check = check

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the KV of one layer. `check` may raise here, so that an abandoned prefill ends within a layer."""
        self._check(layer)
        keys, values = self._extent.rows(layer)
        keys.copy_(k)
        values.copy_(v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.write(layer, k, v)
        return attend_causal(q, k, v, scale)


@dataclass
class Segment:
    """The rows [first, first + num) of a step that belong to one turn.

    body, tail: per-layer spans; `tail` covers the whole extent of the tail, of which the first `past` rows hold KV before this
    step; first_slot: arena slot of the first new row. capture: see `attend_question`; None for decode rows.
    """

    first: int
    num: int
    body: list[Span]
    tail: list[Span]
    past: int
    first_slot: int
    capture: Capture | None = None
    phase: str = "decode"


class TurnBatch:
    """One step over many turns. New KV rows go to each conversation's tail."""

    def __init__(self, segments: list[Segment], arena: Arena):
        self._segments = segments
        self._arena = arena
        slots = [slot for s in segments for slot in range(s.first_slot, s.first_slot + s.num)]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=arena.k[0].device)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._arena.k[layer].index_copy_(0, self._slots, k)
        self._arena.v[layer].index_copy_(0, self._slots, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.write(layer, k, v)
        out = torch.empty_like(q)
        for s in self._segments:
            tail_k, tail_v = s.tail[layer]
            tail = tail_k[:, : s.past + s.num], tail_v[:, : s.past + s.num]
            if s.phase == "decode":
                out[s.first] = attend_spans(q[s.first], s.body[layer], tail, scale)
            else:
                rows = slice(s.first, s.first + s.num)
                out[rows] = attend_question(q[rows], s.body[layer], tail, scale, s.capture)
        return out
