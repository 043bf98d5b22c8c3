"""Query-agnostic pruning policies. This package knows salience and groups; it does not know models, KV or questions."""

from sparsevila_cluster.pruning.policies import KeepAll, PruningPolicy, Random, Salience, Scope, Uniform, build_pruning

__all__ = ["KeepAll", "PruningPolicy", "Random", "Salience", "Scope", "Uniform", "build_pruning"]
