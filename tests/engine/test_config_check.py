"""What a configuration names is looked up in the tables of methods before anything is loaded."""

import sys
from subprocess import run

import pytest

from sparsevila_cluster.cluster.check_cluster import check_cluster
from sparsevila_cluster.core.cluster_config import build_cluster_config
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.pruning import PRUNING
from sparsevila_cluster.retrieval import RETRIEVAL

BAD = [
    ({"prune": "magic"}, r"sparsity.prune: input should be 'keep_all', 'random', 'uniform' or 'salience', got 'magic'"),
    ({"retrieve": "magic"}, r"sparsity.retrieve: input should be 'retrieve_all', 'random' or 'query_topk', got 'magic'"),
    ({"retrieve": "random", "retrieve_mass": 0.9}, r"retrieve_mass: needs retrieve='query_topk', not 'random', got 0.9"),
    ({"retrieve": "retrieve_all", "refresh_every": 4}, r"refresh_every: needs retrieve='query_topk', not 'retrieve_all', got 4"),
]


@pytest.mark.parametrize(("fields", "message"), BAD)
def test_what_no_table_has_is_refused_by_name(fields, message):
    with pytest.raises(BadConfig, match=message):
        check_choices(build_config(**fields))
    with pytest.raises(BadConfig, match=message):
        check_cluster(build_cluster_config(engine=fields))


def test_what_the_tables_have_is_fine():
    for name in PRUNING:
        check_choices(build_config(prune=name))
    for name in RETRIEVAL:
        check_choices(build_config(retrieve=name, refresh_every=0))


def test_names_are_checked_without_torch():
    code = (
        "import sys; from sparsevila_cluster.core.config import EngineConfig; "
        "from sparsevila_cluster.engine.config_check import check_choices; "
        "check_choices(EngineConfig()); sys.exit('torch' in sys.modules)"
    )
    assert run([sys.executable, "-c", code], timeout=60).returncode == 0
