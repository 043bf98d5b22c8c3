"""Preparing media through a router: found, shipped or made once, whoever fails, and nothing left over."""

import asyncio
import time

import pytest

from sparsevila_cluster.core.errors import (
    BadMedia,
    DataLoss,
    DeadlineExceeded,
    Incompatible,
    Internal,
    LaneLost,
    QueueFull,
    TooLarge,
    Unavailable,
    WorkerLost,
)
from tests.cluster.scripted_cluster import holders, run, until, video

# ---- found -------------------------------------------------------------------------------------------------------------------


def test_it_is_made_once_and_then_found_without_a_call_to_the_prefill_pool():
    async def scenario(cluster, router):
        heard = []
        first = await router.prepare(video(), lambda *words: heard.append(words))
        assert not first.reused and first.ms and heard == [("decode", 0, 1), ("prefill", 0, 1), ("prefill", 1, 1)]
        assert len(holders(cluster, first.media_id)) == 1 and cluster.num_encoded == 1
        asked = len(cluster.prefill.calls)
        for other in (router, cluster.router("other")):
            again = await other.prepare(video())
            assert again.media_id == first.media_id and again.reused and again.ms == {}
        assert len(cluster.prefill.calls) == asked and cluster.count("media_kv_hits_total") == 2
        for name in ("p0", "p1"):
            cluster.kill(name)
        assert (await router.prepare(video())).reused, "media that are resident need no prefill pool"

    run(scenario)


def test_other_words_for_the_same_media_lead_to_the_same_prefix():
    async def scenario(cluster, router):
        first = await router.prepare(video())
        assert (await router.prepare(video(prune_keep=0.25))).media_id == first.media_id and cluster.num_encoded == 1
        assert (await router.prepare(video(prune_keep=0.5))).media_id != first.media_id
        assert (await router.prepare(video(b"another"))).media_id != first.media_id
        assert (await router.prepare(video(tenant="someone"))).media_id != first.media_id
        assert cluster.num_encoded == 4 and cluster.prefill.num("key_of") == 5

    run(scenario)


@pytest.mark.parametrize("num_routers", [1, 3])
def test_callers_at_the_same_time_share_one_prefill(num_routers):
    async def scenario(cluster, router):
        routers = [router, *(cluster.router(f"r{i}") for i in range(1, num_routers))]
        for worker in cluster.prefill.workers.values():
            worker.breakpoints.hold("encode")
        tasks = [asyncio.create_task(routers[i % num_routers].prepare(video(prune_keep=[None, 0.25][i % 2]))) for i in range(8)]
        asked, claimed = cluster.prefill, cluster.directory_pool
        await until(lambda: asked.num("key_of") == 2 * num_routers and claimed.num("claim") >= num_routers and asked.num("make"))
        assert cluster.prefill.num("make") == 1
        for worker in cluster.prefill.workers.values():
            worker.breakpoints.free("encode")
        handles = await asyncio.gather(*tasks)
        assert cluster.num_encoded == 1 and len({handle.media_id for handle in handles}) == 1
        assert sum(not handle.reused for handle in handles) == 1

    run(scenario)


def test_a_copy_is_shipped_rather_than_made_again():
    async def scenario(cluster, router):
        key = (await router.prepare(video())).media_id
        for worker in cluster.decodes:
            worker.drop(key)
        cluster.clock.now_s += 2  # what the router saw arrive gives way to what the worker reports
        cluster.report()
        handle = await router.prepare(video())
        assert handle.reused and holders(cluster, key) and cluster.num_encoded == 1 and cluster.prefill.num("ship") == 1

    run(scenario)


def test_prefixes_spread_by_load_and_free_bytes():
    async def scenario(cluster, router):
        keys = []
        for i in range(4):
            keys.append((await router.prepare(video(b"%d" % i))).media_id)
            cluster.report()
        assert [len(worker.residents) for worker in cluster.decodes] == [2, 2]

    run(scenario)


# ---- failing -----------------------------------------------------------------------------------------------------------------

