"""Retrieval: which visual KV a turn attends to, chosen per layer, for this turn only.

Knows: scores of visual KV per layer. Does not know: models, attention, KV memory, pruning, budgets under pressure.

A policy is a frozen dataclass with one method that matters, `select(scores f32 [L, n]) -> i64 [L, k] | None`, ascending per layer;
None means everything. Ratios are the fraction kept, relative to the pruned prefix (SparseVILA, arXiv 2510.17777: 90 % decode
sparsity is 0.10 here).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsevila_cluster.core.requests import kept_count


class RetrievalPolicy(Protocol):
    needs_scores: bool

    def budget(self, total: int) -> int:
        """Most visual tokens per layer that a turn will attend to, of `total` in the prefix."""
        ...

    def count(self, scores: Tensor) -> int:
        """scores f32 [L, n] -> visual tokens per layer that `select` takes: the same number in all layers."""
        ...

    def select(self, scores: Tensor) -> Tensor | None:
        """scores f32 [L, n] -> i64 [L, count(scores)], ascending, or None for all of them."""
        ...


@dataclass(frozen=True)
class RetrieveAll:
    """The whole pruned prefix: no decode sparsity."""

    needs_scores = False

    def budget(self, total: int) -> int:
        return total

    def count(self, scores: Tensor) -> int:
        return scores.shape[-1]

    def select(self, scores: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class QueryTopK:
    """The highest mean attention from this turn's rows, in each layer by itself: the top `fraction` of the visual KV, or less.

    With `mass`, a layer needs the smallest set that holds this share of its visual attention. Every layer takes its top k, k being
    what the neediest layer needs, so that packed KV is rectangular; `fraction` stays the most.
    """

    fraction: float
    mass: float | None = None
    needs_scores = True

    def budget(self, total: int) -> int:
        return kept_count(self.fraction, total)

    def count(self, scores: Tensor) -> int:
        return self._count(scores.sort(dim=-1, descending=True, stable=True).values)

    def select(self, scores: Tensor) -> Tensor | None:
        ranked = scores.sort(dim=-1, descending=True, stable=True)
        return ranked.indices[:, : self._count(ranked.values)].sort(dim=-1).values

    def _count(self, ranked: Tensor) -> int:
        most = self.budget(ranked.shape[-1])
        if self.mass is None or not most:
            return most
        # A token is needed while the mass before it falls short: the smallest set that reaches the share, never empty.
        held = ranked.double().cumsum(-1)
        needed = (held - ranked < self.mass * held[:, -1:]).sum(-1).max()
        return min(most, max(1, int(needed)))


@dataclass(frozen=True)
class Random:
    """A seeded random `fraction`, different in each layer: the control."""

    fraction: float
    seed: int = 0
    needs_scores = False

    def budget(self, total: int) -> int:
        return kept_count(self.fraction, total)

    def count(self, scores: Tensor) -> int:
        return self.budget(scores.shape[-1])

    def select(self, scores: Tensor) -> Tensor | None:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.seed))
        order = noise.argsort(dim=-1)[:, : self.budget(scores.shape[-1])]
        return order.sort(dim=-1).values.to(scores.device)


def build_retrieval(name: str, fraction: float, mass: float | None = None, seed: int = 0) -> RetrievalPolicy:
    """The policy called `name` in the configuration. A fraction of 1 without a mass is `RetrieveAll`, whatever the name."""
    if fraction >= 1.0 and mass is None:
        return RetrieveAll()
    table: dict[str, Callable[[], RetrievalPolicy]] = {
        "retrieve_all": lambda: RetrieveAll(),
        "query_topk": lambda: QueryTopK(fraction, mass),
        "random": lambda: Random(fraction, seed),
    }
    return table[name]()
