"""Retrieval: which visual KV a turn attends to, chosen per layer and for this turn only. One file per method."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsevila_cluster.retrieval.retrieval_method import RetrievalMethod

RETRIEVAL = {
    "retrieve_all": "sparsevila_cluster.retrieval.retrieve_all:RetrieveAll",
    "random": "sparsevila_cluster.retrieval.retrieve_random:RetrieveRandom",
    "query_topk": "sparsevila_cluster.retrieval.query_topk:QueryTopK",
}
"""Name in the configuration -> "module:class", imported when a configuration names it: to read the table takes no torch."""


def build_retrieval(name: str, fraction: float, mass: float | None = None, seed: int = 0) -> RetrievalMethod:
    """The method called `name`; of `fraction` (kept), `mass` and `seed` it gets those that are its fields. A fraction of 1 without
    a mass is `RetrieveAll`, whatever the name.

    Raises:
        KeyError: no such name in `RETRIEVAL`.
    """
    method = _class_of("retrieve_all" if fraction >= 1.0 and mass is None else name)
    options = {"fraction": fraction, "mass": mass, "seed": seed}
    built: RetrievalMethod = method(**{field.name: options[field.name] for field in fields(method) if field.name in options})
    return built


def methods_that_take(option: str) -> list[str]:
    """Names of the methods that take "retrieve_mass" (they have a field `mass`) or "refresh_every" (they read scores, which change
    while an answer grows).
    """
    if option == "retrieve_mass":
        return [name for name in RETRIEVAL if any(field.name == "mass" for field in fields(_class_of(name)))]
    return [name for name in RETRIEVAL if "scores" in _class_of(name).needs]


def _class_of(name: str) -> Any:
    module, _, class_name = RETRIEVAL[name].partition(":")
    return getattr(import_module(module), class_name)