FIRST_AT = {  # where the first attempt fails, how, and how often the media is encoded until it is there
    "decode gone": ("decode", "reserve", WorkerLost("gone"), 1),
    "decode full": ("decode", "reserve", QueueFull("full"), 1),
    "decode closing": ("decode", "reserve", Unavailable("closing"), 1),
    "decode of another model": ("decode", "reserve", Incompatible("other"), 1),
    "maker gone": ("prefill", "make", WorkerLost("gone"), 1),
    "maker full": ("prefill", "make", QueueFull("full"), 1),
    "maker closing": ("prefill", "encode", Unavailable("closing"), 1),
    "maker gone at the end": ("prefill", "send", WorkerLost("gone"), 2),
    "lane lost": ("prefill", "send", LaneLost("broke"), 1),
    "bytes lost": ("prefill", "send", DataLoss("flipped"), 1),
    "no room at the receiver": ("prefill", "send", QueueFull("full"), 1),
    "lane of another version": ("prefill", "send", Incompatible("other"), 1),
    "lane too slow": ("prefill", "send", DeadlineExceeded("slow"), 1),
}


@pytest.mark.parametrize("case", FIRST_AT)
def test_another_worker_does_it_and_nothing_is_encoded_twice_for_a_lane(case):
    pool, point, error, num_encoded = FIRST_AT[case]

    async def scenario(cluster, router):
        first = getattr(cluster, pool).workers[pool[0] + "0"]
        first.breakpoints.errors[point] = [error]
        handle = await router.prepare(video())
        assert holders(cluster, handle.media_id) and cluster.num_encoded == num_encoded
        assert not first.breakpoints.errors[point], "the first attempt did not go where it should fail"
        if pool == "decode" or point == "send" and not isinstance(error, WorkerLost):
            assert holders(cluster, handle.media_id) == ["d1"], "it went again to the worker that failed"

    run(scenario)


@pytest.mark.parametrize("point", ["make", "encode", "send"])
def test_a_maker_that_is_killed_is_replaced_by_another(point):
    async def scenario(cluster, router):
        cluster.prefill.workers["p0"].breakpoints.hold(point)
        task = asyncio.create_task(router.prepare(video()))
        await cluster.prefill.workers["p0"].breakpoints.reached(point)
        cluster.kill("p0")
        assert holders(cluster, (await task).media_id)
        assert "p0" not in [one.worker for one in cluster.directory.snapshot().workers]

    run(scenario)


def test_a_decode_worker_that_dies_while_media_are_made_costs_no_second_encoding():
    async def scenario(cluster, router):
        cluster.prefill.workers["p0"].breakpoints.hold("encode")
        task = asyncio.create_task(router.prepare(video()))
        await cluster.prefill.workers["p0"].breakpoints.reached("encode")
        (target,) = [worker.name for worker in cluster.decodes if worker.reserved]
        cluster.kill(target)
        cluster.prefill.workers["p0"].breakpoints.free("encode")
        handle = await task
        assert cluster.num_encoded == 1 and holders(cluster, handle.media_id) == [cluster.decodes[0].name]
        assert not handle.reused, "it was made for this caller, whoever sent it in the end"

    run(scenario)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_a_stopped_worker_is_passed_over_in_time(pool):
    async def scenario(cluster, router):
        asked, stopped = getattr(cluster, pool), pool[0] + "0"
        asked.stop(stopped)
        handle = await router.prepare(video())
        assert handle.media_id and cluster.num_encoded == 1
        before = [worker for worker, _ in asked.calls].count(stopped)
        await router.prepare(video(b"another"))
        assert before and [worker for worker, _ in asked.calls].count(stopped) == before, "it was asked again while it cools"

    # A key is read from whole files: its deadline is that of reading, here a short one.
    run(scenario, engine={"decode_timeout_s": 0.5, "max_frames": 8})


@pytest.mark.parametrize("error", [BadMedia("broken"), TooLarge("too long"), Internal("a bug")], ids=repr)
def test_what_is_the_users_is_told_at_once(error):
    async def scenario(cluster, router):
        cluster.prefill.workers["p0"].breakpoints.errors["encode"] = [error]
        with pytest.raises(type(error), match=str(error)):
            await router.prepare(video())
        assert cluster.prefill.num("make") == 1

    run(scenario)


