"""A worker is killed, or stops for a while, at each state of a transfer: the client gets its media and the right answers."""

import asyncio
import signal
import time

import pytest

from tests.chaos.kill_case import kill_case
from tests.chaos.kill_points import DECODE_TRANSFER, PREFILL_TRANSFER

SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
PLACES = [("prefill", place) for place in PREFILL_TRANSFER] + [("decode", place) for place in DECODE_TRANSFER]
# A prefill worker that is caught there is needed no more: all of it is over there.
ARRIVED = ("verified", "acked")


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
@pytest.mark.parametrize(("kind", "place"), PLACES, ids=[f"{kind}-{place}".replace(" ", "-") for kind, place in PLACES])
def test_a_worker_falls_at_each_state_of_a_transfer(runner, world, note, kind, place, number):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            before = case.num_prefills
            token = await cluster.arm(kind, f"transfer: {place}", number, clip.media_id)
            preparing = asyncio.ensure_future(case.prepare())
            hit_worker = await case.caught(token, number)
            await preparing
            ready_s = time.monotonic() - case.hit_s
            await case.client.ask()
            if number == signal.SIGSTOP:
                hit_worker.signal(signal.SIGCONT)
            await case.client.ask()
            await case.client.ask()
            encoded = case.num_prefills - before
            if kind == "decode":
                assert encoded == 1, "the media was encoded again, though its maker lived"
            else:
                assert encoded <= (1 if place in ARRIVED else 2), "the media was encoded again, though it had arrived"
            note(f"{kind} {signal.Signals(number).name} transfer {place}", f"media ready after {ready_s:.2f} s, {encoded} prefills")

    runner.run(main())
