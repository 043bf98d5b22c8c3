"""How much a turn may attend to: who comes first, and what pressure does to it."""

import pytest

from sparsevila_cluster.core.config import SparsityConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import Turn
from sparsevila_cluster.retrieval.budget import Budget, budget_of


def wish(**options):
    return Turn("t", "c", "m", "what?", **options)


@pytest.mark.parametrize(
    ("options", "fields", "kind", "want"),
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


@pytest.mark.parametrize("option", [{"retrieve_mass": 0.9}, {"refresh_every": 4}])
def test_a_method_without_scores_takes_no_mass_and_no_refreshes(option):
    with pytest.raises(BadRequest, match=f"{next(iter(option))}.*needs retrieve='query_topk'; this engine has 'random'"):
        budget_of(wish(**option), SparsityConfig(retrieve="random"), "video")


@pytest.mark.parametrize(
    ("level", "keep", "want"), [(0.0, 0.5, 0.5), (1.0, 0.5, 0.1), (0.25, 0.5, 0.4), (1.0, 0.08, 0.08), (0.5, 1.0, 0.55)]
)
def test_pressure_moves_a_budget_towards_the_floor_and_never_up(level, keep, want):
    assert Budget("query_topk", keep, 0.9).lowered(level, 0.1).keep == pytest.approx(want)
    assert Budget("retrieve_all", keep).lowered(level, 0.1).keep == keep
