"""Attend to a random part of the visual KV: the control that every other method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsevila_cluster.core.requests import kept_count
from sparsevila_cluster.retrieval.retrieval_method import RetrievalInput


@dataclass(frozen=True)
class RetrieveRandom:
    """A random `fraction`, different in each layer; one seed gives the same choice on every device."""

    fraction: float
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def budget(self, total: int) -> int:
        """`fraction` of `total`."""
        return kept_count(self.fraction, total)

    def select(self, tokens: RetrievalInput) -> Tensor | None:
        """Indices i64 [L, k], ascending."""
        noise = torch.rand(tokens.scores.shape, generator=torch.Generator().manual_seed(self.seed))
        order = noise.argsort(dim=-1)[:, : self.budget(noise.shape[-1])]
        return order.sort(dim=-1).values.to(tokens.scores.device)
