"""A worker is killed, or stops for a while, at each state of a transfer: the client gets its media and the right answers."""

import asyncio
import signal
import time

import pytest

from tests.chaos.kill_case import scene
from tests.chaos.kill_points import DECODE_TRANSFER, PREFILL_TRANSFER

SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
PLACES = [("prefill", place) for place in PREFILL_TRANSFER] + [("decode", place) for place in DECODE_TRANSFER]
# A prefill worker that is caught there is needed no more: all of it is over there.
ARRIVED = ("verified", "acked")


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
@pytest.mark.parametrize(("kind", "place"), PLACES, ids=[f"{kind}-{place}".replace(" ", "-") for kind, place in PLACES])
def test_a_worker_falls_at_each_state_of_a_transfer(runner, world, tell, kind, place, number):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            before = made.num_prefills
            token = await town.arm(kind, f"transfer: {place}", number, film.media_id)
            preparing = asyncio.ensure_future(made.prepare())
            fallen = await made.hit(token, number)
            await preparing
            ready_s = time.monotonic() - made.hit_s
            await made.client.ask()
            if number == signal.SIGSTOP:
                fallen.signal(signal.SIGCONT)
            await made.client.ask()
            await made.client.ask()
            encoded = made.num_prefills - before
            if kind == "decode":
                assert encoded == 1, "the media was encoded again, though its maker lived"
            else:
                assert encoded <= (1 if place in ARRIVED else 2), "the media was encoded again, though it had arrived"
            tell(f"{kind} {signal.Signals(number).name} transfer {place}", f"media ready after {ready_s:.2f} s, {encoded} prefills")

    runner.run(main())
