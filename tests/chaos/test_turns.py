"""A worker is killed, or stops for a while, at each state of a turn: the stream goes on, and nothing is encoded again."""

import asyncio
import signal
import time

import pytest

from tests.chaos.kill_case import kill_case
from tests.chaos.kill_points import DECODE_TURN

SIGNALS = [signal.SIGKILL, signal.SIGSTOP]


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
@pytest.mark.parametrize("place", DECODE_TURN, ids=[place.replace(" ", "-") for place in DECODE_TURN])
def test_a_decode_worker_falls_at_each_state_of_a_turn(runner, world, note, place, number):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            turn = case.client.next_turn()
            token = await cluster.arm("decode", f"turn: {place}", number, turn.turn_id)
            asking = asyncio.ensure_future(case.client.ask(turn))
            hit_worker = await case.caught(token, number)
            await asking
            gap_s = next(at_s for at_s in case.client.heard_s if at_s > case.hit_s) - case.hit_s
            if number == signal.SIGSTOP:
                hit_worker.signal(signal.SIGCONT)
            await case.client.ask()
            assert case.num_prefills == before, "the media was encoded again"
            note(f"decode {signal.Signals(number).name} turn {place}", f"went on after {gap_s:.2f} s")

    runner.run(main())


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_worker_falls_between_two_turns(runner, world, note, kind, number):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            await cluster.until(lambda: case.holder("decode") and case.holder("prefill"), "both in the directory")
            hit_worker = case.holder(kind)
            await case.send_signal(hit_worker, number)
            await case.client.ask()
            gap_s = time.monotonic() - case.hit_s
            if number == signal.SIGSTOP:
                hit_worker.signal(signal.SIGCONT)
            await case.client.ask()
            assert case.num_prefills == before, "the media was encoded again"
            note(f"{kind} {signal.Signals(number).name} between turns", f"next answer after {gap_s:.2f} s")

    runner.run(main())


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
def test_a_prefill_worker_falls_in_mid_answer_and_nobody_notices(runner, world, note, number):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            hit_worker = case.holder("prefill")
            await case.client.ask(heard=lambda index: hit_worker.signal(number) if index == 2 else None)
            await hit_worker.wait_for_signal(number)
            await case.client.ask()
            assert case.num_prefills == before and not cluster.sink.counts["turns_recovered_total",] > 1e9

    runner.run(main())
