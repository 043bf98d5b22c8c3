"""Pruning: which visual tokens enter the language model. Query-agnostic and final for a media prefix.

Knows: salience (NaN = structural) and groups (frames or crops). Does not know: models, KV, questions, retrieval.

A policy is a frozen dataclass with one method, `keep(salience f32 [N], group i32 [N]) -> i64 [K]`, ascending. Structural tokens
are always in the result. Ratios are the fraction kept. Salience follows SparseVILA (arXiv 2510.17777): column mean of the
encoder's last full attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.core.requests import kept_count

Scope = Literal["global", "per_group"]


class PruningPolicy(Protocol):
    needs_salience: bool

    def keep(self, salience: Tensor, group: Tensor) -> Tensor:
        """Ascending indices of the tokens that stay."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Nothing is dropped: the dense prefix."""

    needs_salience = False

    def keep(self, salience: Tensor, group: Tensor) -> Tensor:
        return torch.arange(len(salience), device=salience.device)


@dataclass(frozen=True)
class Salience:
    """The most salient `fraction`, over the whole media or within every group. Ties go to the earlier token."""

    fraction: float
    scope: Scope = "per_group"
    needs_salience = True

    def keep(self, salience: Tensor, group: Tensor) -> Tensor:
        return _keep_top(salience, group, salience, self.fraction, self.scope)


@dataclass(frozen=True)
class Random:
    """A seeded random `fraction`: the control that every other policy must beat."""

    fraction: float
    scope: Scope = "per_group"
    seed: int = 0
    needs_salience = False

    def keep(self, salience: Tensor, group: Tensor) -> Tensor:
        noise = torch.rand(len(salience), generator=torch.Generator().manual_seed(self.seed)).to(salience.device)
        return _keep_top(noise, group, salience, self.fraction, self.scope)


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced tokens, a `fraction` of the media or of every group."""

    fraction: float
    scope: Scope = "per_group"
    needs_salience = False

    def keep(self, salience: Tensor, group: Tensor) -> Tensor:
        scored = (~salience.isnan()).nonzero()[:, 0]
        chosen = [salience.isnan().nonzero()[:, 0]]
        for members in _split(scored, group, self.scope):
            count = kept_count(self.fraction, len(members))
            middles = (torch.arange(count, dtype=torch.float64) + 0.5) * len(members) / max(count, 1)
            chosen.append(members[middles.long().to(members.device)])
        return torch.cat(chosen).sort().values


def _split(index: Tensor, group: Tensor, scope: Scope) -> list[Tensor]:
    """`index` whole, or cut by the group of each token."""
    if scope == "global":
        return [index]
    groups = group[index]
    return [index[groups == g] for g in groups.unique().tolist()]


def _keep_top(score: Tensor, group: Tensor, salience: Tensor, fraction: float, scope: Scope) -> Tensor:
    structural = salience.isnan()
    chosen = [structural.nonzero()[:, 0]]
    for members in _split((~structural).nonzero()[:, 0], group, scope):
        order = score[members].sort(descending=True, stable=True).indices
        chosen.append(members[order[: kept_count(fraction, len(members))]])
    return torch.cat(chosen).sort().values


def build_pruning(name: str, fraction: float, scope: Scope, seed: int = 0) -> PruningPolicy:
    """The policy called `name` in the configuration."""
    table: dict[str, Callable[[], PruningPolicy]] = {
        "keep_all": lambda: KeepAll(),
        "random": lambda: Random(fraction, scope, seed),
        "uniform": lambda: Uniform(fraction, scope),
        "salience": lambda: Salience(fraction, scope),
    }
    return table[name]()
