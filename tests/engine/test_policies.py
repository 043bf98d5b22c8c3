"""Pruning and retrieval policies, and sampling."""

import math

import pytest
import torch

from sparsevila_cluster.core.config import SparsityConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import SamplingParams, Turn, kept_count
from sparsevila_cluster.engine.sampling import Sampler, sample
from sparsevila_cluster.pruning import build_pruning
from sparsevila_cluster.retrieval import Budget, budget_of, build_retrieval


def tokens(sizes, seed=0, structural=()):
    g = torch.Generator().manual_seed(seed)
    salience = torch.rand(sum(sizes), generator=g)
    salience[list(structural)] = float("nan")
    return salience, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


@pytest.mark.parametrize("fraction, total, want", [(0.25, 64, 16), (0.1, 128, 13), (0.5, 3, 2), (0.01, 7, 1), (0.3, 0, 0)])
def test_kept_count(fraction, total, want):
    assert kept_count(fraction, total) == want


@pytest.mark.parametrize("name", ["random", "uniform", "salience"])
@pytest.mark.parametrize("scope", ["global", "per_group"])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.7, 1.0])
def test_pruning_counts_order_and_structure(name, scope, fraction):
    sizes, structural = [7, 1, 13, 31], (3, 20)
    salience, group = tokens(sizes, structural=structural)
    keep = build_pruning(name, fraction, scope, seed=3).keep(salience, group)
    assert torch.equal(keep, keep.unique()), "ascending and distinct"
    assert set(structural) <= set(keep.tolist())
    scored = [i for i in keep.tolist() if i not in structural]
    if scope == "global":
        assert len(scored) == kept_count(fraction, sum(sizes) - len(structural))
    else:
        members = torch.bincount(group[torch.tensor([i for i in range(len(group)) if i not in structural])], minlength=4)
        counts = torch.bincount(group[torch.tensor(scored)], minlength=4)
        assert counts.tolist() == [kept_count(fraction, n) for n in members.tolist()]


def test_salience_keeps_the_most_salient_and_the_earlier_of_equals():
    salience, group = torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2, 0.5]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert build_pruning("salience", 0.5, "global").keep(salience, group).tolist() == [1, 2, 3]
    assert build_pruning("salience", 1 / 3, "per_group").keep(salience, group).tolist() == [1, 3]


def test_keep_all_keeps_all():
    salience, group = tokens([5, 6], structural=(2,))
    assert build_pruning("keep_all", 0.1, "global").keep(salience, group).tolist() == list(range(11))


def test_retrieval_takes_the_top_of_each_layer():
    scores = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    chosen = build_retrieval("query_topk", 0.1).select(scores)
    assert chosen.shape == (5, 4)
    for layer, row in enumerate(chosen):
        assert row.tolist() == sorted(scores[layer].topk(4).indices.tolist())


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_a_mass_takes_the_smallest_set_that_holds_it_in_every_layer(mass, fraction):
    scores = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) ** 4
    policy = build_retrieval("query_topk", fraction, mass)
    chosen = policy.select(scores)
    needed = []
    for row in scores.double().tolist():
        order = sorted(row, reverse=True)
        needed.append(next(k for k in range(1, 31) if sum(order[:k]) >= mass * sum(row)))
    assert chosen.shape[1] == policy.count(scores) == min(max(needed), kept_count(fraction, 30)) <= policy.budget(30)
    for layer, row in enumerate(chosen.tolist()):
        assert row == sorted(scores[layer].topk(len(row)).indices.tolist())


def test_a_mass_of_one_heap_and_of_nothing():
    heap = torch.zeros(2, 9)
    heap[0, 4] = heap[1, 2] = 1.0
    assert build_retrieval("query_topk", 1.0, 0.99).select(heap).tolist() == [[4], [2]]
    assert build_retrieval("query_topk", 1.0, 0.99).select(torch.zeros(2, 9)).shape == (2, 1)
    assert build_retrieval("query_topk", 1.0, 0.99).select(torch.zeros(2, 0)).shape == (2, 0)


