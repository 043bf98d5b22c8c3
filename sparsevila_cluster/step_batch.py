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

from sparsevila_cluster.attention import Capture, Span, attend_causal, attend_gathered, attend_question, attend_spans
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

    body: per-layer spans of what the rows attend to besides the tail; packed: its extent if it lies in the arena of turns. tail:
    per-layer spans of the whole extent of the tail, of which the first `past` rows hold KV before this step; tail_start: arena
    slot of its first row. capture: see `attend_question`; None for decode rows.
    """

    first: int
    num: int
    body: list[Span]
    packed: Extent | None
    tail: list[Span]
    tail_start: int
    past: int
    capture: Capture | None = None
    phase: str = "decode"


# Gathering copies the KV of a step, looping launches a dozen small operations for each turn: up to this many elements of K per
# layer (1 MiB in float32) the copy is the cheaper one on a CPU.
GATHER_ELEMENTS = 256 * 1024


class TurnBatch:
    """One step over many turns. New KV rows go to each conversation's tail."""

    def __init__(self, segments: list[Segment], arena: Arena):
        self._arena = arena
        slots = [slot for s in segments for slot in range(s.tail_start + s.past, s.tail_start + s.past + s.num)]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=arena.k[0].device)
        gathered = _gatherable(segments, arena)
        self._gathered = _Gather(gathered, arena) if gathered else None
        self._segments = segments[len(gathered) :]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._arena.k[layer].index_copy_(0, self._slots, k)
        self._arena.v[layer].index_copy_(0, self._slots, v)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.write(layer, k, v)
        if self._gathered is not None and not self._segments:
            return self._gathered.attend(layer, q, scale)
        out = torch.empty_like(q)
        if self._gathered is not None:
            out[: self._gathered.num] = self._gathered.attend(layer, q[: self._gathered.num], scale)
        for s in self._segments:
            tail_k, tail_v = s.tail[layer]
            tail = tail_k[:, : s.past + s.num], tail_v[:, : s.past + s.num]
            if s.phase == "decode":
                out[s.first] = attend_spans(q[s.first], s.body[layer], tail, scale)
            else:
                rows = slice(s.first, s.first + s.num)
                out[rows] = attend_question(q[rows], s.body[layer], tail, scale, s.capture)
        return out


def _gatherable(segments: list[Segment], arena: Arena) -> list[Segment]:
    """The leading decode rows, if there are several, all over packed KV, and little enough to copy."""
    leading = []
    for s in segments:
        if s.phase != "decode" or s.packed is None:
            break
        leading.append(s)
    longest = max((s.packed.length + s.past + s.num for s in leading), default=0)
    row = arena.spec.num_kv_heads * arena.spec.head_dim
    return leading if len(leading) > 1 and len(leading) * longest * row <= GATHER_ELEMENTS else []


class _Gather:
    """Arena slots of several turns' KV, packed then tail, padded to one length; built once per step, used by every layer."""

    def __init__(self, segments: list[Segment], arena: Arena):
        self._arena = arena
        self.num = len(segments)
        table = [[s.packed.start, s.packed.length, s.tail_start, s.past + s.num] for s in segments]
        body_start, body, tail_start, tail = torch.tensor(table, device=arena.k[0].device)[:, :, None].unbind(1)
        self._length = max(row[1] + row[3] for row in table)
        column = torch.arange(self._length, device=body.device)
        slots = torch.where(column < body, body_start + column, tail_start - body + column)
        visible = column < body + tail
        self._visible = visible[:, None, None]
        self._slots = slots.where(visible, body_start).flatten()

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        k, v = (
            rows.index_select(0, self._slots).view(self.num, self._length, *rows.shape[1:])
            for rows in (self._arena.k[layer], self._arena.v[layer])
        )
        return attend_gathered(q, k, v, self._visible, scale)
