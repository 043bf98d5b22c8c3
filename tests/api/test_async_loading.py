"""Loading the model behind AsyncVideoQA: off the event loop, once, with a deadline, and what becomes of it when nobody waits."""

import asyncio
import threading
import time

import pytest

from sparsevila_cluster import AsyncVideoQA
from sparsevila_cluster.api import async_video_qa
from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest, DeadlineExceeded, Unavailable
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from tests.api.test_async_video_qa import checkpoint, until  # noqa: F401 (a fixture)


class SlowPipeline(LocalPipeline):
    """Begins to load when `gate` is open."""

    gate = threading.Event()
    made: list["SlowPipeline"] = []

    def __init__(self, *args):
        assert self.gate.wait(30)
        super().__init__(*args)
        self.made.append(self)


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(async_video_qa, "LocalPipeline", SlowPipeline)
    SlowPipeline.gate.clear()
    SlowPipeline.made.clear()
    yield SlowPipeline
    SlowPipeline.gate.set()


def test_loading_leaves_the_event_loop_free_and_happens_once(checkpoint, slow):  # noqa: F811
    async def main():
        qa = AsyncVideoQA(checkpoint)
        users = [asyncio.create_task(qa.info()) for _ in range(3)]
        await asyncio.sleep(0.05)  # runs although nothing is loaded yet
        assert not any(user.done() for user in users)
        users[0].cancel()  # does not end the loading that the others wait for
        slow.gate.set()
        assert (await users[1])["prefills"] == (await users[2])["prefills"] == 0
        assert users[0].cancelled() and len(slow.made) == 1
        await qa.close()

    asyncio.run(main())


def test_a_load_that_takes_too_long_is_told_and_may_still_be_used(checkpoint, slow):  # noqa: F811
    async def main():
        qa = AsyncVideoQA(checkpoint, load_timeout_s=0.05)
        for _ in range(2):
            with pytest.raises(DeadlineExceeded, match="loading the model took longer than 0.05 s"):
                await qa.load()
        slow.gate.set()
        await until(lambda: asyncio.sleep(0, bool(slow.made)), "not loaded")
        assert (await qa.info())["steps"] == 0 and len(slow.made) == 1
        await qa.close()

    asyncio.run(main())


def test_what_is_closed_while_it_loads_ends_when_it_is_there(checkpoint, slow):  # noqa: F811
    async def main():
        qa = AsyncVideoQA(checkpoint)
        loading = asyncio.create_task(qa.load())
        await asyncio.sleep(0.01)
        await qa.close()
        slow.gate.set()
        await asyncio.gather(loading, return_exceptions=True)
        with pytest.raises(Unavailable):
            await qa.load()

    asyncio.run(main())
    give_up_at = time.time() + 20
    while slow.made[0].decode._thread._thread.is_alive():
        assert time.time() < give_up_at, "its threads go on"
        time.sleep(0.01)


def test_a_bad_checkpoint_is_told_to_everyone(tmp_path):
    async def main():
        qa = AsyncVideoQA(tmp_path)
        told = await asyncio.gather(qa.load(), qa.info(), qa.prepare("x"), return_exceptions=True)
        assert [type(error) for error in told] == [BadCheckpoint] * 3
        with pytest.raises(BadCheckpoint):
            async with qa:
                pass
        await qa.close()

    asyncio.run(main())


def test_it_belongs_to_one_event_loop(checkpoint):  # noqa: F811
    qa = AsyncVideoQA(checkpoint)
    assert asyncio.run(qa.info())["steps"] == 0
    with pytest.raises(BadRequest, match="event loop"):
        asyncio.run(qa.info())
    asyncio.run(qa.close())
