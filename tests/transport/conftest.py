"""One receiver and one sender of every kind that runs here."""

import pytest

from tests.transport.transport_fixtures import FINE, KINDS, Pair


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pair(kind):
    one = Pair(kind)
    yield one
    one.close()


@pytest.fixture
def fine(kind):
    one = Pair(kind, **FINE)
    yield one
    one.close()
