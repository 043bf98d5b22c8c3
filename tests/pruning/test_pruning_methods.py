"""Pruning methods against their definitions."""

import pytest
import torch

from sparsevila_cluster.core.requests import kept_count
from sparsevila_cluster.pruning import PRUNING, build_pruning
from sparsevila_cluster.pruning.pruning_method import PruningInput


def tokens(salience, groups):
    """One row of cells for each group; NaN of salience is structural."""
    sizes = torch.bincount(groups).tolist()
    col = torch.cat([torch.arange(n) for n in sizes])
    cells = torch.stack((torch.zeros_like(col), col), 1).int()
    cells[salience.isnan()] = -1
    embeddings = torch.randn(len(salience), 8, generator=torch.Generator().manual_seed(9))
    return PruningInput(embeddings, salience, groups.int(), cells, tuple((1, n) for n in sizes), "video")


def random_tokens(sizes, structural=()):
    salience = torch.rand(sum(sizes), generator=torch.Generator().manual_seed(0))
    salience[list(structural)] = float("nan")
    return tokens(salience, torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)))


@pytest.mark.parametrize(("fraction", "total", "want"), [(0.25, 64, 16), (0.1, 128, 13), (0.5, 3, 2), (0.01, 7, 1), (0.3, 0, 0)])
def test_kept_count(fraction, total, want):
    assert kept_count(fraction, total) == want


@pytest.mark.parametrize("name", sorted(set(PRUNING) - {"keep_all"}))
@pytest.mark.parametrize("scope", ["global", "per_group"])
@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.7, 1.0])
def test_counts_order_and_structure(name, scope, fraction):
    sizes, structural = [7, 1, 13, 31], (3, 20)
    given = random_tokens(sizes, structural)
    keep = build_pruning(name, fraction, scope, seed=3).keep(given)
    assert torch.equal(keep, keep.unique()), "ascending and distinct"
    assert set(structural) <= set(keep.tolist())
    scored = [i for i in keep.tolist() if i not in structural]
    if scope == "global":
        assert len(scored) == kept_count(fraction, sum(sizes) - len(structural))
    else:
        others = torch.tensor([i for i in range(sum(sizes)) if i not in structural])
        members = torch.bincount(given.groups[others], minlength=4)
        counts = torch.bincount(given.groups[torch.tensor(scored)], minlength=4)
        assert counts.tolist() == [kept_count(fraction, n) for n in members.tolist()]


def test_salience_keeps_the_most_salient_and_the_earlier_of_equals():
    given = tokens(torch.tensor([0.1, 0.9, 0.5, 0.5, 0.2, 0.5]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert build_pruning("salience", 0.5, "global").keep(given).tolist() == [1, 2, 3]
    assert build_pruning("salience", 1 / 3, "per_group").keep(given).tolist() == [1, 3]


def test_uniform_takes_the_middle_of_equal_intervals():
    given = random_tokens([12])
    assert build_pruning("uniform", 0.25, "global").keep(given).tolist() == [2, 6, 10]


def test_random_is_seeded():
    given = random_tokens([50])
    one, same, other = (build_pruning("random", 0.2, "global", seed).keep(given) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_keep_all_keeps_all():
    assert build_pruning("keep_all", 0.1, "global").keep(random_tokens([5, 6], (2,))).tolist() == list(range(11))


def test_only_salience_needs_the_encoder():
    assert [name for name in PRUNING if build_pruning(name, 0.5, "global").needs] == ["salience"]
