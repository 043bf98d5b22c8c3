"""Attention inside a vision tower over independent segments (frames, windows), and the salience that falls out of it.

rows   | frame 0: window 0 | window 1 | ... | frame 1: window 0 | ...        windowed layers attend within windows,
       |<---------------- a full segment -->|                                full layers within frames
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsevila_kernels import HAS_TRITON, colreduce

# transformers makes one call per layer with segment boundaries only for names that contain "flash"; otherwise it loops in Python.
ATTENTION_NAME = "sparsevila_flash_segments"

_SCORES_PER_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Attention weights in memory at once in the layer that gives the salience: 2 MiB stay in a CPU's cache; 128 MiB fill a GPU."""


class Segments:
    """Consecutive segments of given lengths, grouped so that equal lengths share one attention call."""

    def __init__(self, lengths: Sequence[int], device: torch.device):
        at = torch.tensor(lengths, dtype=torch.int64)
        starts = at.cumsum(0) - at
        self.max_length = max(lengths)
        self.cu_seqlens = F.pad(at.cumsum(0), (1, 0)).to(device=device, dtype=torch.int32)
        self.uniform_length = lengths[0] if len(set(lengths)) == 1 else None
        self._groups: list[tuple[int, Tensor]] = []
        if self.uniform_length is None:
            for length in sorted(set(lengths)):
                rows = starts[at == length][:, None] + torch.arange(length)
                self._groups.append((length, rows.reshape(-1).to(device)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k, v [S, H, D] -> [S, H, D]; every row attends to all rows of its own segment."""
        if self.uniform_length is not None:
            return _attend_equal(q, k, v, self.uniform_length, scale)
        out = torch.empty_like(q)
        for length, rows in self._groups:
            qs, ks, vs = (t.index_select(0, rows) for t in (q, k, v))
            out.index_copy_(0, rows, _attend_equal(qs, ks, vs, length, scale))
        return out

    def attend_scored(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `attend`, and f32 [S]: the attention that each row receives, averaged over heads and the query rows of its
        segment, times the segment's length, so that 1.0 is an average row of the same segment.
        """
        if self.uniform_length is not None:
            return _attend_equal_scored(q, k, v, self.uniform_length, scale)
        out = torch.empty_like(q)
        received = torch.empty(len(q), dtype=torch.float32, device=q.device)
        for length, rows in self._groups:
            qs, ks, vs = (t.index_select(0, rows) for t in (q, k, v))
            attended, scores = _attend_equal_scored(qs, ks, vs, length, scale)
            out.index_copy_(0, rows, attended)
            received.index_copy_(0, rows, scores)
        return out, received


class TowerPass:
    """State of one run of one vision tower, in force within a `with` block of one thread: concurrent runs never share it.

    Not a call argument, because some towers drop the arguments that they do not know.
    """

    def __init__(self, full: Segments, windowed: Segments | None, full_layers: frozenset[int], scored_layers: Sequence[int]):
        """scored_layers: those whose column means are kept, ascending."""
        self._full = full
        self._windowed = windowed
        self._full_layers = full_layers
        self._scored_layers = scored_layers
        self._received: list[Tensor] = []

    def __enter__(self) -> TowerPass:
        self._before = _RUNNING.set(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _RUNNING.reset(self._before)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k, v [S, H, D] of one layer -> [S, H, D]; of a scored layer the column means are kept."""
        segments = self._full if layer in self._full_layers or self._windowed is None else self._windowed
        if layer not in self._scored_layers:
            return segments.attend(q, k, v, scale)
        out, received = segments.attend_scored(q, k, v, scale)
        self._received.append(received)
        return out

    def received(self) -> Tensor | None:
        """What each row received in each scored layer, f32 [S, number of scored layers]; None without any."""
        return torch.stack(self._received, -1) if self._received else None


def layers_to_score(needs: Collection[str], layers: Sequence[int]) -> Sequence[int]:
    """Of the layers that attend over whole frames, ascending: all for "taps", the last for "salience", else none."""
    return layers if "taps" in needs else layers[-1:] if "salience" in needs else ()


_RUNNING: ContextVar[TowerPass] = ContextVar("tower_pass")


def register() -> str:
    """Make `ATTENTION_NAME` known to transformers (harmless when repeated) and return it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _tower_attention)
    return ATTENTION_NAME


def number_layers(modules: Sequence[Any]) -> None:
    """Tell each attention module of a tower which layer it is; transformers does not."""
    for i, module in enumerate(modules):
        module.tower_layer = i


def _tower_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value [B, H, S, D] -> ([B, S, H, D], None); the argument names are transformers' contract."""
    assert attention_mask is None
    batch, _heads, length, _dim = query.shape
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out = _RUNNING.get().attend(module.tower_layer, q, k, v, scaling)
    return out.view(batch, length, *out.shape[1:]), None


def _attend_equal(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> Tensor:
    shape = (-1, length, *q.shape[1:])
    q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(-1, *q.shape[1::2])


def _attend_equal_scored(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v [S, H, D] in segments of `length` -> attention [S, H, D], and what each row receives, f32 [S]."""
    fused = q.is_cuda and HAS_TRITON and _flash_takes(q)
    return (_scored_at_once if fused else _scored_by_parts)(q, k, v, length, scale)


def _flash_takes(q: Tensor) -> bool:
    """What the flash kernels of a GPU need: Ampere or later, 16 bits, heads of a multiple of 8."""
    suits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return suits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _scored_at_once(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor]:
    """The fused kernel, which also tells each row's log-sum-exp, and one pass over rows and keys with it: no weights in memory."""
    aten = torch.ops.aten
    flash = aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(*(t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v)), scale=scale)[:2]
    bounds = torch.arange(0, len(q) + 1, length, dtype=torch.int32, device=q.device)
    lse = lse.transpose(1, 2).flatten(0, 1)
    received = colreduce(q, k, reduction="sum", heads="mean", scale=scale, cu_rows=bounds, cu_keys=bounds, lse=lse)
    return out.transpose(1, 2).flatten(0, 1), received


def _scored_by_parts(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float) -> tuple[Tensor, Tensor]:
    """Attention written out, because the weights are wanted: on a CPU cheaper than its fused kernel and a second pass for them."""
    num, heads = len(q) // length, q.shape[1]
    queries = q.view(num, length, heads, -1).transpose(1, 2) * scale
    keys = k.view(num, length, heads, -1).permute(0, 2, 3, 1)
    values = v.view(num, length, heads, -1).transpose(1, 2)
    out = q.new_empty(num, length, heads, v.shape[2])
    received = torch.zeros(num, length, dtype=torch.float32, device=q.device)
    at_once = _SCORES_PER_CHUNK[q.device.type]
    rows = max(1, min(length, at_once // (heads * length)))
    segments = max(1, at_once // (heads * length * rows))
    for a in range(0, num, segments):
        some = slice(a, a + segments)
        for b in range(0, length, rows):
            weights = torch.softmax(torch.matmul(queries[some, :, b : b + rows], keys[some]), -1, dtype=torch.float32)
            received[some] += weights.sum((1, 2))
            out[some, b : b + rows] = torch.matmul(weights.to(v.dtype), values[some]).transpose(1, 2)
    return out.view(-1, heads, v.shape[2]), (received / heads).view(-1)
