"""Turns through a router while nobody fails: where they go, what is written down, and what they do not cost."""

import asyncio

import pytest

from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.core.errors import BadRequest, Cancelled, DeadlineExceeded, NotFound, QueueFull
from tests.cluster.scripted_cluster import NUM, QUESTIONS, ask, home, listen, run_prepared, turn, video
from tests.cluster.scripted_workers import conversation


def test_turns_go_straight_to_the_worker_of_the_conversation():
    async def scenario(cluster, router, key):
        await cluster.settled()
        wanted, name = conversation(key, QUESTIONS, NUM), ""
        for i, question in enumerate(QUESTIONS):
            directory, prefill = len(cluster.directory_pool.calls), len(cluster.prefill.calls)
            answer, name = await ask(router, key, question, name)
            assert answer.token_ids == wanted[i]
            asked = [method for _, method in cluster.directory_pool.calls[directory:]]
            assert asked == (["find", "open_conversation", "record"] if i == 0 else ["record"])
            assert len(cluster.prefill.calls) == prefill
            assert ConversationToken.parse(name) == ConversationToken(
                ConversationToken.parse(name).base, home(cluster, key), 0, i + 1
            )
        records = cluster.directory.history(ConversationToken.parse(name).base).records
        assert [(r.turn.question, r.token_ids) for r in records] == list(zip(QUESTIONS, wanted, strict=True))
        assert all((r.turn.replay, r.turn.after, r.turn.deadline_s) == (None, None, None) for r in records)

    run_prepared(scenario)


def test_a_turn_is_written_down_before_its_client_hears_the_end():
    async def scenario(cluster, router, key):
        name = ""
        async for event in router.ask(turn(key, "what is it?")):
            name = event.conversation_id or name
            journal = cluster.directory.history(ConversationToken.parse(name).base)
            assert event.kind == "accepted" or len(journal.records) == (event.kind == "done")

    run_prepared(scenario)


def test_conversations_of_many_clients_spread_over_the_holders_and_do_not_mix():
    async def scenario(cluster, router, key):
        other = next(worker for worker in cluster.decodes if worker.name != home(cluster, key))
        other.residents[key] = cluster.directory.media(key)
        cluster.report()

        async def client(i):
            wanted, name = conversation(key, [f"{i}: {question}" for question in QUESTIONS], NUM), ""
            for number, question in enumerate(QUESTIONS):
                answer, name = await ask(router, key, f"{i}: {question}", name)
                assert answer.token_ids == wanted[number]
            return ConversationToken.parse(name).worker

        homes = await asyncio.gather(*(client(i) for i in range(12)))
        assert sorted(map(homes.count, ("d0", "d1"))) == [6, 6]

    run_prepared(scenario)


def test_turns_of_one_conversation_wait_for_each_other():
    async def scenario(cluster, router, key):
        first, name = await ask(router, key, QUESTIONS[0])
        answers = await asyncio.gather(*(ask(router, key, question, name) for question in QUESTIONS[1:]))
        assert [first.token_ids, *(answer.token_ids for answer, _ in answers)] == conversation(key, QUESTIONS, NUM)
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        running = asyncio.create_task(ask(router, key, "a long one", name))
        await worker.breakpoints.reached("token 2")
        with pytest.raises(DeadlineExceeded, match="turns before"):
            await ask(router, key, "an impatient one", name, deadline_s=0.05)
        worker.breakpoints.free("token 2")
        await running

    run_prepared(scenario)


HINTS = ["", ".d0.0", ".d0.0-0", ".d0.0-1", ".d1.3-1", ".nobody.1-1", ".-1", ".d0", ".d0.x", ".a.b.c", "..", ".\x00.\ud800"]
HINTS += [".d0." + "9" * 50, ".d0.1-" + "9" * 50]
UNKNOWN = ["nothing", "0" * 32, "0" * 32 + ".d0.0", "0" * 32 + ".d0.0-3", "0" * 31 + ".d0.0", ".d0.0", "G" * 32, "\n" * 32]


