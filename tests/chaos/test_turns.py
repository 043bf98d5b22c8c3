"""A worker is killed, or stops for a while, at each state of a turn: the stream goes on, and nothing is encoded again."""

import asyncio
import signal
import time

import pytest

from tests.chaos.kill_case import scene
from tests.chaos.kill_points import DECODE_TURN

SIGNALS = [signal.SIGKILL, signal.SIGSTOP]


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
@pytest.mark.parametrize("place", DECODE_TURN, ids=[place.replace(" ", "-") for place in DECODE_TURN])
def test_a_decode_worker_falls_at_each_state_of_a_turn(runner, world, tell, place, number):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            turn = made.client.next_turn()
            token = await town.arm("decode", f"turn: {place}", number, turn.turn_id)
            asking = asyncio.ensure_future(made.client.ask(turn))
            fallen = await made.hit(token, number)
            await asking
            gap_s = next(at_s for at_s in made.client.heard_s if at_s > made.hit_s) - made.hit_s
            if number == signal.SIGSTOP:
                fallen.signal(signal.SIGCONT)
            await made.client.ask()
            assert made.num_prefills == before, "the media was encoded again"
            tell(f"decode {signal.Signals(number).name} turn {place}", f"went on after {gap_s:.2f} s")

    runner.run(main())


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_worker_falls_between_two_turns(runner, world, tell, kind, number):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            await town.until(lambda: made.holder("decode") and made.holder("prefill"), "both in the registry")
            fallen = made.holder(kind)
            await made.strike(fallen, number)
            await made.client.ask()
            gap_s = time.monotonic() - made.hit_s
            if number == signal.SIGSTOP:
                fallen.signal(signal.SIGCONT)
            await made.client.ask()
            assert made.num_prefills == before, "the media was encoded again"
            tell(f"{kind} {signal.Signals(number).name} between turns", f"next answer after {gap_s:.2f} s")

    runner.run(main())


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
def test_a_prefill_worker_falls_in_mid_answer_and_nobody_notices(runner, world, tell, number):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            fallen = made.holder("prefill")
            await made.client.ask(heard=lambda index: fallen.signal(number) if index == 2 else None)
            await fallen.fallen(number)
            await made.client.ask()
            assert made.num_prefills == before and not town.sink.counts["turns_recovered_total",] > 1e9

    runner.run(main())
