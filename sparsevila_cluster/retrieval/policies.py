"""Retrieval: which visual KV a turn attends to, chosen per layer, for this turn only.

Knows: scores of visual KV per layer. Does not know: models, attention, KV memory, pruning.

A policy is a frozen dataclass with one method, `select(scores f32 [L, n]) -> i64 [L, k] | None`, ascending per layer; None means
everything. Ratios are the fraction kept, relative to the pruned prefix (SparseVILA, arXiv 2510.17777: 90 % decode sparsity is
0.10 here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsevila_cluster.request import kept_count


class RetrievalPolicy(Protocol):
    needs_scores: bool

    def budget(self, total: int) -> int:
        """Visual tokens per layer that a turn will attend to, of `total` in the prefix."""
        ...

    def select(self, scores: Tensor) -> Tensor | None:
        """scores f32 [L, n] -> i64 [L, budget(n)], ascending, or None for all of them."""
        ...


@dataclass(frozen=True)
class RetrieveAll:
    """The whole pruned prefix: no decode sparsity."""

    needs_scores = False

    def budget(self, total: int) -> int:
        return total

    def select(self, scores: Tensor) -> Tensor | None:
        return None


@dataclass(frozen=True)
class QueryTopK:
    """The `fraction` with the highest mean attention from this turn's rows, in each layer by itself."""

    fraction: float
    needs_scores = True

    def budget(self, total: int) -> int:
        return kept_count(self.fraction, total)

    def select(self, scores: Tensor) -> Tensor | None:
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        return order[:, : self.budget(scores.shape[-1])].sort(dim=-1).values


@dataclass(frozen=True)
class Random:
    """A seeded random `fraction`, different in each layer: the control."""

    fraction: float
    seed: int = 0
    needs_scores = False

    def budget(self, total: int) -> int:
        return kept_count(self.fraction, total)

    def select(self, scores: Tensor) -> Tensor | None:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.seed))
        order = noise.argsort(dim=-1)[:, : self.budget(scores.shape[-1])]
        return order.sort(dim=-1).values.to(scores.device)


def build_retrieval(name: str, fraction: float, seed: int = 0) -> RetrievalPolicy:
    """The policy called `name` in the configuration. A fraction of 1 is `RetrieveAll`, whatever the name."""
    if fraction >= 1.0:
        return RetrieveAll()
    table = {
        "retrieve_all": lambda: RetrieveAll(),
        "query_topk": lambda: QueryTopK(fraction),
        "random": lambda: Random(fraction, seed),
    }
    return table[name]()
