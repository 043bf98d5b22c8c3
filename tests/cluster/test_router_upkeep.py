"""What a router does beside single calls: hot media, readiness, what it tells people, pressure, workers that are gone."""

import asyncio
import json

import pytest

from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.core.errors import BadRequest, Unavailable, WorkerLost
from sparsevila_cluster.core.requests import SamplingParams
from tests.cluster.scripted_cluster import NUM, QUESTIONS, ask, home, run_prepared, video
from tests.cluster.scripted_workers import conversation


def test_a_hot_prefix_is_sent_to_another_worker_in_the_background():
    async def scenario(cluster, router, key):
        first = cluster.decode.workers[home(cluster, key)]
        first.breakpoints.hold("token 2")
        running = [asyncio.create_task(ask(router, key, f"{i}?")) for i in range(3)]
        while len(router._clients.background) or len(first.running) < 3:
            await asyncio.sleep(0.01)
        assert all(key in worker.residents for worker in cluster.decodes) and cluster.num_encoded == 1
        _, name = await ask(router, key, "somewhere else?")
        assert ConversationToken.parse(name).worker != first.name
        first.breakpoints.free("token 2")
        await asyncio.gather(*running)

    run_prepared(scenario, decode={"replicas": 2, "replicate_after": 3})


@pytest.mark.parametrize("why", ["cold", "never", "no room"])
def test_a_prefix_stays_where_it_is_when_it_is(why):
    async def scenario(cluster, router, key):
        if why == "no room":
            for worker in cluster.decodes:
                worker.budget_bytes = 100 if key in worker.residents else 99
            cluster.report()
        await asyncio.gather(*(ask(router, key, f"{i}?") for i in range(2 if why == "cold" else 6)))
        await cluster.settled()
        assert sum(key in worker.residents for worker in cluster.decodes) == 1

    run_prepared(scenario, decode={"replicas": 2, "replicate_after": {"cold": 3, "never": 0, "no room": 3}[why]})


def test_it_tells_pools_media_lanes_and_load_as_plain_data():
    async def scenario(cluster, router, key):
        await ask(router, key, QUESTIONS[0])
        cluster.decode.stop("d1")
        cluster.report()
        info = json.loads(json.dumps(await router.info()))
        assert [one["worker"] for one in info["pools"]["decode"]] == ["d0", "d1"] and len(info["pools"]["prefill"]) == 2
        assert "did not answer" in info["pools"]["decode"][1]["info"]["error"]
        (media,) = info["media"]
        assert (media["media_id"], media["kv_bytes"], media["holders"], media["copies"]) == (key, 100, ["d0"], ["p0"])
        assert info["conversations"] == 1 and info["lanes"] and info["router"]["turns"] == 0

    run_prepared(scenario)


def test_it_is_ready_when_both_pools_are():
    async def scenario(cluster, router, key):
        assert await router.ready()
        for kill in ("p0", "p1"):
            cluster.kill(kill)
            cluster.directory.forget_worker(kill)
        assert not await router.ready()
        cluster.add_prefill("p2")
        cluster.report()
        assert await router.ready()
        cluster.directory_pool.kill("directory")
        assert not await router.ready()
        cluster.start_directory()
        cluster.report()
        assert await router.ready()
        await router.close()
        assert not await router.ready()
        with pytest.raises(Unavailable, match="closed"):
            await router.prepare(video())
        with pytest.raises(Unavailable, match="closed"):
            await ask(router, key, "what is it?")

    run_prepared(scenario)


def test_pressure_reaches_every_decode_worker_and_is_part_of_the_record():
    async def scenario(cluster, router, key):
        await router.set_brownout(0.5)
        assert [worker.brownout for worker in cluster.decodes] == [0.5, 0.5]
        answer, name = await ask(router, key, QUESTIONS[0])
        assert answer.token_ids == conversation(key, QUESTIONS, NUM, 0.5)[0]
        assert cluster.directory.history(ConversationToken.parse(name).base).records[0].brownout == 0.5
        with pytest.raises(BadRequest, match="brownout"):
            await router.set_brownout(2.0)

    run_prepared(scenario)


def test_a_worker_that_died_is_forgotten_by_every_router():
    async def scenario(cluster, router, key):
        lost = home(cluster, key)
        cluster.kill(lost)
        with pytest.raises(WorkerLost):
            await router._clients.decode(lost, router._short_call()).info()
        await cluster.settled()
        assert lost not in {one.worker for one in cluster.directory.snapshot().workers}
        answer, _ = await ask(cluster.router("other"), key, QUESTIONS[0], sampling=SamplingParams(max_tokens=NUM))
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[0]

    run_prepared(scenario)
