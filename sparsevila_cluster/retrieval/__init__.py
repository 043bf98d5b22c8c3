"""Query-aware retrieval: policies and budgets. Knows scores per layer; does not know models, KV memory or pruning."""

from sparsevila_cluster.retrieval.budget import Budget, budget_of, default_keep
from sparsevila_cluster.retrieval.policies import QueryTopK, Random, RetrievalPolicy, RetrieveAll, build_retrieval

__all__ = [
    "Budget",
    "QueryTopK",
    "Random",
    "RetrievalPolicy",
    "RetrieveAll",
    "budget_of",
    "build_retrieval",
    "default_keep",
]
