"""Waits that end: in time, late, cancelled, and cancelled at the very moment when the result is there."""

import asyncio
import time

import pytest

from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, NotFound


def test_the_result_and_the_error_pass_through():
    async def main():
        assert await wait_within(asyncio.sleep(0, 7), 1, "nothing") == 7
        future = asyncio.get_running_loop().create_future()
        future.set_exception(NotFound("gone"))
        with pytest.raises(NotFound, match="gone"):
            await wait_within(future, 1, "nothing")

    asyncio.run(main())


@pytest.mark.parametrize("within_s", [0.02, 0, -1])
def test_a_late_result_is_a_typed_error_and_the_work_is_cancelled(within_s):
    async def main():
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(DeadlineExceeded, match=f"the answer took longer than {within_s:g} s"):
            await wait_within(never, within_s, "the answer")
        assert never.cancelled()

    asyncio.run(main())


def test_a_cancellation_is_never_swallowed():
    async def main():
        result = asyncio.get_running_loop().create_future()
        waiter = asyncio.create_task(wait_within(result, 10, "the answer"))
        await asyncio.sleep(0)
        result.set_result(1)
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter

    asyncio.run(main())


def test_a_caller_who_left_or_is_late_ends_the_work():
    deadline = Deadline(10)
    deadline.check("work")
    assert 9 < deadline.remaining_s("work") <= 10
    deadline.cancel()
    with pytest.raises(Cancelled, match="work was cancelled"):
        deadline.check("work")
    late = Deadline(1e-9)
    time.sleep(0.001)
    with pytest.raises(DeadlineExceeded, match="work took longer than 1e-09 s"):
        late.check("work")
    with pytest.raises(DeadlineExceeded, match="work took longer"):
        late.remaining_s("work")
