"""One tiny checkpoint for all tests of the door."""

import pytest

from tests.gateway.doors import clip
from tests.tiny import make_qwen2_5_vl


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def clips():
    return [clip(seed) for seed in range(3)]