@pytest.mark.parametrize("error", [QueueFull("full", 3.0), Unavailable("closing"), WorkerLost("gone")], ids=repr)
def test_attempts_are_bounded_and_the_last_error_is_told(error):
    async def scenario(cluster, router):
        for worker in cluster.decodes:
            worker.breakpoints.errors["reserve"] = [error] * 10
        with pytest.raises(Unavailable if isinstance(error, WorkerLost) else type(error)) as caught:
            await router.prepare(video())
        assert cluster.decode.num("reserve") == 3 and cluster.num_encoded == 0
        assert not isinstance(error, QueueFull) or caught.value.retry_after_s == 3.0

    run(scenario, num_decode=5, router={"max_attempts": 3})


def test_an_empty_pool_is_said_at_once():
    async def scenario(cluster, router):
        started_s = time.perf_counter()
        with pytest.raises(Unavailable, match="no decode worker"):
            await router.prepare(video())
        assert time.perf_counter() - started_s < 2.5

    run(scenario, num_decode=0, router={"call_timeout_s": 5.0})

    async def no_maker(cluster, router):
        with pytest.raises(Unavailable, match="no prefill worker"):
            await router.prepare(video())

    run(no_maker, num_prefill=0)


def test_the_replacement_of_the_only_worker_is_waited_for():
    async def scenario(cluster, router):
        cluster.decodes[0].breakpoints.hold("reserve")
        task = asyncio.create_task(router.prepare(video()))
        await cluster.decodes[0].breakpoints.reached("reserve")
        cluster.kill("d0")
        await asyncio.sleep(0.1)
        cluster.add_decode("d9")
        cluster.report()
        assert holders(cluster, (await task).media_id) == ["d9"]

    run(scenario, num_decode=1, router={"call_timeout_s": 2.0})


@pytest.mark.parametrize("point", ["make", "encode", "send"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "progress"])
def test_whoever_gives_up_frees_both_sides(point, how):
    async def scenario(cluster, router):
        maker = cluster.prefill.workers["p0"]
        maker.breakpoints.hold(point)

        def progress(stage, done, total):
            if how == "progress":
                raise Unavailable("the server is closed")

        if how == "progress":
            maker.breakpoints.free(point)
            with pytest.raises(Unavailable, match="server"):
                await router.prepare(video(), progress)
        else:
            task = asyncio.create_task(router.prepare(video(deadline_s=0.2 if how == "deadline" else None), progress))
            await maker.breakpoints.reached(point)
            assert any(worker.reserved for worker in cluster.decodes)
            if how == "cancel":
                task.cancel()
            with pytest.raises(asyncio.CancelledError if how == "cancel" else DeadlineExceeded):
                await task
            maker.breakpoints.free(point)
        await cluster.settled()
        assert (await router.prepare(video())).media_id, "what was given up is in the way"

    run(scenario)


def test_one_who_waits_goes_on_when_the_maker_gives_up():
    async def scenario(cluster, router):
        cluster.prefill.workers["p0"].breakpoints.hold("encode")
        impatient = asyncio.create_task(router.prepare(video()))
        await cluster.prefill.workers["p0"].breakpoints.reached("encode")
        patient = asyncio.create_task(router.prepare(video()))
        elsewhere = asyncio.create_task(cluster.router("other").prepare(video()))
        await asyncio.sleep(0.05)
        impatient.cancel()
        await asyncio.sleep(0.01)
        cluster.prefill.workers["p0"].breakpoints.free("encode")
        one, two = await asyncio.gather(patient, elsewhere)
        assert one.media_id == two.media_id and cluster.num_encoded == 1

    run(scenario)


def test_a_claim_of_a_router_that_died_runs_out():
    async def scenario(cluster, router):
        key = await cluster.prefill.workers["p0"].key_of(video())
        cluster.directory.claim(key, "a router that died", 30.0)
        task = asyncio.create_task(router.prepare(video()))
        await asyncio.sleep(0.2)
        assert not task.done() and cluster.prefill.num("make") == 0
        for _ in range(31):
            cluster.clock.now_s += 1
            cluster.report()
        assert (await task).media_id == key

    run(scenario)
