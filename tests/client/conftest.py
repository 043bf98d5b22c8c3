"""Tests that are coroutines get an event loop and a minute; others a server in a thread."""

import asyncio
import inspect
import socket
import threading
from contextlib import contextmanager

import pytest

from tests.client.scripted_server import Scripted, serving


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), 60))
    return True


@pytest.fixture
def unused_port():
    """Nobody listens there, nor can another test begin to."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def in_thread(make, most_s=120):
    """What the async context manager `make()` yields, alive in an event loop of its own thread for at most `most_s`."""
    ready, done, told = threading.Event(), threading.Event(), []

    async def main():
        try:
            async with make() as thing:
                told.append(thing)
                ready.set()
                await asyncio.to_thread(done.wait, most_s)
        finally:
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert ready.wait(60) and told
    try:
        yield told[0]
    finally:
        done.set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def served():
    """(servicer, port) of a scripted server."""
    servicer = Scripted()
    with in_thread(lambda: serving(servicer)) as (_, port):
        yield servicer, port
