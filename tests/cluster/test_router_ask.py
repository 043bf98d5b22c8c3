"""Turns through a router while nobody fails: where they go, what is written down, and what they do not cost."""

import asyncio
import json
import uuid

import pytest

from sparsevila_cluster.cluster.conversations import Token
from sparsevila_cluster.errors import BadRequest, Cancelled, DeadlineExceeded, NotFound, QueueFull, Unavailable, WorkerLost
from sparsevila_cluster.request import Answer, SamplingParams, Turn
from tests.cluster.scripted import cluster_of, conversation, video

QUESTIONS = ("what is it?", "and then?", "is that all?")
NUM = 5


def run(scenario, *args, **fields):
    """`await scenario(cluster, router, key)` with one media prepared, within ten seconds and without a trace."""

    async def main():
        async with cluster_of(*args, **fields) as cluster:
            router = cluster.router()
            await scenario(cluster, router, (await router.prepare(video())).media_id)

    asyncio.run(asyncio.wait_for(main(), 10))


def turn(key, question, conversation_id="", **fields):
    fields = {"turn_id": uuid.uuid4().hex, "sampling": SamplingParams(max_tokens=NUM), **fields}
    return Turn(conversation_id=conversation_id, media_id=key, question=question, **fields)


async def listen(router, asked):
    return [event async for event in router.ask(asked)]


async def ask(router, key, question, conversation_id="", **fields):
    """(the whole answer, the conversation it belongs to)."""
    events = await listen(router, turn(key, question, conversation_id, **fields))
    assert [event.kind for event in events if event.kind != "token"][0] == "accepted" and events[-1].kind == "done"
    indices = [event.index for event in events if event.kind == "token"]
    assert indices == sorted(set(indices))
    return Answer.from_events(events), events[-1].conversation_id


def home(cluster, key):
    return next(worker.name for worker in cluster.decodes if key in worker.residents)


def test_turns_go_straight_to_the_worker_of_the_conversation():
    async def scenario(cluster, router, key):
        await cluster.settled()
        wanted, name = conversation(key, QUESTIONS, NUM), ""
        for i, question in enumerate(QUESTIONS):
            registry, prefill = len(cluster.registry.calls), len(cluster.prefill.calls)
            answer, name = await ask(router, key, question, name)
            assert answer.token_ids == wanted[i]
            asked = [method for _, method in cluster.registry.calls[registry:]]
            assert asked == (["find", "open_conversation", "record"] if i == 0 else ["record"]) and len(cluster.prefill.calls) == prefill
            assert Token.parse(name) == Token(Token.parse(name).base, home(cluster, key), 0)
        records = cluster.directory.history(Token.parse(name).base).records
        assert [record.token_ids for record in records] == wanted and [record.turn.question for record in records] == list(QUESTIONS)
        assert all((r.turn.replay, r.turn.after, r.turn.deadline_s) == (None, None, None) for r in records)

    run(scenario)


def test_a_turn_is_written_down_before_its_client_hears_the_end():
    async def scenario(cluster, router, key):
        async for event in router.ask(turn(key, "what is it?")):
            name = event.conversation_id or name
            assert (cluster.directory.history(Token.parse(name).base) is not None) or event.kind == "accepted"
            if event.kind == "done":
                assert len(cluster.directory.history(Token.parse(name).base).records) == 1

    run(scenario)


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
            return Token.parse(name).worker

        homes = await asyncio.gather(*(client(i) for i in range(12)))
        assert sorted(map(homes.count, ("d0", "d1"))) == [6, 6]

    run(scenario)


def test_turns_of_one_conversation_wait_for_each_other():
    async def scenario(cluster, router, key):
        first, name = await ask(router, key, QUESTIONS[0])
        answers = await asyncio.gather(*(ask(router, key, question, name) for question in QUESTIONS[1:]))
        assert [first.token_ids, *(answer.token_ids for answer, _ in answers)] == conversation(key, QUESTIONS, NUM)
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        running = asyncio.create_task(ask(router, key, "a long one", name))
        await worker.lever.reached("token 2")
        with pytest.raises(DeadlineExceeded, match="turns before"):
            await ask(router, key, "an impatient one", name, deadline_s=0.05)
        worker.lever.free("token 2")
        await running

    run(scenario)


@pytest.mark.parametrize("hint", ["", ".d0.0", ".d1.3", ".nobody.1", ".d0", ".d0.x", ".a.b.c", "..", ".\x00.\ud800", ".d0." + "9" * 50])
def test_another_router_goes_on_with_a_conversation_whatever_stands_behind_its_name(hint):
    async def scenario(cluster, router, key):
        wanted, name = conversation(key, QUESTIONS, NUM), ""
        for i, question in enumerate(QUESTIONS):
            answer, name = await ask(cluster.router(f"r{i}"), key, question, Token.parse(name).base + hint if name else "")
            assert answer.token_ids == wanted[i]
        assert cluster.num_encoded == 1

    run(scenario)


