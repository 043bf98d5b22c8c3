"""More than one worker fails, the directory is lost, a worker comes back under its old name and address."""

import asyncio
import signal
import time

import pytest

from sparsevila_cluster.core.errors import Unavailable
from tests.chaos.checked_clients import error_of
from tests.chaos.kill_case import kill_case

SIGNALS = [signal.SIGKILL, signal.SIGSTOP]
# What it may take to say that nobody is left: one call that is not answered, one silence, and the wait for a replacement.
ANSWER_S = 12.0


async def bring_back(cluster, hit_workers, number):
    if number == signal.SIGSTOP:
        for process in hit_workers:
            process.signal(signal.SIGCONT)
    await cluster.fill()


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
def test_without_decode_workers_clients_are_told_in_time_and_go_on_when_they_are_back(runner, world, note, number):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            await case.bystanders_leave()
            hit_workers = list(cluster.pools["decode"].processes.values())
            for process in hit_workers:
                await case.send_signal(process, number)
            begun_s = time.monotonic()
            error = await error_of(asyncio.ensure_future(case.client.ask()))
            told_s = time.monotonic() - begun_s
            assert isinstance(error, Unavailable) and told_s < ANSWER_S, (error, told_s)
            await bring_back(cluster, hit_workers, number)
            back_s = time.monotonic()
            await case.client.ask()
            await case.client.ask()
            assert case.num_prefills == before, "the media was encoded again, though a copy was kept"
            note(
                f"all decodes {signal.Signals(number).name}",
                f"said so after {told_s:.2f} s, answered {time.monotonic() - back_s:.2f} s after they were back",
            )

    runner.run(main())


def test_a_decode_worker_that_is_replaced_soon_enough_is_waited_for(runner, world, note):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            await case.bystanders_leave()
            for process in list(cluster.pools["decode"].processes.values()):
                await case.send_signal(process, signal.SIGKILL)
            asking = asyncio.ensure_future(case.client.ask())
            await asyncio.sleep(0.5)
            await cluster.fill()
            await asking
            assert case.num_prefills == before
            note("all decodes SIGKILL, replaced after 0.5 s", f"answered after {time.monotonic() - case.hit_s:.2f} s")

    runner.run(main())


@pytest.mark.parametrize("number", SIGNALS, ids=["killed", "stopped"])
def test_without_prefill_workers_resident_media_are_answered_about(runner, world, note, number):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            hit_workers = list(cluster.pools["prefill"].processes.values())
            for process in hit_workers:
                await case.send_signal(process, number)
            begun_s = time.monotonic()
            error = await error_of(asyncio.ensure_future(case.prepare()))
            told_s = time.monotonic() - begun_s
            assert isinstance(error, Unavailable) and told_s < ANSWER_S, (error, told_s)
            await case.bystanders_go_on()
            await bring_back(cluster, hit_workers, number)
            await case.prepare()
            await case.client.ask()
            note(f"all prefills {signal.Signals(number).name}", f"said so after {told_s:.2f} s")

    runner.run(main())


def test_the_directory_is_lost_and_comes_back_empty(runner, world, note):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            cluster.directory_pool.lose()
            await case.client.ask()
            await case.bystanders_go_on()
            cluster.directory_pool.come_back()
            back_s = time.monotonic()
            await case.prepare()
            assert case.num_prefills == before, "a new directory had to learn what is resident"
            ready_s = time.monotonic() - back_s
            await cluster.until(lambda: case.holder("decode"), "a holder in the directory")
            await case.send_signal(case.holder("decode"), signal.SIGKILL)
            await case.client.ask()
            await case.client.ask()
            assert case.num_prefills == before
            note("directory lost, back empty", f"media found after {ready_s:.2f} s; conversations outlived a decode worker")

    runner.run(main())


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_worker_is_restarted_under_its_old_name_and_address(runner, world, note, kind):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            await cluster.until(lambda: case.holder("decode") and case.holder("prefill"), "both in the directory")
            hit_worker = case.holder(kind)
            address = (await hit_worker.ask("host", "report", True)).address
            await case.send_signal(hit_worker, signal.SIGKILL)
            await cluster.remove(hit_worker.name)
            again = await cluster.spawn(kind, hit_worker.name, 0 if address is None else address.port)
            new = (await again.ask("host", "report", True)).address
            assert address is None or (new.port, new.host) == (address.port, address.host) and new.token != address.token
            begun_s = time.monotonic()
            await case.client.ask()
            gap_s = time.monotonic() - begun_s
            assert case.num_prefills == before
            # All senders and receivers go on with the new one: delete the clip, and do everything once more.
            await case.client.close()
            await case.delete()
            await case.prepare()
            await case.client.ask()
            note(f"{kind} restarted under its name and address", f"next answer took {gap_s:.2f} s")

    runner.run(main())


def test_the_sender_of_the_copy_dies_while_the_turn_of_a_dead_decode_worker_is_moved(runner, world, note):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other) as case:
            await case.prepare()
            await case.client.ask()
            before = case.num_prefills
            turn = case.client.next_turn()
            token = await cluster.arm("prefill", "transfer: first chunk", signal.SIGKILL, clip.media_id)
            await cluster.until(lambda: case.holder("decode"), "a holder in the directory")
            holder = case.holder("decode")
            asking = asyncio.ensure_future(
                case.client.ask(turn, heard=lambda index: holder.signal(signal.SIGKILL) if index == 2 and holder.lives else None)
            )
            await case.caught(token, signal.SIGKILL)
            await asking
            await case.client.ask()
            assert case.num_prefills <= before + 1
            note("decode, then the sender of the copy SIGKILL", f"went on after {time.monotonic() - case.hit_s:.2f} s")

    runner.run(main())
