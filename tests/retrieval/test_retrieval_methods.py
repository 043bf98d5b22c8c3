"""Retrieval methods against their definitions."""

import pytest
import torch

from sparsevila_cluster.core.requests import kept_count
from sparsevila_cluster.retrieval import RETRIEVAL, build_retrieval, methods_that_take
from sparsevila_cluster.retrieval.retrieval_method import RetrievalInput


def tokens(scores):
    """What methods may read; keys and places of all tokens are zero."""
    layers, n = scores.shape
    return RetrievalInput(
        scores,
        keys=lambda layer: torch.zeros(n, 2, 4),
        positions=torch.zeros(1, n, dtype=torch.int64),
        groups=torch.zeros(n, dtype=torch.int32),
    )


def test_the_top_of_each_layer():
    scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    chosen = build_retrieval("query_topk", 0.1).select(tokens(scores))
    assert chosen.shape == (5, 4)
    for layer, row in enumerate(chosen):
        assert row.tolist() == sorted(scores[layer].topk(4).indices.tolist())


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_a_mass_takes_the_smallest_set_that_holds_it_in_every_layer(mass, fraction):
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) ** 4
    method = build_retrieval("query_topk", fraction, mass)
    chosen = method.select(tokens(scores))
    needed = []
    for row in scores.double().tolist():
        order = sorted(row, reverse=True)
        needed.append(next(k for k in range(1, 31) if sum(order[:k]) >= mass * sum(row)))
    assert chosen.shape[1] == min(max(needed), kept_count(fraction, 30)) <= method.budget(30)
    for layer, row in enumerate(chosen.tolist()):
        assert row == sorted(scores[layer].topk(len(row)).indices.tolist())


def test_a_mass_of_one_heap_and_of_nothing():
    heap = torch.zeros(2, 9)
    heap[0, 4] = heap[1, 2] = 1.0
    method = build_retrieval("query_topk", 1.0, 0.99)
    assert method.select(tokens(heap)).tolist() == [[4], [2]]
    assert method.select(tokens(torch.zeros(2, 9))).shape == (2, 1)
    assert method.select(tokens(torch.zeros(2, 0))).shape == (2, 0)


def test_random_is_seeded_and_differs_by_layer():
    given = tokens(torch.zeros(6, 50))
    one, same, other = (build_retrieval("random", 0.2, seed=s).select(given) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])
    assert all(len(set(row.tolist())) == 10 for row in one)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_keeping_everything_is_dense(name):
    method = build_retrieval(name, 1.0)
    assert method.select(tokens(torch.rand(2, 9))) is None and method.budget(9) == 9


def test_only_what_scores_takes_a_mass_or_refreshes():
    assert methods_that_take("retrieve_mass") == methods_that_take("refresh_every") == ["query_topk"]
