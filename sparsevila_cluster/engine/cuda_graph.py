"""Decode steps that a GPU can repeat: the same tensors every time, filled anew by one upload.

    host    [ ids | positions | slots | spans ]                             pinned, filled by `run`
              |  one copy
    device  [ ids | positions | slots | spans ] -> embed -> layers -> logits -> argmax
                                                   '------ captured once per bucket ------'

A step of n rows runs in the smallest bucket that holds them; its other rows repeat row 0. They write what row 0 writes, to the
same slot, and nobody reads what comes out of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import Segment
from sparsevila_cluster.attention.triton_backend import Arenas, DecodeRows, spans_of
from sparsevila_cluster.models.adapter import Model

log = logging.getLogger(__name__)

# Steps before a capture: Triton compiles and libraries allocate on the first, which a capture does not allow.
NUM_WARM_UPS = 2
# Integers that say what one row attends to: two spans of (pool, start, length).
SPAN_INTS = 6


def bucket_sizes(max_batch: int) -> list[int]:
    """Powers of two below `max_batch`, and `max_batch` itself."""
    return [1 << i for i in range((max_batch - 1).bit_length())] + [max_batch]


class DecodeGraphs:
    """Decode steps of up to `max_batch` rows over the arenas of one engine. Its results stay valid until the next step."""

    def __init__(self, model: Model, arenas: Arenas, max_batch: int, capture: bool):
        """capture: hold each bucket's step in a CUDA graph. Without it the same step runs operation by operation, anywhere."""
        self._arenas = arenas
        self._buckets = [_Bucket(model, arenas, size) for size in bucket_sizes(max_batch)]
        self.captured = capture and self._capture(model.device)

    def can_run(self, segments: Sequence[Segment]) -> bool:
        """Whether a step is of decode rows only, and of no more than the largest bucket holds."""
        return len(segments) <= self._buckets[-1].size and all(s.phase == "decode" for s in segments)

    @torch.inference_mode()
    def run(self, ids: Sequence[int], positions: Sequence[int], segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
        """Write KV of one row per segment; logits f32 [n, V] and the likeliest token i64 [n] of each.

        The caller must read from the device what comes out before the next step, which fills the same buffers.
        """
        num = len(segments)
        bucket = next(bucket for bucket in self._buckets if bucket.size >= num)
        slots = [s.tail_start + s.past for s in segments]
        bucket.fill(ids, positions, slots, [spans_of(s, self._arenas) for s in segments])
        bucket.run()
        return bucket.logits[:num], bucket.argmax_ids[:num]

    def _capture(self, device: torch.device) -> bool:
        """The largest first, whose memory the others share: no two of them ever run at once. False if it cannot be done here."""
        began_s = time.perf_counter()
        try:
            with torch.cuda.device(device):
                pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # memory is shared on one stream only
                before = torch.cuda.current_stream()
                try:
                    for bucket in reversed(self._buckets):
                        bucket.capture(pool, stream)
                finally:
                    torch.cuda.set_stream(before)  # a capture that breaks off leaves its own behind
        except RuntimeError as error:
            for bucket in self._buckets:
                bucket.release()
            log.warning("decode steps run without CUDA graphs: %s", error)
            return False
        log.info("captured %d decode graphs in %.1f s", len(self._buckets), time.perf_counter() - began_s)
        return True


class _Bucket:
    """The step of `size` rows."""

    def __init__(self, model: Model, arenas: Arenas, size: int):
        self.size = size
        self.logits = self.argmax_ids = torch.empty(0)
        self._model = model
        self._graph: torch.cuda.CUDAGraph | None = None
        # Rows 0-2: ids, positions, slots. The rest: spans, two i32 in each i64.
        on_gpu = model.device.type == "cuda"
        # Rows of an even number, so that each begins at a multiple of 16 bytes: Triton compiles kernels anew for others.
        host = torch.zeros(3 + SPAN_INTS // 2, size + size % 2, dtype=torch.int64, pin_memory=on_gpu)
        self._host = host
        self._device = torch.zeros_like(host, device=model.device)
        self._numbers, self._spans = host[:3, :size].numpy(), _spans_in(host, size).numpy()
        self._spans[:] = (1, 0, 0), (1, 0, 1)  # legal from the start: a row that sees only itself
        ids, positions, slots = self._device[:3, :size]
        self._ids, self._positions = ids, positions.expand(model.text.num_position_rows, -1)
        # Nobody can attend to more keys than there are.
        self._rows = DecodeRows(arenas, slots, _spans_in(self._device, size), sum(arena.num_slots for arena in arenas))

    def fill(self, ids: Sequence[int], positions: Sequence[int], slots: Sequence[int], spans: Sequence[tuple[int, ...]]) -> None:
        """Say what the next step is about. The step before it must be over: its copy reads the same host memory."""
        num = len(ids)
        for row, numbers in zip(self._numbers, (ids, positions, slots), strict=True):
            row[:num] = numbers
            row[num:] = numbers[0]
        self._spans.reshape(self.size, SPAN_INTS)[:num] = spans
        self._spans[num:] = self._spans[0]

    def run(self) -> None:
        """Upload what was filled in and compute the step."""
        self._device.copy_(self._host, non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """pool: memory that graphs share. Must be called while no turn runs: it writes to slot 0 of the arena of turns."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(stream):
                self._device.copy_(self._host)
                for _ in range(NUM_WARM_UPS):
                    self._compute()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Only this thread's calls are held to the rules of a capture: others may allocate meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._compute()
        self._graph = graph

    def release(self) -> None:
        """Go on without a graph."""
        self._graph = None

    def _compute(self) -> None:
        text = self._model.text
        hidden = text.forward(text.embed(self._ids), self._positions, self._rows)
        self.logits = text.logits(hidden)
        self.argmax_ids = self.logits.argmax(-1)


def _spans_in(numbers: Tensor, size: int) -> Tensor:
    """The spans i32 [size, 2, 3] that lie in the lower rows of `numbers` i64 [6, size or more]."""
    return numbers[3:].view(torch.int32).view(-1, 2, 3)[:size]
