"""Query-aware retrieval policies. This package knows scores per layer; it does not know models, KV memory or pruning."""

from sparsevila_cluster.retrieval.policies import (
    QueryTopK,
    Random,
    RetrievalPolicy,
    RetrieveAll,
    build_retrieval,
)

__all__ = ["QueryTopK", "Random", "RetrievalPolicy", "RetrieveAll", "build_retrieval"]
