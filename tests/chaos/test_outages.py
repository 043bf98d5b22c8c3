"""More than one worker falls, the registry is lost, a worker comes back under its old name and address."""

import asyncio
import signal
import time

import pytest

from sparsevila_cluster.core.errors import Unavailable
from tests.chaos.checked_clients import typed
from tests.chaos.kill_case import scene

SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
# What it may take to say that nobody is left: one call that is not answered, one silence, and the wait for a replacement.
ANSWER_S = 12.0


async def bring_back(town, fallen, number):
    if number == signal.SIGSTOP:
        for process in fallen:
            process.signal(signal.SIGCONT)
    await town.fill()


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
def test_without_decode_workers_clients_are_told_in_time_and_go_on_when_they_are_back(runner, world, tell, number):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            await made.neighbours_leave()
            fallen = list(town.pools["decode"].processes.values())
            for process in fallen:
                await made.strike(process, number)
            begun_s = time.monotonic()
            error = await typed(asyncio.ensure_future(made.client.ask()))
            told_s = time.monotonic() - begun_s
            assert isinstance(error, Unavailable) and told_s < ANSWER_S, (error, told_s)
            await bring_back(town, fallen, number)
            back_s = time.monotonic()
            await made.client.ask()
            await made.client.ask()
            assert made.num_prefills == before, "the media was encoded again, though a copy was kept"
            tell(
                f"all decodes {signal.Signals(number).name}",
                f"said so after {told_s:.2f} s, answered {time.monotonic() - back_s:.2f} s after they were back",
            )

    runner.run(main())


def test_a_decode_worker_that_is_replaced_soon_enough_is_waited_for(runner, world, tell):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            await made.neighbours_leave()
            for process in list(town.pools["decode"].processes.values()):
                await made.strike(process, signal.SIGKILL)
            asking = asyncio.ensure_future(made.client.ask())
            await asyncio.sleep(0.5)
            await town.fill()
            await asking
            assert made.num_prefills == before
            tell("all decodes SIGKILL, replaced after 0.5 s", f"answered after {time.monotonic() - made.hit_s:.2f} s")

    runner.run(main())


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
def test_without_prefill_workers_resident_media_are_answered_about(runner, world, tell, number):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            fallen = list(town.pools["prefill"].processes.values())
            for process in fallen:
                await made.strike(process, number)
            begun_s = time.monotonic()
            error = await typed(asyncio.ensure_future(made.prepare()))
            told_s = time.monotonic() - begun_s
            assert isinstance(error, Unavailable) and told_s < ANSWER_S, (error, told_s)
            await made.neighbours_go_on()
            await bring_back(town, fallen, number)
            await made.prepare()
            await made.client.ask()
            tell(f"all prefills {signal.Signals(number).name}", f"said so after {told_s:.2f} s")

    runner.run(main())


def test_the_registry_is_lost_and_comes_back_empty(runner, world, tell):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            town.registry.lose()
            await made.client.ask()
            await made.neighbours_go_on()
            town.registry.come_back()
            back_s = time.monotonic()
            await made.prepare()
            assert made.num_prefills == before, "a new registry had to learn what is resident"
            ready_s = time.monotonic() - back_s
            await town.until(lambda: made.holder("decode"), "a holder in the registry")
            await made.strike(made.holder("decode"), signal.SIGKILL)
            await made.client.ask()
            await made.client.ask()
            assert made.num_prefills == before
            tell("registry lost, back empty", f"media found after {ready_s:.2f} s; conversations outlived a decode worker")

    runner.run(main())


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_worker_is_restarted_under_its_old_name_and_address(runner, world, tell, kind):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            await town.until(lambda: made.holder("decode") and made.holder("prefill"), "both in the registry")
            fallen = made.holder(kind)
            address = (await fallen.ask("worker", "report", True)).address
            await made.strike(fallen, signal.SIGKILL)
            await town.bury(fallen.name)
            again = await town.spawn(kind, fallen.name, 0 if address is None else address.port)
            new = (await again.ask("worker", "report", True)).address
            assert address is None or (new.port, new.host) == (address.port, address.host) and new.token != address.token
            begun_s = time.monotonic()
            await made.client.ask()
            gap_s = time.monotonic() - begun_s
            assert made.num_prefills == before
            # All senders and receivers go on with the new one: away with the film, and everything once more.
            await made.client.close()
            await made.delete()
            await made.prepare()
            await made.client.ask()
            tell(f"{kind} restarted under its name and address", f"next answer took {gap_s:.2f} s")

    runner.run(main())


def test_the_sender_of_the_copy_dies_while_the_turn_of_a_dead_decode_worker_is_moved(runner, world, tell):
    town, film, other = world

    async def main():
        async with scene(town, film, other) as made:
            await made.prepare()
            await made.client.ask()
            before = made.num_prefills
            turn = made.client.next_turn()
            token = await town.arm("prefill", "transfer: first chunk", signal.SIGKILL, film.media_id)
            await town.until(lambda: made.holder("decode"), "a holder in the registry")
            holder = made.holder("decode")
            asking = asyncio.ensure_future(
                made.client.ask(turn, heard=lambda index: holder.signal(signal.SIGKILL) if index == 2 and holder.lives else None)
            )
            await made.hit(token, signal.SIGKILL)
            await asking
            await made.client.ask()
            assert made.num_prefills <= before + 1
            tell("decode, then the sender of the copy SIGKILL", f"went on after {time.monotonic() - made.hit_s:.2f} s")

    runner.run(main())
