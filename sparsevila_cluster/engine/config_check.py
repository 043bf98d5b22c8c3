"""Whether the methods that a configuration names exist, and can do what else it says. Needs no torch unless they must be asked."""

from __future__ import annotations

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.pruning import PRUNING
from sparsevila_cluster.retrieval import RETRIEVAL, methods_that_take


def check_choices(config: EngineConfig) -> None:
    """Check what only the tables of methods know.

    Raises:
        BadConfig: `prune` or `retrieve` names no method, or `retrieve_mass` or `refresh_every` is set and `retrieve` cannot do it;
            the message names the value and what is legal.
    """
    sparsity = config.sparsity
    for field, name, table in (("prune", sparsity.prune, PRUNING), ("retrieve", sparsity.retrieve, RETRIEVAL)):
        if name not in table:
            raise BadConfig(f"sparsity.{field}: input should be {_either(table)}, got {name!r}")
    for field, value in (("retrieve_mass", sparsity.retrieve_mass), ("refresh_every", sparsity.refresh_every)):
        if value and sparsity.retrieve not in (legal := methods_that_take(field)):
            raise BadConfig(f"sparsity.{field}: needs retrieve={_either(legal)}, not {sparsity.retrieve!r}, got {value!r}")


def _either(names: dict[str, str] | list[str]) -> str:
    """`'a', 'b' or 'c'`."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last
