"""Refusals that are told later and later."""

import asyncio
import time

import pytest

from sparsevila_cluster.gateway import refusal_pace
from sparsevila_cluster.gateway.refusal_pace import BURST, MAX_HOLD_S, PER_S, RefusalPace
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.gateway.running_servers import refused, run, until
from tests.gateway.test_bad_calls import Broken

KEYS = {"a": "ann", "b": "bob"}


def test_a_burst_is_told_at_once_and_what_goes_on_ever_later_up_to_a_bound():
    async def main():
        now_s = 0.0
        pace = RefusalPace(lambda: True, lambda: now_s)
        held = [pace.hold_s("ann") for _ in range(int(BURST) + 200)]
        assert not any(held[: int(BURST)]) and held[int(BURST)] == pytest.approx(1 / PER_S)
        assert held == sorted(held) and held[-1] == MAX_HOLD_S
        assert pace.hold_s("bob") == 0.0, "each is judged by its own"
        now_s = MAX_HOLD_S + BURST / PER_S
        assert pace.hold_s("ann") == 0.0, "what was owed is forgotten after a while, however much there was"

    asyncio.run(main())


def test_nobody_is_held_where_there_is_nobody_to_spare_or_too_many_are_or_the_server_leaves(monkeypatch):
    async def main():
        monkeypatch.setattr(refusal_pace, "MAX_HELD", 2)
        several = False
        pace = RefusalPace(lambda: several)
        async with asyncio.timeout(5):
            await asyncio.gather(*(pace.hold("ann") for _ in range(500)))
            several = True
            for _ in range(int(BURST) + 1000):
                pace.hold_s("ann")
            held = [asyncio.create_task(pace.hold("ann")) for _ in range(2)]
            await asyncio.sleep(0)
            assert pace.num_held == 2
            await pace.hold("ann")  # one too many
            begun_s = time.monotonic()
            await pace.hold("bob")
            pace.close()
            await asyncio.gather(*held)
        assert time.monotonic() - begun_s < MAX_HOLD_S / 2 and not pace.num_held

    asyncio.run(main())


def test_who_is_refused_again_and_again_waits_and_others_do_not(monkeypatch):
    monkeypatch.setattr(refusal_pace, "BURST", 3.0)
    monkeypatch.setattr(refusal_pace, "PER_S", 2.0)

    async def work(one):
        async def wrong(key):
            begun_s = time.monotonic()
            code, _ = await refused(one.stub.Abort(pb.AbortRequest(), metadata=(("authorization", f"Bearer {key}"),), timeout=20))
            assert code == "INVALID_ARGUMENT"
            return time.monotonic() - begun_s

        floods = [asyncio.create_task(wrong("a")) for _ in range(6)]
        await until(lambda: _is(one.service.refusals.num_held == 3), "three are held")
        assert await wrong("b") < 0.4 and not one.service._shares.num_calls
        took_s = sorted(await asyncio.gather(*floods))
        assert took_s[2] < 0.4 and took_s[-1] > 1.0
        # A client that will not wait so long is told before its time is over.
        code, error = await refused(one.stub.Abort(pb.AbortRequest(), metadata=(("authorization", "Bearer a"),), timeout=0.5))
        assert code == "INVALID_ARGUMENT" and "turn_id" in str(error)

    run("tiny", work, pipeline=Broken(None), api_keys=KEYS)


async def _is(condition):
    return condition