@pytest.mark.parametrize("name", ["nothing", "0" * 32, "0" * 32 + ".d0.0", "0" * 31 + ".d0.0", ".d0.0", "G" * 32, "0" * 33, "\n" * 32])
def test_a_conversation_that_nobody_knows_is_not_found(name):
    async def scenario(cluster, router, key):
        with pytest.raises(NotFound, match="is unknown"):
            await ask(router, key, "what is it?", name)
        assert len(router._conversations) == 0 and not await router.close_conversation(name)

    run(scenario)


def test_a_router_that_was_left_behind_by_another_one_catches_up():
    async def scenario(cluster, router, key):
        wanted = conversation(key, [*QUESTIONS, "and now?"], NUM)
        _, name = await ask(router, key, QUESTIONS[0])
        for question in QUESTIONS[1:]:
            await ask(cluster.router("other"), key, question, name)
        answer, _ = await ask(router, key, "and now?", name)
        assert answer.token_ids == wanted[3]

    run(scenario)


def test_conversations_and_media_of_other_tenants_look_as_if_there_were_none():
    async def scenario(cluster, router, key):
        mine = (await router.prepare(video(b"mine", tenant="me"))).media_id
        _, name = await ask(router, mine, "what is it?", tenant="me")
        _, public = await ask(router, key, "what is it?", tenant="me")
        for asker in (router, cluster.router("other")):
            for media_id, conversation_id in ((mine, name), (mine, ""), (key, public)):
                with pytest.raises(NotFound):
                    await ask(asker, media_id, "what is it?", conversation_id, tenant="you")
        assert cluster.decode.num("ask") == 2, "strangers cost the workers nothing"
        with pytest.raises(BadRequest, match="another media"):
            await ask(router, mine, "what is it?", public, tenant="me")
        assert (await ask(router, "", "and then?", name, tenant="me"))[0].token_ids

    run(scenario)


def test_media_that_nobody_prepared_are_asked_for():
    async def scenario(cluster, router, key):
        with pytest.raises(NotFound, match="prepare it first"):
            await ask(router, "0" * 64, "what is it?")
        assert len(router._conversations) == 0 and cluster.num_encoded == 1

    run(scenario)


def test_a_prefix_of_which_only_a_copy_is_left_is_shipped_first():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes:
            worker.drop(key)
        cluster.clock.now_s += 2
        cluster.report()
        answer, _ = await ask(cluster.router("other"), key, QUESTIONS[0])
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[0] and cluster.num_encoded == 1

    run(scenario)


@pytest.mark.parametrize("error", [BadRequest("too hot"), DeadlineExceeded("slow"), QueueFull("full", 2.0)], ids=repr)
def test_what_the_worker_says_of_the_turn_itself_is_told_at_once(error):
    async def scenario(cluster, router, key):
        cluster.decode.workers[home(cluster, key)].lever.errors["ask"] = [error]
        with pytest.raises(type(error), match=str(error)):
            await ask(router, key, "what is it?")
        assert cluster.decode.num("ask") == 1
        await ask(router, key, "what is it?")

    run(scenario)


def test_a_new_conversation_goes_to_another_holder_when_one_is_full():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes:
            worker.residents[key] = cluster.directory.media(key)
        cluster.report()
        cluster.decode.workers["d0"].lever.errors["ask"] = [QueueFull("full")]
        _, name = await ask(router, key, "what is it?")
        assert Token.parse(name).worker == "d1"

    run(scenario)


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

    run(scenario)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_turn_is_aborted_through_any_router(elsewhere):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        asked = turn(key, "never mind", name)
        task = asyncio.create_task(listen(router, asked))
        await worker.lever.reached("token 2")
        aborter = cluster.router("other") if elsewhere else router
        assert await aborter.abort(asked.turn_id)
        with pytest.raises(Cancelled):
            await task
        assert not await aborter.abort(asked.turn_id) and not await aborter.abort("nobody's")
        worker.lever.free("token 2")
        answer, _ = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run(scenario)


def test_a_turn_that_waits_for_its_conversation_can_be_aborted():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        running = asyncio.create_task(ask(router, key, QUESTIONS[1], name))
        await worker.lever.reached("token 2")
        waiting = turn(key, "never mind", name)
        task = asyncio.create_task(listen(router, waiting))
        await asyncio.sleep(0.01)
        assert await router.abort(waiting.turn_id)
        worker.lever.free("token 2")
        await running
        with pytest.raises(Cancelled):
            await task

    run(scenario)


