"""One dock and one shipper of every kind that runs here."""

import pytest

from tests.transport.transport_fixtures import FINE, KINDS, Harbour


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def harbour(kind):
    one = Harbour(kind)
    yield one
    one.close()


@pytest.fixture
def fine(kind):
    one = Harbour(kind, **FINE)
    yield one
    one.close()
