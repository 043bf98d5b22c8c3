"""How much visual KV a turn may attend to: its own wish, else the configuration; less under pressure.

keep           the fraction of the pruned visual KV that every layer takes; with `mass`, the most that it may take
mass           the share of a layer's visual attention that its set must hold
refresh_every  generated tokens between two choices; 0 = once per turn
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsevila_cluster.core.config import SparsityConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import Turn
from sparsevila_cluster.retrieval import build_retrieval, methods_that_take
from sparsevila_cluster.retrieval.retrieval_method import RetrievalMethod


@dataclass(frozen=True)
class Budget:
    """What one turn may attend to."""

    name: str
    keep: float
    mass: float | None = None
    refresh_every: int = 0
    seed: int = 0

    def method(self) -> RetrievalMethod:
        """The method that chooses within this budget."""
        return build_retrieval(self.name, self.keep, self.mass, self.seed)

    def lowered(self, level: float, floor: float) -> Budget:
        """`keep` moved from its own value (level 0) towards `floor` (level 1); a keep below the floor stays as it is.

        A configuration that says `retrieve_all` is taken at its word and not lowered.
        """
        if level <= 0.0 or self.keep <= floor or self.name == "retrieve_all":
            return self
        return replace(self, keep=self.keep - level * (self.keep - floor))


def budget_of(turn: Turn, sparsity: SparsityConfig, kind: str) -> Budget:
    """The budget of a turn on media of this kind ("video" or "image"). A mass of 1 is none: only `keep` can cut.

    Raises:
        BadRequest: the turn asks for a mass or for refreshes, which the configured method cannot do.
    """
    for option, value in (("retrieve_mass", turn.retrieve_mass), ("refresh_every", turn.refresh_every)):
        if value and sparsity.retrieve not in (legal := methods_that_take(option)):
            raise BadRequest(
                f"{option}={value!r} needs retrieve={' or '.join(map(repr, legal))}; this engine has {sparsity.retrieve!r}"
            )
    resolved = sparsity.resolved(kind, turn.retrieve_mass)
    keep = turn.retrieve_keep
    if keep is None:
        keep = resolved.retrieve_keep
        assert keep is not None
    mass = None if resolved.retrieve_mass == 1.0 else resolved.retrieve_mass
    refresh_every = sparsity.refresh_every if turn.refresh_every is None else turn.refresh_every
    return Budget(sparsity.retrieve, keep, mass, refresh_every or 0, sparsity.seed)
