"""Pruning: which visual tokens enter the language model, decided without a question and for good. One file per method."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sparsevila_cluster.pruning.pruning_method import PruningMethod

PRUNING = {
    "keep_all": "sparsevila_cluster.pruning.keep_all:KeepAll",
    "random": "sparsevila_cluster.pruning.keep_random:KeepRandom",
    "uniform": "sparsevila_cluster.pruning.keep_uniform:KeepUniform",
    "salience": "sparsevila_cluster.pruning.keep_salient:KeepSalient",
}
"""Name in the configuration -> "module:class", imported when a configuration names it: to read the table takes no torch."""


def build_pruning(name: str, fraction: float, scope: Literal["global", "per_group"], seed: int = 0) -> PruningMethod:
    """The method called `name`. Of `fraction` (kept), `scope` and `seed` it gets those that are its fields.

    Raises:
        KeyError: no such name in `PRUNING`.
    """
    module, _, class_name = PRUNING[name].partition(":")
    method: Any = getattr(import_module(module), class_name)
    options = {"fraction": fraction, "scope": scope, "seed": seed}
    built: PruningMethod = method(**{field.name: options[field.name] for field in fields(method) if field.name in options})
    return built
