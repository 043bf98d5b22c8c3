"""Attention in plain torch: a batch over a chunk of media, and one over the rows of many turns."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import Segment
from sparsevila_cluster.attention.torch_ops import attend_causal, attend_gathered, attend_question, attend_spans
from sparsevila_cluster.kvcache.arena import Arena, Extent


class MediaBatch:
    """A chunk of the one prefill of a media prefix: rows [start, stop) of its extent, which see themselves and all before them.

    Chunks are prefilled in order, each through all layers. `wrote(layer, start, stop)` is told when those rows of a layer are in
    the extent, final, from where they may be sent on: a long prefix then leaves evenly over the whole prefill, and behind its
    last chunk little is left to send. It may raise, which ends an abandoned prefill within a layer of a chunk.
    """

    def __init__(self, extent: Extent, start: int, stop: int, wrote: Callable[[int, int, int], None] = lambda *_: None):
        self._extent = extent
        self._start, self._stop = start, stop
        self._wrote = wrote
        self._slots: Tensor | None = None

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Copy a chunk's keys and values [n, Hkv, D] into the extent, and say so."""
        for rows, new in zip(self._extent.rows(layer), (k, v), strict=True):
            rows[self._start : self._stop] = new
        self._wrote(layer, self._start, self._stop)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [n, Hq, D], k and v [n, Hkv, D] -> [n, Hq, D]."""
        self.write(layer, k, v)
        return self._attend(layer, q, scale)

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The arena's k and v [slots, Hkv, D], and the slots i64 [n] of the chunk."""
        arena, first = self._extent.arena, self._extent.start
        if self._slots is None:
            self._slots = torch.arange(first + self._start, first + self._stop, device=arena.k_all.device)
        return arena.k[layer], arena.v[layer], self._slots

    def attend_written(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """As `attend`, of rows that are written: q [n, Hq, D] -> [n, Hq, D]."""
        self._wrote(layer, self._start, self._stop)
        return self._attend(layer, q, scale)

    def _attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        keys, values = (rows[: self._stop].transpose(0, 1)[None] for rows in self._extent.rows(layer))
        return attend_causal(q, (keys, values), scale)


# Gathering copies the KV of a step, looping launches a dozen small operations for each turn: up to this many elements of K per
# layer (1 MiB in float32) the copy is the cheaper one on a CPU.
GATHER_ELEMENTS = 256 * 1024


class TurnBatch:
    """One step over many turns. New KV rows go to each conversation's tail."""

    def __init__(self, segments: list[Segment], arena: Arena):
        self._arena = arena
        slots = [slot for s in segments for slot in range(s.tail_start + s.past, s.tail_start + s.past + s.num)]
        self._slots = torch.tensor(slots, dtype=torch.int64, device=arena.k[0].device)
        decode = [s for s in segments if s.phase == "decode"]
        assert decode == segments[: len(decode)], "decode rows come first"
        gathers = _worth_gathering(decode, arena)
        self._gather = _Gather(decode, arena) if gathers else None
        self._loop = [] if gathers else decode
        self._questions = segments[len(decode) :]
        self._num_decode = len(decode)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Copy new keys and values [T, Hkv, D] to the tails of their conversations."""
        self._arena.k[layer].index_copy_(0, self._slots, k)
        self._arena.v[layer].index_copy_(0, self._slots, v)

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """The arena's k and v [slots, Hkv, D], and the slots i64 [T] of the new rows."""
        return self._arena.k[layer], self._arena.v[layer], self._slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        self.write(layer, k, v)
        return self.attend_written(layer, q, scale)

    def attend_written(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """As `attend`, of rows that are written: q [T, Hq, D] -> [T, Hq, D]; fills captures."""
        if not self._questions:
            return self._attend_decode(layer, q, scale)
        out = torch.empty_like(q)
        if self._num_decode:
            out[: self._num_decode] = self._attend_decode(layer, q[: self._num_decode], scale)
        for s in self._questions:
            rows = slice(s.first, s.first + s.num)
            out[rows] = attend_question(q[rows], s.body[layer], s.tail_span(layer), scale, s.capture, layer)
        return out

    def _attend_decode(self, layer: int, q: Tensor, scale: float) -> Tensor:
        if self._gather is not None:
            return self._gather.attend(layer, q, scale)
        return attend_spans(q, [(s.body[layer], s.tail_span(layer)) for s in self._loop], scale)


def _worth_gathering(decode: list[Segment], arena: Arena) -> bool:
    """Whether there are several decode rows, all over packed KV, and little enough of it to copy."""
    if len(decode) < 2 or any(s.home.arena is not arena for s in decode):
        return False
    longest = max(s.home.length + s.past + s.num for s in decode)
    return len(decode) * longest * arena.spec.num_kv_heads * arena.spec.head_dim <= GATHER_ELEMENTS


class _Gather:
    """Arena slots of several turns' KV, packed then tail, padded to one length; built once per step, used by every layer."""

    def __init__(self, segments: list[Segment], arena: Arena):
        self._arena = arena
        self.num = len(segments)
        table = [[s.home.start, s.home.length, s.tail_start, s.past + s.num] for s in segments]
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
