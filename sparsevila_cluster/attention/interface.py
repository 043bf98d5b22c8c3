"""What a text decoder calls once per layer, and what a step over many turns is made of.

flattened step:  [ decode row | decode row | refresh row | question rows ........ | question rows ... ]
                   turn a       turn b       turn c        turn d                   turn e

keys of one turn:   [ body: media prefix or packed KV ][ tail: earlier turns | this turn's rows ]
its new rows see:     all of it                          up to and including themselves
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.kvcache.arena import Extent

Span = tuple[Tensor, Tensor]
"""Keys and values of consecutive rows, head-major: two views [1, Hkv, rows, D]."""


class StepBatch(Protocol):
    """T new rows of one or many sequences, in every layer: their KV is written to an arena, then they attend.

    `MediaBatch` is one over a chunk of media; `TurnBatch` and `TritonBatch` are over turns, in torch and through the kernels.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], after RoPE -> [T, Hq, D]."""
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k and v [T, Hkv, D] as in `attend`, which is not called for this layer: nobody reads its result."""
        ...

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where a decoder that writes the rows itself puts them: k and v [slots, Hkv, D] of an arena, slots i64 [T]."""
        ...

    def attend_written(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """What `attend` does once the rows are written."""
        ...


@dataclass
class Capture:
    """Which softmax weights to keep from the rows of a question: mean over heads and over rows [first_row, stop_row), per layer.

    visual_index i64 [n]: body rows that are visual. normalize "full_row" divides by the whole causal row, "visual" by its visual
    part. The rows may come in several steps: `num_done` of them came before this one. After the last step `scores()` is what one
    step over all rows would have given (SparseVILA, arXiv 2510.17777, decode-stage retrieval).
    """

    visual_index: Tensor
    first_row: int
    stop_row: int
    normalize: Literal["full_row", "visual"] = "full_row"
    num_done: int = 0
    _sums: dict[int, Tensor] = field(default_factory=dict)

    def overlap(self, start: int, stop: int) -> tuple[int, int]:
        """The captured rows among [start, stop) of this step's rows, relative to start; none if the second is not larger."""
        first, last = self.first_row - self.num_done, self.stop_row - self.num_done
        return max(first - start, 0), max(min(last, stop) - start, 0)

    def add(self, layer: int, total: Tensor) -> None:
        """Count in f32 [n]: weights of some captured rows, summed over rows, averaged over heads."""
        if layer in self._sums:
            self._sums[layer] += total
        else:
            self._sums[layer] = total

    def scores(self) -> Tensor:
        """f32 [L, n]."""
        return torch.stack([self._sums[layer] for layer in range(len(self._sums))]) / max(1, self.stop_row - self.first_row)


@dataclass(eq=False)
class Segment:
    """The rows [first, first + num) of a step that belong to one turn.

    body: per-layer spans of what the rows attend to besides the tail; home: its extent, in the arena of media prefixes or, packed,
    in that of turns. tail: per-layer spans of the whole extent of the tail, of which the first `past` rows hold KV before this
    step; tail_start: arena slot of its first row. capture: see `attend_question`; None for decode rows. phase: "decode" for one
    row, usually over packed KV; whatever else attends row by row, "question" or "refresh", comes after all of those.
    """

    first: int
    num: int
    body: list[Span]
    home: Extent
    tail: list[Span]
    tail_start: int
    past: int
    capture: Capture | None = None
    phase: str = "decode"

    def tail_span(self, layer: int) -> Span:
        """The tail up to and including this step's rows."""
        k, v = self.tail[layer]
        stop = self.past + self.num
        return k[:, :, :stop], v[:, :, :stop]