@pytest.mark.parametrize("hint", HINTS)
def test_another_router_goes_on_with_a_conversation_whatever_stands_behind_its_name(hint):
    async def scenario(cluster, router, key):
        wanted, name = conversation(key, QUESTIONS, NUM), ""
        for i, question in enumerate(QUESTIONS):
            answer, name = await ask(
                cluster.router(f"r{i}"), key, question, ConversationToken.parse(name).base + hint if name else ""
            )
            assert answer.token_ids == wanted[i]
        assert cluster.num_encoded == 1

    run_prepared(scenario)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_conversation_that_nobody_knows_is_not_found(name):
    async def scenario(cluster, router, key):
        with pytest.raises(NotFound, match="is unknown"):
            await ask(router, key, "what is it?", name)
        assert len(router._conversations) == 0 and not await router.close_conversation(name)

    run_prepared(scenario)


def test_a_router_that_was_left_behind_by_another_one_catches_up():
    async def scenario(cluster, router, key):
        wanted = conversation(key, [*QUESTIONS, "and now?"], NUM)
        _, name = await ask(router, key, QUESTIONS[0])
        for question in QUESTIONS[1:]:
            await ask(cluster.router("other"), key, question, name)
        answer, _ = await ask(router, key, "and now?", name)
        assert answer.token_ids == wanted[3]

    run_prepared(scenario)


def test_conversations_and_media_of_other_tenants_look_as_if_there_were_none():
    async def scenario(cluster, router, key):
        mine = (await router.prepare(video(b"mine", tenant="me"))).media_id
        _, name = await ask(router, mine, "what is it?", tenant="me")
        _, public = await ask(router, key, "what is it?", tenant="me")
        for asker in (router, cluster.router("other")):
            for media_id, conversation_id in ((mine, name), (mine, ""), (key, public)):
                with pytest.raises(NotFound):
                    await ask(asker, media_id, "what is it?", conversation_id, tenant="you")
        assert cluster.decode.num("ship") == cluster.prefill.num("ship") == 0, "strangers cost the workers nothing"
        with pytest.raises(BadRequest, match="another media"):
            await ask(router, mine, "what is it?", public, tenant="me")
        assert (await ask(router, "", "and then?", name, tenant="me"))[0].token_ids

    run_prepared(scenario)


def test_media_that_nobody_prepared_are_asked_for():
    async def scenario(cluster, router, key):
        with pytest.raises(NotFound, match="prepare it first"):
            await ask(router, "0" * 64, "what is it?")
        assert len(router._conversations) == 0 and cluster.num_encoded == 1

    run_prepared(scenario)


def test_a_question_about_media_in_the_making_is_refused_and_does_not_spoil_it():
    async def scenario(cluster, router, key):
        worker = cluster.prefill.workers["p0"]
        request = video(b"a video 42")
        another = await worker.key_of(request)
        for maker in cluster.prefill.workers.values():
            maker.breakpoints.hold("encode")
        preparing = asyncio.create_task(router.prepare(request))
        asked = [asyncio.create_task(ask(router, another, "what is it?")) for _ in range(3)]
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(error, NotFound) for error in told) and not preparing.done()
        for maker in cluster.prefill.workers.values():
            maker.breakpoints.free("encode")
        assert (await preparing).media_id == another and (await ask(router, another, "what is it?"))[0].token_ids

    run_prepared(scenario)


def test_a_prefix_of_which_only_a_copy_is_left_is_shipped_first():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes:
            worker.drop(key)
        cluster.clock.now_s += 2
        cluster.report()
        answer, _ = await ask(cluster.router("other"), key, QUESTIONS[0])
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[0] and cluster.num_encoded == 1

    run_prepared(scenario)


@pytest.mark.parametrize("error", [BadRequest("too hot"), DeadlineExceeded("slow"), QueueFull("full", 2.0)], ids=repr)
def test_what_the_worker_says_of_the_turn_itself_is_told_at_once(error):
    async def scenario(cluster, router, key):
        cluster.decode.workers[home(cluster, key)].breakpoints.errors["ask"] = [error]
        with pytest.raises(type(error), match=str(error)):
            await ask(router, key, "what is it?")
        assert cluster.decode.num("ask") == 1
        await ask(router, key, "what is it?")

    run_prepared(scenario)


