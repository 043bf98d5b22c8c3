"""What a pruning method is given, and what it must be: a frozen dataclass with one function on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.core.requests import kept_count

Scope = Literal["global", "per_group"]
"""Whether a fraction is kept of all tokens of a media, or of those of every group (frame, view)."""


@dataclass(frozen=True)
class PruningInput:
    """The N visual tokens of one media, after the projector, in the order of the prompt.

    embeddings f [N, D], in the encoder's dtype.
    salience f32 [N]: the attention that a token receives in the encoder's last layer, 1.0 = an average patch; NaN = structural
        (the end of a row: always kept, no place in the picture). All ones but for NaN unless the method needs "salience".
    groups i32 [N]: the frame or view of each token, from 0.
    cells i32 [N, 2]: (row, col) in the grid of its group, -1 where structural. Cells of padding may share one.
    grids: (rows, cols) of each group, spread over the whole picture.
    kind: what the media is.
    taps f32 [N, T]: as the salience, of each of the encoder's T layers that attend over whole frames, the last layer last; None
        unless the method needs "taps".
    """

    embeddings: Tensor
    salience: Tensor
    groups: Tensor
    cells: Tensor
    grids: tuple[tuple[int, int], ...]
    kind: Literal["video", "image"]
    taps: Tensor | None = None

    def structural(self) -> Tensor:
        """bool [N]: the tokens that every method must keep."""
        return self.salience.isnan()


class PruningMethod(Protocol):
    """A frozen dataclass. Its fields `fraction`, `scope` and `seed`, if it has them, come from the configuration; its repr is part
    of the content key, so equal parameters must mean equal choices.

    needs: what of "salience" and "taps" the encoder must compute for it; what no method needs costs nothing.
    """

    needs: ClassVar[frozenset[str]]

    def keep(self, tokens: PruningInput) -> Tensor:
        """Indices i64 [K] of the tokens that stay, ascending, all structural ones among them."""
        ...


def keep_top(tokens: PruningInput, scores: Tensor, fraction: float, scope: Scope) -> Tensor:
    """Indices i64 [K], ascending: the `fraction` with the highest `scores` f [N]; of equal scores the earlier token."""

    def best(members: Tensor, count: int) -> Tensor:
        return members[scores[members].sort(descending=True, stable=True).indices[:count]]

    return keep_of_groups(tokens, best, fraction, scope)


def keep_of_groups(tokens: PruningInput, choose: Callable[[Tensor, int], Tensor], fraction: float, scope: Scope) -> Tensor:
    """Indices i64 [K], ascending: structural tokens, and what `choose(members i64 [n], count)` takes of each group or of all."""
    structural = tokens.structural()
    members, chosen = (~structural).nonzero()[:, 0], [structural.nonzero()[:, 0]]
    groups = tokens.groups[members]
    parts = [members] if scope == "global" else [members[groups == group] for group in groups.unique().tolist()]
    chosen += [choose(part, kept_count(fraction, len(part))) for part in parts]
    return torch.cat(chosen).sort().values
