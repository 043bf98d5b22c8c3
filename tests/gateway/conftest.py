"""One tiny checkpoint for all tests of the gateway."""

import logging

import pytest

from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.gateway.running_servers import clip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def clips():
    return [clip(seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def nothing_is_logged_as_an_error(request, caplog):
    """A client's mistakes and a client's leaving are no errors of ours, nor of the libraries under us."""
    yield
    errors = [record.getMessage() for record in caplog.get_records("call") if record.levelno >= logging.ERROR]
    assert not errors or "logged" in request.node.name, errors
