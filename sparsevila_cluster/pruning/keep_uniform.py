"""Keep evenly spaced visual tokens: a control that looks at nothing but their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsevila_cluster.pruning.pruning_method import PruningInput, Scope, keep_of_groups


@dataclass(frozen=True)
class KeepUniform:
    """The tokens in the middle of `fraction` * n equal intervals, of the media or of every group."""

    fraction: float
    scope: Scope = "per_group"
    needs: ClassVar[frozenset[str]] = frozenset()

    def keep(self, tokens: PruningInput) -> Tensor:
        """Indices i64 [K], ascending."""
        return keep_of_groups(tokens, _evenly, self.fraction, self.scope)


def _evenly(members: Tensor, count: int) -> Tensor:
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) * len(members) / max(count, 1)
    return members[middles.long().to(members.device)]
