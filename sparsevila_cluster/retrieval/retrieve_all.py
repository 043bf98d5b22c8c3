"""Attend to the whole pruned prefix: no sparsity while decoding, to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsevila_cluster.retrieval.retrieval_method import RetrievalInput


@dataclass(frozen=True)
class RetrieveAll:
    """Everything, in place: nothing is packed."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def budget(self, total: int) -> int:
        """All."""
        return total

    def select(self, tokens: RetrievalInput) -> Tensor | None:
        """None: all."""
        return None
