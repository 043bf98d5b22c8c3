"""Attention through the Triton kernels: keys are read where they lie, in two arenas, by spans of slots.

pool 0  arena of media prefixes   [ prefix ][ prefix ]          spans of a row:  (pool, start, length) of its body
pool 1  arena of turns            [ packed ][ tail ][ packed ]                   (1,    start, length) of its tail
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import Capture, Segment
from sparsevila_cluster.kvcache.arena import Arena
from sparsevila_kernels import colreduce, decode_attention

# The arena of media prefixes and that of turns: an extent's pool is its arena's place here.
Arenas = tuple[Arena, Arena]


ALIGNED = 4  # numbers of 32 bits in 16 bytes


def spans_of(segment: Segment, arenas: Arenas) -> tuple[int, ...]:
    """(pool, start, length) of what a segment's rows attend to besides the tail, and of the tail up to and with its own rows."""
    home = segment.home
    pool = int(home.arena is arenas[1])
    assert home.arena is arenas[pool], "an extent of another engine"
    return pool, home.start, home.length, 1, segment.tail_start, segment.past + segment.num


class _NewRows(ABC):
    """Rows whose KV goes to `slots` i64 [T] of the arena of turns."""

    def __init__(self, arenas: Arenas, slots: Tensor):
        self._arenas, self._slots = arenas, slots

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        turns = self._arenas[1]
        return turns.k[layer], turns.v[layer], self._slots

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values, slots = self.target(layer)
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.write(layer, k, v)
        return self.attend_written(layer, q, scale)

    @abstractmethod
    def attend_written(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """As `attend`, of rows whose keys and values are where they belong."""


class DecodeRows(_NewRows):
    """One new row for each of several turns. Everything it knows of a step lies in tensors, so that a CUDA graph may hold it.

    slots i64 [B]: where the rows' KV goes in the arena of turns; spans i32 [B, 2, 3]: what each row attends to, itself at the end.
    max_keys: no row attends to more, where that is known; it saves empty work and changes no result.
    """

    def __init__(self, arenas: Arenas, slots: Tensor, spans: Tensor, max_keys: int | None = None):
        super().__init__(arenas, slots)
        self._spans, self._max_keys = spans, max_keys

    def attend_written(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """One row of each turn, its keys and values written: q [B, Hq, D] -> [B, Hq, D]."""
        pools = _pools(self._arenas, layer)
        return cast(Tensor, decode_attention(q, pools, self._spans, scale=scale, max_keys=self._max_keys, backend="triton"))


class TritonBatch(_NewRows):
    """One step over many turns: one launch for all decode rows, one for all others, and one per turn whose scores are wanted."""

    def __init__(self, segments: Sequence[Segment], arenas: Arenas):
        decode = [s for s in segments if s.phase == "decode"]
        assert decode == segments[: len(decode)], "decode rows come first"
        others = segments[len(decode) :]
        self._num_decode = len(decode)
        self._max_rows = max((s.num for s in others), default=0)
        slots = [slot for s in segments for slot in range(s.tail_start + s.past, s.tail_start + s.past + s.num)]
        bounds = [0]
        for s in others:
            bounds.append(bounds[-1] + s.num)
        spans = [[number for s in some for number in spans_of(s, arenas)] for some in (decode, others)]
        places, self._bounds, *parts = _upload(slots, (bounds, *spans), arenas[1].k_all.device)
        super().__init__(arenas, places)
        decode_spans, self._spans = (part.view(-1, 2, 3) for part in parts)
        self._max_keys, most = (max((s.home.length + s.past + s.num for s in some), default=0) for some in (others, decode))
        self._decode = DecodeRows(arenas, self._slots[: len(decode)], decode_spans, most)
        self._scored = [_Scored(s, s.first - len(decode)) for s in others if s.capture is not None]

    def attend_written(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """As `attend`, of rows that are written: q [T, Hq, D] -> [T, Hq, D]; fills captures."""
        num = self._num_decode
        if not self._max_rows:
            return self._decode.attend_written(layer, q, scale)
        others, lse = decode_attention(
            q[num:], _pools(self._arenas, layer), self._spans, cu_rows=self._bounds, max_rows=self._max_rows, scale=scale,
            max_keys=self._max_keys, return_lse=True, backend="triton",
        )  # fmt: skip
        for scored in self._scored:
            scored.add(layer, q[num:], lse, scale)
        return torch.cat((self._decode.attend_written(layer, q[:num], scale), others)) if num else others


class _Scored:
    """A turn whose scores are wanted, whose rows begin at row `first` of those that are not decode rows."""

    def __init__(self, segment: Segment, first: int):
        assert segment.capture is not None
        self._capture: Capture = segment.capture
        self._home = segment.home
        start, stop = self._capture.overlap(0, segment.num)
        self._rows = slice(first + start, first + max(start, stop))

    def add(self, layer: int, q: Tensor, lse: Tensor, scale: float) -> None:
        """Count in the weights of this step's captured rows: q [T, Hq, D], lse f32 [T, Hq] over all that each row sees."""
        capture, rows = self._capture, self._rows
        visual = capture.visual_index
        if rows.start == rows.stop:
            capture.add(layer, torch.zeros(len(visual), device=q.device))
            return
        keys = self._home.rows(layer)[0]
        if capture.normalize == "visual":
            total = _summed(q[rows], keys.index_select(0, visual), scale, None)
        else:
            total = _summed(q[rows], keys, scale, lse[rows]).index_select(0, visual)
        capture.add(layer, total)


def _upload(wide: list[int], narrow: Sequence[list[int]], device: torch.device) -> list[Tensor]:
    """One tensor i64 and several i32, in one copy. Each begins at a multiple of 16 bytes, or Triton compiles kernels anew."""
    padded = [numbers + [0] * (-len(numbers) % ALIGNED) for numbers in narrow]
    numbers = torch.tensor(wide + [number for part in padded for number in part]).to(device)
    parts = numbers[len(wide) :].to(torch.int32).split([len(part) for part in padded])
    return [numbers[: len(wide)], *(part[: len(given)] for part, given in zip(parts, narrow, strict=True))]


def _summed(q: Tensor, k: Tensor, scale: float, lse: Tensor | None) -> Tensor:
    """Softmax weights summed over rows and averaged over heads, f32 [N]; `lse`: normalized by more keys than `k` has."""
    return colreduce(q, k, reduction="sum", heads="mean", scale=scale, lse=lse, backend="triton")


def _pools(arenas: Arenas, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    prefixes, turns = arenas
    return (prefixes.k[layer], prefixes.v[layer]), (turns.k[layer], turns.v[layer])
