"""One tiny checkpoint and two clips for all tests of workers."""

import pytest

from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.media.clips import write_clip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{i}.mp4", seed=i) for i in range(2)]


@pytest.fixture(scope="session")
def endless(checkpoint):
    """The model, with answers that only end at max_tokens."""
    model = load_model(checkpoint)
    model.chat.eos_ids = frozenset()
    return model
