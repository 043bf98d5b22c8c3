"""Rotary positions: from the position of each token to the cos and sin that turn its queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Rotary:
    """cos and sin of a step's positions, ready for `x * cos + roll(x, half) * sin`: the sign of the rotation is in sin.

    rows: for M-RoPE, the row of `positions` (time, height, width) that turns each frequency, i64 [head_dim]; None for one row.
    """

    def __init__(self, inv_freq: Tensor, scaling: float, rows: Tensor | None):
        """inv_freq f32 [head_dim / 2]; scaling multiplies cos and sin (1 except for yarn); rows i64 [head_dim / 2] or None."""
        half = len(inv_freq)
        sign = torch.ones(2 * half, dtype=torch.float32, device=inv_freq.device)
        sign[:half] = -1.0
        self.device = inv_freq.device
        self.num_rows = 1 if rows is None else 3
        self._inv_freq = torch.cat((inv_freq, inv_freq)).float()
        self._scaling = scaling
        self._sign = sign * scaling
        self._rows = None if rows is None else torch.cat((rows, rows)).to(inv_freq.device)

    @classmethod
    def from_module(cls, module: Any) -> Rotary:
        """Frequencies and layout of a transformers rotary module (the loader admits only static ones)."""
        parameters = module.config.rope_parameters
        sections = parameters.get("mrope_section")
        rows = None
        if sections is not None:
            interleaved = bool(parameters.get("mrope_interleaved", False)) or hasattr(module, "apply_interleaved_mrope")
            rows = mrope_rows(sections, interleaved)
        return cls(module.inv_freq, float(module.attention_scaling), rows)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions i64 [R, T] -> cos, sin [T, 1, head_dim] in `dtype`; angles are computed in float32."""
        at = positions[0][:, None] if self._rows is None else positions.t().index_select(1, self._rows)
        angle = at * self._inv_freq
        cos, sin = angle.cos(), angle.sin() * self._sign
        if self._scaling != 1.0:
            cos = cos * self._scaling
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


def mrope_rows(sections: Sequence[int], interleaved: bool) -> Tensor:
    """Which position row (0 time, 1 height, 2 width) turns each frequency: i64 [sum(sections)].

    Sections in a row: t t t h h h w w w. Interleaved: t h w t h w ... as far as height and width reach, then time.
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(len(sections)) % 3, torch.tensor(sections))
    rows = torch.zeros(sum(sections), dtype=torch.int64)
    for row in (1, 2):
        rows[row : 3 * sections[row] : 3] = row
    return rows
