"""A pruning method of your own: one class and one row of the table.

    sparsevila demo --local                    # writes sparsevila-demo/video-1.mp4
    python examples/new_policy.py sparsevila-demo/video-1.mp4 "Describe step 3."

In a fork the class is a file in `sparsevila_cluster/pruning/`, and the row stands in that package's `__init__.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from sparsevila_cluster import VideoQA
from sparsevila_cluster.pruning import PRUNING
from sparsevila_cluster.pruning.pruning_method import PruningInput, Scope, keep_top


@dataclass(frozen=True)
class KeepDistinct:
    """The visual tokens that are least like the mean of their frame, by the cosine of their embeddings."""

    fraction: float
    scope: Scope = "per_group"
    needs: ClassVar[frozenset[str]] = frozenset()

    def keep(self, tokens: PruningInput) -> Tensor:
        """Indices i64 [K], ascending."""
        embeddings, groups = tokens.embeddings.float(), tokens.groups.long()
        sums = embeddings.new_zeros(len(tokens.grids), embeddings.shape[1]).index_add(0, groups, embeddings)
        likeness = F.cosine_similarity(embeddings, sums[groups], dim=1)
        return keep_top(tokens, -likeness, self.fraction, self.scope)


PRUNING["distinct"] = f"{__name__}:KeepDistinct"


def compare(video: str, question: str) -> dict[str, str]:
    """The answer under each method, by its name."""
    answers = {}
    for name in ("salience", "distinct"):
        with VideoQA("demo", prune=name, prune_keep=0.25) as qa:
            chat = qa.conversation(qa.prepare(video))
            answers[name] = chat.ask(question, max_tokens=32).text
    return answers


if __name__ == "__main__":
    for method, answer in compare(sys.argv[1], sys.argv[2]).items():
        print(f"{method}: {answer}")
