"""Keep every visual token: the dense prefix, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsevila_cluster.pruning.pruning_method import PruningInput


@dataclass(frozen=True)
class KeepAll:
    """Nothing is dropped."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def keep(self, tokens: PruningInput) -> Tensor:
        """All indices i64 [N]."""
        return torch.arange(len(tokens.salience), device=tokens.salience.device)
