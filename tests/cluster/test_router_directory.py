"""Routers while the directory is away or has forgotten everything, and what is known of media."""

import asyncio
import time

import pytest

from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.core.errors import NotFound, Unavailable, WorkerLost
from tests.cluster.scripted_cluster import NUM, QUESTIONS, SETTLE_REPORTS, ask, holders, home, run, run_prepared, video
from tests.cluster.scripted_workers import conversation


def test_a_directory_that_is_away_is_said_in_time_and_filled_by_reports_when_it_is_back():
    async def scenario(cluster, router):
        first = await router.prepare(video())
        cluster.directory_pool.kill("directory")
        started_s = time.perf_counter()
        with pytest.raises(Unavailable, match="directory"):
            await router.prepare(video(b"another"))
        assert time.perf_counter() - started_s < 2
        cluster.start_directory()
        cluster.report()
        cluster.clock.now_s += SETTLE_REPORTS
        asked = cluster.prefill.num("key_of")
        assert (await router.prepare(video())).media_id == first.media_id
        assert cluster.num_encoded == 1 and cluster.prefill.num("key_of") == asked, "the router knew the key"
        assert (await cluster.router("other").prepare(video())).reused and cluster.num_encoded == 1

    run(scenario)


def test_a_directory_that_restarts_meanwhile_is_not_noticed():
    async def scenario(cluster, router):
        cluster.directory_pool.kill("directory")
        task = asyncio.create_task(router.prepare(video()))
        await asyncio.sleep(0.15)
        cluster.start_directory()
        cluster.report()
        cluster.clock.now_s += SETTLE_REPORTS
        assert holders(cluster, (await task).media_id)

    run(scenario)


def test_warm_turns_go_on_without_the_directory_which_hears_of_them_later():
    async def scenario(cluster, router, key):
        wanted = conversation(key, QUESTIONS, NUM)
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.directory_pool.kill("directory")
        assert (await ask(router, key, QUESTIONS[1], name))[0].token_ids == wanted[1]
        assert (await ask(router, key, QUESTIONS[0]))[0].token_ids == wanted[0], "a media that the router knows needs no directory"
        with pytest.raises(Unavailable, match="directory"):
            await ask(cluster.router("other"), key, QUESTIONS[1], name)
        cluster.start_directory()
        assert (await ask(router, key, QUESTIONS[2], name))[0].token_ids == wanted[2]
        cluster.report()
        assert [record.token_ids for record in cluster.directory.history(ConversationToken.parse(name).base).records] == wanted

    run_prepared(scenario)


def test_turns_are_recorded_late_rather_than_never():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])

        def fail(worker, method, args):
            if method == "record":
                raise WorkerLost("not now")

        cluster.directory_pool.before = fail
        _, name = await ask(router, key, QUESTIONS[1], name)
        assert len(cluster.directory.history(ConversationToken.parse(name).base).records) == 1
        tried = cluster.directory_pool.num("record")
        _, name = await ask(router, key, QUESTIONS[2], name)
        assert cluster.directory_pool.num("record") <= tried + 1, "every turn waits for a directory that is known to be away"
        cluster.directory_pool.before = None
        await cluster.settled()
        records = cluster.directory.history(ConversationToken.parse(name).base).records
        assert [record.token_ids for record in records] == conversation(key, QUESTIONS, NUM)

    run_prepared(scenario)


def test_a_worker_and_the_directory_lost_at_once_are_told_in_time():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.kill(home(cluster, key))
        cluster.directory_pool.kill("directory")
        started_s = time.perf_counter()
        with pytest.raises(Unavailable):
            await ask(router, key, QUESTIONS[1], name)
        assert time.perf_counter() - started_s < 3

    run_prepared(scenario)


def test_the_directory_may_restart_while_a_turn_is_recovered():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        for other in cluster.decodes:  # a second worker knows the conversation, as one that held it before a move
            other.chats.update(worker.chats)
        cluster.directory_pool.kill("directory")
        cluster.kill(worker.name)
        task = asyncio.create_task(ask(router, key, QUESTIONS[1], name))
        await asyncio.sleep(0.1)
        cluster.start_directory()
        cluster.report()
        cluster.clock.now_s += SETTLE_REPORTS
        answer, _ = await task
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1] and cluster.num_encoded == 1

    run_prepared(scenario)


# ---- what is known of media --------------------------------------------------------------------------------------------------


def test_media_tells_what_is_known_to_those_who_may_know():
    async def scenario(cluster, router):
        shared, private = await router.prepare(video()), await router.prepare(video(b"mine", tenant="me"))
        for tenant in ("", "me", "you"):
            assert (await router.media(shared.media_id, tenant)).kv_bytes == shared.kv_bytes
        assert (await router.media(private.media_id, "me")).media_id == private.media_id
        for key, tenant in ((private.media_id, "you"), (private.media_id, ""), ("0" * 64, "me")):
            with pytest.raises(NotFound, match="prepare it first"):
                await router.media(key, tenant)
            assert not await router.delete_media(key, tenant)
        assert holders(cluster, private.media_id)

    run(scenario)


def test_deleting_media_frees_every_copy():
    async def scenario(cluster, router):
        key = (await router.prepare(video())).media_id
        assert await router.delete_media(key) and not await router.delete_media(key)
        cluster.report()
        assert not holders(cluster, key) and not any(key in worker.copies for worker in cluster.prefill.workers.values())
        assert cluster.directory.list_media() == ()
        assert not (await router.prepare(video())).reused and cluster.num_encoded == 2

    run(scenario)


def test_what_a_new_directory_does_not_know_is_not_denied_nor_made_again_before_every_worker_could_report():
    async def scenario(cluster, router):
        key = (await router.prepare(video())).media_id
        cluster.directory_pool.kill("directory")
        cluster.start_directory()
        others = [cluster.router(f"r{i}") for i in range(3)]
        tasks = [others[0].media(key), others[1].prepare(video()), ask(others[2], key, QUESTIONS[0])]
        tasks = [asyncio.create_task(task) for task in tasks]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
        cluster.report()
        assert [await task for task in tasks[:2]] and (await tasks[2])[0].token_ids and cluster.num_encoded == 1
        cluster.clock.now_s += SETTLE_REPORTS

    run(scenario)


@pytest.mark.parametrize("lost", [False, True])
def test_no_router_falls_behind_what_a_client_has_heard_while_the_record_is_late(lost):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])

        def fail(worker, method, args):
            if method == "record":
                raise WorkerLost("not now")

        cluster.directory_pool.before = fail
        _, name = await ask(router, key, QUESTIONS[1], name)
        if lost:
            cluster.kill(ConversationToken.parse(name).worker)
        task = asyncio.create_task(ask(cluster.router("other"), key, QUESTIONS[2], name))
        await asyncio.sleep(0.2)
        assert task.done() != lost, "what was heard is missing in the directory, and must be waited for"
        cluster.directory_pool.before = None
        assert (await task)[0].token_ids == conversation(key, QUESTIONS, NUM)[2]

    run_prepared(scenario, router={"call_timeout_s": 3.0})
