"""Tiny checkpoints, made once per run."""

import pytest
import torch

from sparsevila_cluster.models import load_model
from tests.checkpoints import tiny_qwen2_5_vl


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A checkpoint directory in the published layout."""
    return tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def modern(tmp_path_factory):
    """A checkpoint directory as transformers 5 saves it: sharded, tied head."""
    return tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path_factory.mktemp("modern"), seed=1, layout="modern", shards=3, tie=True)


@pytest.fixture(scope="session")
def model(hub):
    return load_model(hub, device="cpu")


@pytest.fixture(scope="session")
def oracle(hub):
    return tiny_qwen2_5_vl.hf_model(hub)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
