"""What a sparsity configuration leaves open, filled in for one kind of media."""

import pytest

from sparsevila_cluster.core.config import DEFAULT_MASS_CAP, SparsityConfig


@pytest.mark.parametrize(("kind", "keeps", "scope"), [("video", (0.25, 0.10), "per_group"), ("image", (0.4, 0.25), "global")])
def test_defaults_are_those_of_the_kind(kind, keeps, scope):
    found = SparsityConfig().resolved(kind)
    assert (found.prune_keep, found.retrieve_keep) == keeps and found.prune_scope == scope


def test_what_is_configured_stays():
    config = SparsityConfig(prune_keep=0.5, retrieve_keep=0.7, prune_scope="global", retrieve_mass=0.9)
    assert config.resolved("video") == config


def test_a_mass_is_capped_unless_it_is_no_mass_or_a_keep_is_named():
    assert SparsityConfig(retrieve_mass=0.9).resolved("video").retrieve_keep == DEFAULT_MASS_CAP
    assert SparsityConfig().resolved("video", retrieve_mass=0.9).retrieve_keep == DEFAULT_MASS_CAP
    assert SparsityConfig(retrieve_mass=0.9).resolved("video", retrieve_mass=1.0).retrieve_keep == 0.10
    assert SparsityConfig(retrieve_keep=0.2).resolved("video", retrieve_mass=0.9).retrieve_keep == 0.2


def test_keeping_everything_is_a_keep_of_one():
    found = SparsityConfig(prune="keep_all", prune_keep=0.5, retrieve="retrieve_all", retrieve_keep=0.5).resolved("video")
    assert (found.prune_keep, found.retrieve_keep) == (1.0, 1.0)
