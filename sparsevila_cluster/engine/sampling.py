"""From logits to token ids: greedy, or temperature / top-k / top-p with a seed per turn."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsevila_cluster.core.requests import SamplingParams


class Sampler:
    """The sampling state of one turn: its parameters and its own random stream, so that neighbours cannot change an answer."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self.greedy = params.temperature == 0.0 or params.top_k == 1
        self._generator: torch.Generator | None = None
        if not self.greedy:
            seed = secrets.randbits(63) if params.seed is None else params.seed
            self._generator = torch.Generator().manual_seed(seed % 2**63)

    def skip(self, num: int) -> None:
        """Go on as if `num` tokens had been drawn: one number of the random stream each, as in `draw`."""
        for _ in range(0 if self._generator is None else num):
            torch.rand((), generator=self._generator, dtype=torch.float64)

    def draw(self, logits: Tensor) -> int:
        """One token from f32 [V]."""
        if self.greedy:
            return int(logits.argmax())
        logits = logits.float().cpu() / self.params.temperature
        values, ids = logits.sort(descending=True, stable=True)
        if self.params.top_k:
            values, ids = values[: self.params.top_k], ids[: self.params.top_k]
        probabilities = torch.softmax(values.double(), -1)
        # A token stays while the mass before it is below top_p: the smallest set that reaches it, never empty.
        below = probabilities.cumsum(-1) - probabilities < self.params.top_p
        probabilities = probabilities * below
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * probabilities.sum()
        chosen = torch.searchsorted(probabilities.cumsum(-1), point, right=True).clamp_max(int(below.sum()) - 1)
        return int(ids[chosen])


def sample(logits: Tensor, samplers: Sequence[Sampler], argmax_ids: Tensor | None = None) -> list[int]:
    """One token per row of f32 [n, V]; argmax_ids: i64 [n], the likeliest of each row where it is known already."""
    tokens = (logits.argmax(-1) if argmax_ids is None else argmax_ids).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.draw(logits[row])
    return tokens
