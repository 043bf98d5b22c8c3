"""Attend to what the question looked at: decode-stage retrieval of SparseVILA (arXiv 2510.17777).

Each layer takes the visual tokens with the highest mean attention from the turn's rows, over heads and rows; nothing is deleted.
The paper's "90 % decode sparsity" is a fraction of 0.10 here, of the pruned prefix. The share of attention (`mass`) is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevila_cluster.core.requests import kept_count
from sparsevila_cluster.retrieval.retrieval_method import RetrievalInput


@dataclass(frozen=True)
class QueryTopK:
    """The top `fraction` of the visual KV in each layer, or less.

    With `mass`, a layer needs the smallest set that holds this share of its visual attention. Every layer takes its top k, k being
    what the neediest layer needs, so that packed KV is rectangular; `fraction` stays the most.
    """

    fraction: float
    mass: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"scores"})

    def budget(self, total: int) -> int:
        """`fraction` of `total`."""
        return kept_count(self.fraction, total)

    def select(self, tokens: RetrievalInput) -> Tensor | None:
        """Indices i64 [L, k], ascending."""
        ranked = tokens.scores.sort(dim=-1, descending=True, stable=True)
        return ranked.indices[:, : self._count(ranked.values)].sort(dim=-1).values

    def _count(self, ranked: Tensor) -> int:
        """scores f32 [L, n], descending -> how many every layer takes."""
        most = self.budget(ranked.shape[-1])
        if self.mass is None or not most:
            return most
        # A token is needed while the mass before it falls short: the smallest set that reaches the share, never empty.
        held = ranked.double().cumsum(-1)
        needed = (held - ranked < self.mass * held[:, -1:]).sum(-1).max()
        return min(most, max(1, int(needed)))