def test_an_id_in_use_is_refused_for_another_conversation():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        running = asyncio.create_task(listen(router, turn(key, QUESTIONS[0], turn_id="mine")))
        await worker.lever.reached("token 2")
        with pytest.raises(BadRequest, match="already in use"):
            await listen(router, turn(key, QUESTIONS[0], turn_id="mine"))
        worker.lever.free("token 2")
        assert (await running)[-1].kind == "done"

    run(scenario)


def test_closing_a_conversation_frees_it_everywhere():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        assert await cluster.router("other").close_conversation(name)
        assert not any(worker.chats for worker in cluster.decodes) and cluster.directory.history(Token.parse(name).base) is None
        with pytest.raises(NotFound):
            await ask(cluster.router("third"), key, QUESTIONS[1], name)
        assert await router.close_conversation(name) is False

    run(scenario)


def test_media_in_use_is_not_deleted():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        running = asyncio.create_task(ask(router, key, QUESTIONS[0]))
        await worker.lever.reached("token 2")
        assert not await router.delete_media(key) and key in worker.residents
        worker.lever.free("token 2")
        await running
        assert await router.delete_media(key)
        with pytest.raises(NotFound):
            await ask(router, key, QUESTIONS[0])

    run(scenario)


# ---- hot media ---------------------------------------------------------------------------------------------------------------


def test_a_hot_prefix_is_sent_to_another_worker_in_the_background():
    async def scenario(cluster, router, key):
        first = cluster.decode.workers[home(cluster, key)]
        first.lever.hold("token 2")
        running = [asyncio.create_task(ask(router, key, f"{i}?")) for i in range(3)]
        while len(router._fleet.errands) or len(first.running) < 3:
            await asyncio.sleep(0.01)
        assert all(key in worker.residents for worker in cluster.decodes) and cluster.num_encoded == 1
        _, name = await ask(router, key, "somewhere else?")
        assert Token.parse(name).worker != first.name
        first.lever.free("token 2")
        await asyncio.gather(*running)

    run(scenario, decode={"replicas": 2, "replicate_after": 3})


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

    run(scenario, decode={"replicas": 2, "replicate_after": {"cold": 3, "never": 0, "no room": 3}[why]})


# ---- without the registry, and the rest --------------------------------------------------------------------------------------


def test_warm_turns_go_on_without_the_registry_which_hears_of_them_later():
    async def scenario(cluster, router, key):
        wanted = conversation(key, QUESTIONS, NUM)
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.registry.kill("registry")
        assert (await ask(router, key, QUESTIONS[1], name))[0].token_ids == wanted[1]
        assert (await ask(router, key, QUESTIONS[0]))[0].token_ids == wanted[0], "a media that the router knows needs no registry"
        with pytest.raises(Unavailable, match="registry"):
            await ask(cluster.router("other"), key, QUESTIONS[1], name)
        cluster.start_registry()
        assert (await ask(router, key, QUESTIONS[2], name))[0].token_ids == wanted[2]
        cluster.report()
        assert [record.token_ids for record in cluster.directory.history(Token.parse(name).base).records] == wanted

    run(scenario)


def test_turns_are_recorded_late_rather_than_never():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])

        def fail(worker, method, args):
            if method == "record":
                raise WorkerLost("not now")

        cluster.registry.before = fail
        _, name = await ask(router, key, QUESTIONS[1], name)
        assert len(cluster.directory.history(Token.parse(name).base).records) == 1
        cluster.registry.before = None
        _, name = await ask(router, key, QUESTIONS[2], name)
        records = cluster.directory.history(Token.parse(name).base).records
        assert [record.token_ids for record in records] == conversation(key, QUESTIONS, NUM)

    run(scenario)


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

    run(scenario)


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
        cluster.registry.kill("registry")
        assert not await router.ready()
        cluster.start_registry()
        cluster.report()
        assert await router.ready()
        await router.close()
        assert not await router.ready()
        with pytest.raises(Unavailable, match="closed"):
            await router.prepare(video())
        with pytest.raises(Unavailable, match="closed"):
            await ask(router, key, "what is it?")

    run(scenario)


def test_pressure_reaches_every_decode_worker_and_is_part_of_the_record():
    async def scenario(cluster, router, key):
        await router.set_brownout(0.5)
        assert [worker.brownout for worker in cluster.decodes] == [0.5, 0.5]
        answer, name = await ask(router, key, QUESTIONS[0])
        assert answer.token_ids == conversation(key, QUESTIONS, NUM, 0.5)[0]
        assert cluster.directory.history(Token.parse(name).base).records[0].brownout == 0.5
        with pytest.raises(BadRequest, match="brownout"):
            await router.set_brownout(2.0)

    run(scenario)
