"""Recipe (a): a new pruning method is one class and one row of the table, and everything else follows from the table."""

from importlib import import_module

import pytest
import torch

from sparsevila_cluster.cli.main import build_parser
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.pruning import PRUNING, build_pruning
from sparsevila_cluster.pruning.pruning_method import PruningInput


@pytest.fixture(scope="module", autouse=True)
def example():
    """Its row stands in the table for these tests only."""
    yield import_module("examples.new_policy")
    del PRUNING["distinct"]


def test_the_example_answers(example, tmp_path):
    _, frames = make_video(1)
    write_mp4(frames, tmp_path / "video.mp4")
    answers = example.compare(str(tmp_path / "video.mp4"), "Describe step 3.")
    assert set(answers) == {"salience", "distinct"} and all(answers.values())


def test_it_keeps_what_differs_from_its_frame(example):
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.1, 1.0]])
    groups = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)
    cells = torch.tensor([[0, 0], [0, 1], [0, 2]] * 2, dtype=torch.int32)
    given = PruningInput(embeddings, torch.ones(6), groups, cells, ((1, 3), (1, 3)), "video")
    assert build_pruning("distinct", 1 / 3, "per_group") == example.KeepDistinct(1 / 3, "per_group")
    assert build_pruning("distinct", 1 / 3, "per_group").keep(given).tolist() == [2, 4]


def test_the_configuration_and_the_command_line_know_it():
    check_choices(build_config(prune="distinct"))
    assert build_parser().parse_args(["ask", "clip.mp4", "What?", "--prune", "distinct"]).prune == "distinct"
    with pytest.raises(BadConfig, match="prune: .*'salience' or 'distinct', got 'distant'"):
        check_choices(build_config(prune="distant"))
