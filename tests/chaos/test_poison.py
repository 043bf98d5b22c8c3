"""A question and a media that kill real workers: two processes each, and the neighbours' streams go on."""

import signal

import pytest

from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import PoisonRequest
from tests.chaos.checked_clients import QUESTIONS, request_of, turn_of
from tests.chaos.kill_case import kill_case
from tests.media.clips import write_clip


async def kill_all_who(cluster, kind, place, mark):
    """Every worker of a pool dies at a place, not only the first one to come by."""
    for process in cluster.pools[kind].processes.values():
        token = cluster.forker.folder / f"poison-{process.name}-{mark[:8]}"
        await process.ask("host", "arm", place, signal.SIGKILL, mark, str(token))


async def two_are_dead(cluster, kind):
    """Of four. A connection ends a moment before its process."""
    processes = cluster.pools[kind].processes.values()
    await cluster.until(lambda: sum(not process.lives for process in processes) >= 2, "two that are dead")
    assert sum(process.lives for process in processes) == 2


async def shrink(cluster):
    """To the size that other cases expect."""
    for pool in cluster.pools.values():
        for name in list(pool.processes)[2:]:
            await cluster.remove(name)
    await cluster.fill()


@pytest.fixture(autouse=True)
def refuses_for_long(world):
    """The storm's cluster refuses for a short time only, lest bad luck fill it with refusals."""
    suspects = world[0].pipeline._clients.suspects
    before, suspects.refuse_s = suspects.refuse_s, 60.0
    yield
    suspects.refuse_s = before


@pytest.mark.parametrize("place", ["question", "later token"])
def test_a_question_kills_two_decode_workers_and_no_more(runner, world, note, place):
    cluster, clip, other = world

    async def main():
        async with kill_case(cluster, clip, other, num_decode=4) as case:
            await case.prepare()
            turn = turn_of(clip.media_id, f"{QUESTIONS[0]} {place}", "")
            await kill_all_who(cluster, "decode", f"turn: {place}", turn.turn_id)
            for asked in (turn, turn_of(clip.media_id, turn.question, "")):
                with pytest.raises(PoisonRequest):
                    async for _ in cluster.pipeline.ask(asked):
                        pass
                await two_are_dead(cluster, "decode")
            await case.bystanders_go_on()
            await case.client.ask()
            note(f"poison turn {place}", "two decode workers lost, bystanders and other questions answered")
        await shrink(cluster)

    runner.run(main())


def test_a_media_kills_two_prefill_workers_and_no_more(runner, world, note, tmp_path):
    cluster, clip, other = world
    request = request_of(write_clip(tmp_path / "deadly.mp4", seed=7))

    async def main():
        async with kill_case(cluster, clip, other, num_prefill=4) as case:
            first = next(iter(cluster.pools["prefill"].processes))
            key = await cluster.pipeline._clients.key_of(first, request, Deadline(20.0))
            await kill_all_who(cluster, "prefill", "transfer: reserved", key)
            for _ in range(2):
                with pytest.raises(PoisonRequest):
                    await cluster.pipeline.prepare(request)
                await two_are_dead(cluster, "prefill")
            await case.bystanders_go_on()
            await case.prepare()
            note("poison media", "two prefill workers lost, bystanders answered, other media prepared")
        await shrink(cluster)

    runner.run(main())
