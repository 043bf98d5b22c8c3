"""Keep the visual tokens that the encoder itself attends to: prefill-stage pruning of SparseVILA (arXiv 2510.17777).

Salience is the attention that a token receives in the encoder's last full-attention layer: from the summary token where there is
one, else the mean over all rows of its frame. Without official code the paper leaves open whether the cut is a quantile and
whether it is made per frame: here it is an exact top k, and `scope` says of what.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevila_cluster.pruning.pruning_method import PruningInput, Scope, keep_top


@dataclass(frozen=True)
class KeepSalient:
    """The most salient `fraction`; of equally salient tokens the earlier one."""

    fraction: float
    scope: Scope = "per_group"
    needs: ClassVar[frozenset[str]] = frozenset({"salience"})

    def keep(self, tokens: PruningInput) -> Tensor:
        """Indices i64 [K], ascending."""
        return keep_top(tokens, tokens.salience, self.fraction, self.scope)
