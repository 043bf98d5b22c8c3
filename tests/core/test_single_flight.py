"""One call for many callers: what they share, and what happens to the others when it fails."""

import asyncio

import pytest

from sparsevila_cluster.core.errors import BadMedia, Cancelled, DeadlineExceeded
from sparsevila_cluster.core.single_flight import SingleFlight


class Work:
    """Counts how often it is done; each time it waits for its turn in `ends`."""

    def __init__(self):
        self.num = 0
        self.ends = [asyncio.get_running_loop().create_future() for _ in range(3)]

    async def __call__(self):
        self.num += 1
        return await self.ends[self.num - 1]


def together(scenario, num=4):
    """Run `scenario(work, tasks)` with `num` callers of one key, then return (work, what each was told)."""

    async def main():
        work, flights = Work(), SingleFlight()
        tasks = [asyncio.create_task(flights.get("key", work)) for _ in range(num)]
        await asyncio.sleep(0)
        other = asyncio.create_task(flights.get("other", lambda: asyncio.sleep(0, "other")))
        assert await other == ("other", False)
        await scenario(work, tasks)
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert flights._in_flight == {}
        return work, told

    return asyncio.run(asyncio.wait_for(main(), 10))


def test_the_work_is_done_once_and_the_first_caller_is_told_apart():
    async def scenario(work, tasks):
        work.ends[0].set_result("made")

    work, told = together(scenario)
    assert work.num == 1 and told == [("made", False), ("made", True), ("made", True), ("made", True)]


def test_an_error_is_told_to_all():
    async def scenario(work, tasks):
        work.ends[0].set_exception(BadMedia("broken"))

    work, told = together(scenario)
    assert work.num == 1 and all(isinstance(error, BadMedia) for error in told) and len(told) == 4


@pytest.mark.parametrize("ending", [None, Cancelled("enough"), DeadlineExceeded("its own"), RuntimeError("a bug")], ids=repr)
def test_a_call_that_is_given_up_is_followed_by_the_next_caller(ending):
    async def scenario(work, tasks):
        if ending is None:
            tasks[0].cancel()
        else:
            work.ends[0].set_exception(ending)
        await asyncio.sleep(0.01)
        work.ends[1].set_result("made")

    work, told = together(scenario)
    assert work.num == 2 and sorted(told[1:]) == [("made", False), ("made", True), ("made", True)]
    assert isinstance(told[0], asyncio.CancelledError) if ending is None else told[0] is ending


def test_one_who_waits_may_leave():
    async def scenario(work, tasks):
        tasks[2].cancel()
        await asyncio.sleep(0)
        work.ends[0].set_result("made")

    work, told = together(scenario)
    assert work.num == 1 and isinstance(told[2], asyncio.CancelledError) and told[3] == ("made", True)
