"""Who brings a thousand calls at once does not make the others wait for them."""

import asyncio
import time
from contextlib import ExitStack

from sparsevila_cluster.gateway import arrival_pace
from sparsevila_cluster.gateway.arrival_pace import BURST, ArrivalPace


async def waits_s(pace, owner, num):
    """How long each of `num` calls that come at once waits until it may begin."""
    begun_s = time.monotonic()

    async def one():
        await pace.turn(owner)
        return time.monotonic() - begun_s

    return await asyncio.gather(*(one() for _ in range(num)))


def test_whoever_is_alone_does_not_wait():
    async def main():
        pace = ArrivalPace(per_s=1.0)
        with pace.call("a"):
            assert max(await waits_s(pace, "a", 500)) < 0.5

    asyncio.run(main())


def test_beside_others_calls_begin_at_a_rate_in_the_order_in_which_they_came():
    async def main():
        pace = ArrivalPace(per_s=100.0)
        with ExitStack() as calls:
            calls.enter_context(pace.call("few"))
            waits = asyncio.ensure_future(waits_s(pace, "many", 50))
            await asyncio.sleep(0.05)
            assert max(await waits_s(pace, "few", 5)) < 0.05
            waited = await waits
        assert waited == sorted(waited)
        first, later = waited[: int(BURST)], waited[int(BURST) :]
        assert max(first) < 0.1 and 0.25 < later[-1] < 2.0 and later[-1] - later[0] > 0.25

    asyncio.run(main())


def test_another_ones_calls_count_for_a_moment_after_their_end():
    now_s = [0.0]

    async def main():
        pace = ArrivalPace(per_s=1.0, clock=lambda: now_s[0])
        with pace.call("few"):
            pass
        for _ in range(int(BURST)):
            await pace.turn("many")
        waiting = asyncio.ensure_future(pace.turn("many"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()
        now_s[0] += 5.0
        await asyncio.wait_for(asyncio.gather(*(pace.turn("many") for _ in range(100))), 1)

    asyncio.run(main())


def test_what_is_taken_back_takes_nobodys_turn():
    async def main():
        pace = ArrivalPace(per_s=10.0)
        with pace.call("few"):
            flood = [asyncio.ensure_future(pace.turn("many")) for _ in range(200)]
            await asyncio.sleep(0.05)
            for call in flood:
                call.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            assert max(await waits_s(pace, "many", 2)) < 0.5

    asyncio.run(main())


def test_nobody_waits_longer_than_other_limits_take(monkeypatch):
    monkeypatch.setattr(arrival_pace, "MAX_WAIT_S", 0.2)

    async def main():
        pace = ArrivalPace(per_s=10.0)
        with pace.call("few"):
            waited = await waits_s(pace, "many", 100)
        assert max(waited) < 1.0 and sum(wait > 0.05 for wait in waited) <= 3

    asyncio.run(main())
