"""How much visual KV a turn may attend to: its own wish, else the configuration, else the default; less under pressure.

Knows: ratios and who comes first. Does not know: scores, KV memory, engines, or what pressure is.

    keep           the fraction of the pruned visual KV that every layer takes; with `mass`, the most that it may take
    mass           the share of a layer's visual attention that its set must hold
    refresh_every  generated tokens between two choices; 0 = once per turn
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsevila_cluster.core.config import SparsityConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import Turn
from sparsevila_cluster.retrieval.policies import RetrievalPolicy, build_retrieval

DEFAULT_RETRIEVE_KEEP = {"video": 0.10, "image": 0.25}
# The most that a mass may take where nobody names a `retrieve_keep`: above half, packing saves little.
DEFAULT_MASS_CAP = 0.5


@dataclass(frozen=True)
class Budget:
    """What one turn may attend to."""

    name: str
    keep: float
    mass: float | None = None
    refresh_every: int = 0
    seed: int = 0

    def policy(self) -> RetrievalPolicy:
        return build_retrieval(self.name, self.keep, self.mass, self.seed)

    def lowered(self, level: float, floor: float) -> Budget:
        """`keep` moved from its own value (level 0) towards `floor` (level 1); a keep below the floor stays as it is.

        A configuration that says `retrieve_all` is taken at its word and not lowered.
        """
        if level <= 0.0 or self.keep <= floor or self.name == "retrieve_all":
            return self
        return replace(self, keep=self.keep - level * (self.keep - floor))


def default_keep(sparsity: SparsityConfig, kind: str, mass: float | None) -> float:
    """The keep of a turn that names none, on media of this kind. A mass of 1 is none: nothing is left to cut but by `keep`."""
    if sparsity.retrieve_keep is not None:
        return sparsity.retrieve_keep
    return DEFAULT_RETRIEVE_KEEP[kind] if mass in (None, 1.0) else DEFAULT_MASS_CAP


def budget_of(turn: Turn, sparsity: SparsityConfig, kind: str) -> Budget:
    """The budget of a turn on media of this kind.

    Raises:
        BadRequest: the turn asks for a mass or for refreshes, and the configured policy scores nothing.
    """
    mass = sparsity.retrieve_mass if turn.retrieve_mass is None else turn.retrieve_mass
    refresh_every = sparsity.refresh_every if turn.refresh_every is None else turn.refresh_every
    for name, value in (("retrieve_mass", turn.retrieve_mass), ("refresh_every", turn.refresh_every)):
        if value and sparsity.retrieve != "query_topk":
            raise BadRequest(f"{name}={value!r} needs retrieve='query_topk'; this engine has {sparsity.retrieve!r}")
    keep = default_keep(sparsity, kind, mass) if turn.retrieve_keep is None else turn.retrieve_keep
    return Budget(sparsity.retrieve, keep, None if mass == 1.0 else mass, refresh_every or 0, sparsity.seed)
