"""An event loop in a thread of its own, closed from wherever its owner is."""

import asyncio
import threading

import pytest

from sparsevila_cluster.core.errors import Unavailable
from sparsevila_cluster.core.event_loop_thread import EventLoopThread


async def nothing():
    return None


def test_it_is_closed_where_another_loop_runs():
    """As in a notebook, whose cells run inside a loop."""

    async def cell():
        owner = EventLoopThread("engine")
        assert owner.run(asyncio.sleep(0, "answer"), 5.0) == "answer"
        owner.close(nothing(), 5.0)
        assert not owner.thread.is_alive() and owner.loop.is_closed()
        with pytest.raises(Unavailable, match="closed"):
            owner.run(nothing(), 5.0)

    asyncio.run(cell())


def test_who_still_waits_is_told():
    owner, told, waits = EventLoopThread("engine"), [], threading.Event()

    async def long():
        waits.set()
        await asyncio.sleep(60)

    def wait():
        with pytest.raises(Unavailable) as error:
            owner.run(long(), 60.0)
        told.append(error.value)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert waits.wait(5.0)
    owner.close(nothing(), 5.0)
    waiter.join(5.0)
    assert len(told) == 1 and owner.loop.is_closed()