def test_a_new_conversation_goes_to_another_holder_when_one_is_full():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes:
            worker.residents[key] = cluster.directory.media(key)
        cluster.report()
        cluster.decode.workers["d0"].breakpoints.errors["ask"] = [QueueFull("full")]
        _, name = await ask(router, key, "what is it?")
        assert ConversationToken.parse(name).worker == "d1"

    run_prepared(scenario)


def test_leaving_a_stream_early_aborts_the_turn_and_the_conversation_goes_on_without_it():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        for last in ("accepted", "token", "done"):
            stream = router.ask(turn(key, "never mind", name))
            async for event in stream:
                if event.kind == last != "done":
                    break
            await stream.aclose()
            if last != "done":
                assert not any(worker.running for worker in cluster.decodes)
        answer, _ = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, [QUESTIONS[0], "never mind", QUESTIONS[1]], NUM)[2]

    run_prepared(scenario)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_turn_is_aborted_through_any_router(elsewhere):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        asked = turn(key, "never mind", name)
        task = asyncio.create_task(listen(router, asked))
        await worker.breakpoints.reached("token 2")
        aborter = cluster.router("other") if elsewhere else router
        assert await aborter.abort(asked.turn_id)
        with pytest.raises(Cancelled):
            await task
        assert not await aborter.abort(asked.turn_id) and not await aborter.abort("nobody's")
        worker.breakpoints.free("token 2")
        answer, _ = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run_prepared(scenario)


def test_a_turn_that_waits_for_its_conversation_can_be_aborted():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        running = asyncio.create_task(ask(router, key, QUESTIONS[1], name))
        await worker.breakpoints.reached("token 2")
        waiting = turn(key, "never mind", name)
        task = asyncio.create_task(listen(router, waiting))
        await asyncio.sleep(0.01)
        assert await router.abort(waiting.turn_id)
        worker.breakpoints.free("token 2")
        await running
        with pytest.raises(Cancelled):
            await task

    run_prepared(scenario)


def test_an_id_in_use_is_refused_for_another_conversation():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        running = asyncio.create_task(listen(router, turn(key, QUESTIONS[0], turn_id="mine")))
        await worker.breakpoints.reached("token 2")
        with pytest.raises(BadRequest, match="already in use"):
            await listen(router, turn(key, QUESTIONS[0], turn_id="mine"))
        worker.breakpoints.free("token 2")
        assert (await running)[-1].kind == "done"

    run_prepared(scenario)


def test_closing_a_conversation_frees_it_everywhere():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        assert await cluster.router("other").close_conversation(name)
        assert (
            not any(worker.chats for worker in cluster.decodes)
            and cluster.directory.history(ConversationToken.parse(name).base) is None
        )
        with pytest.raises(NotFound):
            await ask(cluster.router("third"), key, QUESTIONS[1], name)
        assert await router.close_conversation(name) is False

    run_prepared(scenario)


@pytest.mark.parametrize("how", ["cancelled", "refused"])
def test_a_turn_that_never_found_a_worker_leaves_nothing(how):
    async def scenario(cluster, router, key):
        unknown = "f" * 64
        if how == "cancelled":
            cluster.directory_pool.stop("directory")
        asking = asyncio.create_task(listen(router, turn(key if how == "cancelled" else unknown, "what?")))
        if how == "cancelled":
            await asyncio.sleep(0.05)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            cluster.directory_pool.go_on("directory")
        else:
            with pytest.raises(NotFound):
                await asking
        await cluster.settled()
        assert cluster.directory.snapshot().num_conversations == 0 and len(router._conversations) == 0

    run_prepared(scenario)


def test_media_in_use_is_not_deleted():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        running = asyncio.create_task(ask(router, key, QUESTIONS[0]))
        await worker.breakpoints.reached("token 2")
        assert not await router.delete_media(key) and key in worker.residents
        worker.breakpoints.free("token 2")
        await running
        assert await router.delete_media(key)
        with pytest.raises(NotFound):
            await ask(router, key, QUESTIONS[0])

    run_prepared(scenario)
