"""Keep a random part of the visual tokens: the control that every other method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsevila_cluster.pruning.pruning_method import PruningInput, Scope, keep_top


@dataclass(frozen=True)
class KeepRandom:
    """A random `fraction`; one seed gives the same choice on every device."""

    fraction: float
    scope: Scope = "per_group"
    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def keep(self, tokens: PruningInput) -> Tensor:
        """Indices i64 [K], ascending."""
        noise = torch.rand(len(tokens.salience), generator=torch.Generator().manual_seed(self.seed))
        return keep_top(tokens, noise.to(tokens.salience.device), self.fraction, self.scope)