def wish(**options):
    return Turn("t", "c", "m", "what?", **options)


@pytest.mark.parametrize(
    "options, fields, kind, want",
    [
        ({}, {}, "video", (0.10, None, 0)),
        ({}, {}, "image", (0.25, None, 0)),
        ({"retrieve_keep": 0.4}, {"retrieve_keep": 0.2}, "video", (0.4, None, 0)),
        ({}, {"retrieve_mass": 0.9}, "video", (0.5, 0.9, 0)),
        ({"retrieve_mass": 0.8}, {"retrieve_keep": 0.2, "refresh_every": 7}, "video", (0.2, 0.8, 7)),
        ({"retrieve_mass": 1.0, "refresh_every": 0}, {"retrieve_mass": 0.9, "refresh_every": 7}, "video", (0.10, None, 0)),
    ],
)
def test_a_turn_comes_before_the_configuration_and_that_before_the_default(options, fields, kind, want):
    budget = budget_of(wish(**options), SparsityConfig(**fields), kind)
    assert (budget.keep, budget.mass, budget.refresh_every) == want


@pytest.mark.parametrize(
    "level, keep, want", [(0.0, 0.5, 0.5), (1.0, 0.5, 0.1), (0.25, 0.5, 0.4), (1.0, 0.08, 0.08), (0.5, 1.0, 0.55)]
)
def test_pressure_moves_a_budget_towards_the_floor_and_never_up(level, keep, want):
    assert Budget("query_topk", keep, 0.9).lowered(level, 0.1).keep == pytest.approx(want)
    assert Budget("retrieve_all", keep).lowered(level, 0.1).keep == keep


def test_random_retrieval_is_seeded_and_differs_by_layer():
    scores = torch.zeros(6, 50)
    one, same, other = (build_retrieval("random", 0.2, seed=s).select(scores) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one[0], one[1])
    assert all(len(set(row.tolist())) == 10 for row in one)


@pytest.mark.parametrize("name", ["retrieve_all", "query_topk", "random"])
def test_keeping_everything_is_dense(name):
    policy = build_retrieval(name, 1.0)
    assert policy.select(torch.rand(2, 9)) is None and policy.budget(9) == 9


def test_greedy_and_degenerate_sampling():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.9]])
    assert sample(logits, [Sampler(SamplingParams()), Sampler(SamplingParams(temperature=1.0, top_k=1))]) == [1, 0]
    assert Sampler(SamplingParams(temperature=2.0, top_p=1e-6, seed=1)).draw(logits[1]) == 0


def test_a_seed_gives_the_same_stream_whatever_is_beside_it():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.0, seed=7)
    alone, batched, neighbour = Sampler(params), Sampler(params), Sampler(SamplingParams(temperature=1.3, seed=9))
    one = [alone.draw(row) for row in logits]
    two = [sample(torch.stack([row, row]), [neighbour, batched])[1] for row in logits]
    assert one == two and len(set(one)) > 3


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 4000

    def frequencies(**params):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=0, **params))
        counts = torch.bincount(torch.tensor([sampler.draw(probabilities.log()) for _ in range(draws)]), minlength=4)
        return counts / draws

    for params, want in (
        ({}, probabilities),
        ({"top_k": 2}, torch.tensor([0.625, 0.375, 0.0, 0.0])),
        ({"top_p": 0.6}, torch.tensor([0.625, 0.375, 0.0, 0.0])),
        ({"top_p": 0.81}, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95),
    ):
        spread = 4 * math.sqrt(0.25 / draws)
        torch.testing.assert_close(frequencies(**params), want, atol=spread, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.01},
        {"top_k": -1}, {"seed": 2**64}, {"stop": ("",)}, {"stop": ("x",) * 17}, {"stop": (3,)},
    ],
)  # fmt: skip
def test_illegal_parameters_are_named(bad):
    with pytest.raises(BadRequest, match=next(iter(bad)).replace("_", ".")):
        SamplingParams(**bad)
