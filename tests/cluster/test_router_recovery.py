"""Turns whose worker is lost: the same tokens from another one, the media encoded once, and every error a typed one in time."""

import asyncio
import random
import time

import pytest

from sparsevila_cluster.cluster.conversations import Token
from sparsevila_cluster.errors import BadRequest, Cancelled, LaneLost, NotFound, QueueFull, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.request import Answer, MediaSource, PrepareRequest, Replay, SamplingParams
from tests.cluster.scripted import Cluster, cluster_of, conversation, video
from tests.cluster.test_router_ask import NUM, QUESTIONS, ask, home, listen, run, turn

POINTS = ["ask", *(f"token {i}" for i in range(NUM)), "done"]


def checked(events, key, number=0, question=None):
    """The answer of one stream that was told as if nothing had happened."""
    kinds = [event.kind for event in events]
    assert kinds[0] == "accepted" and kinds[-1] == "done" and kinds.count("accepted") == kinds.count("done") == 1
    assert kinds.count("evidence") <= 1
    assert [event.index for event in events if event.kind == "token"] == list(range(NUM))
    answer = Answer.from_events(events)
    questions = QUESTIONS if question is None else [question]
    assert answer.token_ids == conversation(key, questions, NUM)[number]
    assert answer.text == "".join(f"{token} " for token in answer.token_ids)
    return answer


@pytest.mark.parametrize("how", ["kill", "stop", "closing"])
@pytest.mark.parametrize("point", POINTS)
def test_a_stream_goes_on_where_it_stood_when_its_worker_is_lost(point, how):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        if how == "closing":
            worker.lever.errors[point] = [Unavailable("closing")]
            task = asyncio.create_task(listen(router, turn(key, QUESTIONS[1], name, want_evidence=True)))
        else:
            worker.lever.hold(point)
            task = asyncio.create_task(listen(router, turn(key, QUESTIONS[1], name, want_evidence=True)))
            await worker.lever.reached(point)
            if how == "kill":
                cluster.kill(worker.name)
            else:
                cluster.decode.stop(worker.name)
        events = await task
        checked(events, key, 1)
        assert cluster.num_encoded == 1 and cluster.count("turns_recovered_total") == 1
        moved = Token.parse(events[-1].conversation_id)
        assert moved.worker != worker.name and moved.epoch == 1 and moved.base == Token.parse(name).base
        if how == "stop":
            cluster.decode.go_on(worker.name)
            worker.lever.free(point)
        answer, _ = await ask(router, key, QUESTIONS[2], str(moved))
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[2] and cluster.count("turns_recovered_total") == 1

    run(scenario)


def test_it_goes_on_under_the_pressure_that_it_began_under():
    async def scenario(cluster, router, key):
        await router.set_brownout(0.5)
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        task = asyncio.create_task(ask(router, key, QUESTIONS[0]))
        await worker.lever.reached("token 2")
        await router.set_brownout(0.0)
        cluster.kill(worker.name)
        answer, name = await task
        assert answer.token_ids == conversation(key, QUESTIONS, NUM, 0.5)[0] and answer.usage.brownout == 0.5

    run(scenario)


def test_workers_may_be_lost_one_after_the_other():
    async def scenario(cluster, router, key):
        task = asyncio.create_task(listen(router, turn(key, QUESTIONS[0])))
        for i in range(3):
            for worker in cluster.decodes:
                worker.lever.hold(f"token {i}")
            while not any(worker.running for worker in cluster.decodes):
                await asyncio.sleep(0.01)
            (worker,) = [worker for worker in cluster.decodes if worker.running]
            await worker.lever.reached(f"token {i}")
            cluster.kill(worker.name)
            for worker in cluster.decodes:
                worker.lever.free(f"token {i}")
        events = await task
        checked(events, key)
        assert Token.parse(events[-1].conversation_id).epoch == 3 and cluster.num_encoded == 1
        assert cluster.count("turns_recovered_total") == 1

    run(scenario, num_decode=4)


def test_attempts_are_bounded():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes:
            worker.lever.errors["token 1"] = [Unavailable("closing")] * 9
        with pytest.raises(Unavailable, match="closing"):
            await ask(router, key, QUESTIONS[0])
        assert cluster.decode.num("ask") == 3

    run(scenario, num_decode=5, router={"max_attempts": 3})


@pytest.mark.parametrize("error", [BadRequest("no"), QueueFull("full"), Cancelled("aborted")], ids=repr)
def test_what_is_no_loss_is_told_also_in_mid_answer(error):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.decode.workers[home(cluster, key)].lever.errors["token 3"] = [error]
        with pytest.raises(type(error)):
            await ask(router, key, QUESTIONS[1], name)
        assert cluster.decode.num("ask") == 2 and not cluster.count("turns_recovered_total")
        answer, _ = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run(scenario)


def test_a_lost_lane_is_another_workers_chance():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.errors["token 3"] = [LaneLost("out of reach")]
        events = await listen(router, turn(key, QUESTIONS[0]))
        checked(events, key)
        assert not worker.running and home(cluster, key) == worker.name, "it lives, and keeps its prefix"

    run(scenario)


def test_clients_that_lose_the_same_worker_share_the_way_back():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("token 2")
        tasks = [asyncio.create_task(listen(router, turn(key, f"{i}?"))) for i in range(8)]
        await worker.lever.reached("token 2")
        await asyncio.sleep(0.05)
        cluster.kill(worker.name)
        for i, task in enumerate(tasks):
            checked(await task, key, 0, f"{i}?")
        assert cluster.prefill.num("ship") == 1 and cluster.num_encoded == 1 and cluster.count("turns_recovered_total") == 8

    run(scenario)


# ---- what was forgotten ------------------------------------------------------------------------------------------------------


def test_an_evicted_conversation_is_made_again_where_it_was():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.chats.clear()
        answer, moved = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1] and moved == name and worker.num_replayed == 1
        assert cluster.prefill.num("ship") == 0 and not cluster.count("turns_recovered_total")

    run(scenario)


@pytest.mark.parametrize("reported", [False, True])
def test_an_evicted_prefix_is_shipped_again(reported):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        for worker in cluster.decodes:
            worker.residents.clear()
        if reported:
            cluster.clock.now_s += 2
            cluster.report()
        for question, conversation_id, number in ((QUESTIONS[1], name, 1), (QUESTIONS[0], "", 0)):
            answer, _ = await ask(router, key, question, conversation_id)
            assert answer.token_ids == conversation(key, QUESTIONS, NUM)[number]
        assert cluster.num_encoded == 1

    run(scenario)


def lose_everything(cluster, key):
    """The prefix and every copy of it."""
    for worker in (*cluster.decodes, *cluster.prefill.workers.values()):
        worker.drop(key)
    cluster.clock.now_s += 2
    cluster.report()


def test_media_lost_with_every_copy_are_made_again_by_a_router_that_remembers_how():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        lose_everything(cluster, key)
        answer, name = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1] and cluster.num_encoded == 2
        lose_everything(cluster, key)
        with pytest.raises((Unavailable, NotFound), match="prepare it"):
            await ask(cluster.router("other"), key, QUESTIONS[2], name)

    run(scenario)


@pytest.mark.parametrize(("change", "error"), [("other", NotFound), ("gone", Unavailable)])
def test_media_whose_source_has_changed_or_gone_can_not_be_made_again(change, error, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(video().sources[0].data)

    async def main():
        async with cluster_of() as cluster:
            router = cluster.router()
            key = (await router.prepare(PrepareRequest((MediaSource(str(path), "video"),)))).media_id
            _, name = await ask(router, key, QUESTIONS[0])
            lose_everything(cluster, key)
            if change == "gone":
                path.unlink()
            else:
                path.write_bytes(video(b"another").sources[0].data)
            with pytest.raises(error):
                await ask(router, key, QUESTIONS[1], name)
            assert cluster.num_encoded == 1

    async def with_real_keys():
        from sparsevila_cluster.cluster.preparing import digest_of
        from tests.cluster import scripted

        config = Cluster().config.engine
        original = scripted.ScriptedPrefill.key_of
        scripted.ScriptedPrefill.key_of = lambda self, request: asyncio.to_thread(digest_of, request, config)
        try:
            await main()
        finally:
            scripted.ScriptedPrefill.key_of = original

    asyncio.run(asyncio.wait_for(with_real_keys(), 10))


def test_a_conversation_whose_text_is_lost_too_is_not_found():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.directory.forget_conversation(Token.parse(name).base)
        cluster.kill(home(cluster, key))
        with pytest.raises(NotFound, match="text of conversation"):
            await ask(router, key, QUESTIONS[1], name)

    run(scenario)


def test_a_worker_and_the_registry_lost_at_once_are_told_in_time():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.kill(home(cluster, key))
        cluster.registry.kill("registry")
        started_s = time.perf_counter()
        with pytest.raises(Unavailable):
            await ask(router, key, QUESTIONS[1], name)
        assert time.perf_counter() - started_s < 3

    run(scenario)


def test_the_registry_may_restart_while_a_turn_is_recovered():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        for other in cluster.decodes:  # a second worker knows the conversation, as one that held it before a move
            other.chats.update(worker.chats)
        cluster.registry.kill("registry")
        cluster.kill(worker.name)
        task = asyncio.create_task(ask(router, key, QUESTIONS[1], name))
        await asyncio.sleep(0.1)
        cluster.start_registry()
        cluster.report()
        answer, _ = await task
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1] and cluster.num_encoded == 1

    run(scenario)


# ---- taking up a turn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("heard", [0, 2, NUM])
def test_a_client_takes_up_a_turn_whose_stream_it_lost(heard, number, elsewhere):
    """Its former self still runs, on a stream that nobody reads."""

    async def scenario(cluster, router, key):
        name = ""
        if number:
            _, name = await ask(router, key, QUESTIONS[0])
        asked = turn(key, QUESTIONS[number], name)
        told = []
        worker = cluster.decode.workers[home(cluster, key)]
        worker.lever.hold("done" if heard == NUM else f"token {heard}")
        stream = router.ask(asked)
        async for event in stream:
            told.append(event)
            if sum(e.kind == "token" for e in told) == heard:
                break
        name, tokens = told[0].conversation_id, tuple(t for e in told for t in e.token_ids)
        worker.lever.free("done" if heard == NUM else f"token {heard}")
        again = turn(key, QUESTIONS[number], name, turn_id=asked.turn_id, replay=Replay(tokens) if tokens else None)
        taker = cluster.router("other") if elsewhere else router
        if elsewhere and not heard:
            await stream.aclose()  # that nothing was said does not tell a stranger that the turn is under way
        events = [event async for event in taker.ask(again)]
        assert tokens + tuple(t for e in events for t in e.token_ids) == conversation(key, QUESTIONS, NUM)[number]
        assert [e.index for e in events if e.kind == "token"] == list(range(heard, NUM)) and events[-1].kind == "done"
        if not (elsewhere and not heard):
            with pytest.raises(Cancelled):
                async for _ in stream:
                    pass
        answer, _ = await ask(taker, key, "last?", events[-1].conversation_id)
        assert answer.token_ids == conversation(key, [*QUESTIONS[: number + 1], "last?"], NUM)[number + 1]
        assert len(cluster.directory.history(Token.parse(name).base).records) == number + 2

    run(scenario)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("heard", [0, 2, NUM])
def test_a_client_takes_up_a_turn_that_was_finished_meanwhile(heard, elsewhere, lost):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        asked = turn(key, QUESTIONS[1], name)
        tokens = Answer.from_events(await listen(router, asked)).token_ids[:heard]
        if lost:
            cluster.kill(home(cluster, key))
        again = turn(key, QUESTIONS[1], name, turn_id=asked.turn_id, replay=Replay(tokens) if heard else None)
        taker = cluster.router("other") if elsewhere else router
        events = await listen(taker, again)
        assert tokens + tuple(t for e in events for t in e.token_ids) == conversation(key, QUESTIONS, NUM)[1]
        records = cluster.directory.history(Token.parse(name).base).records
        assert [r.token_ids for r in records] == conversation(key, QUESTIONS, NUM)[:2], "the turn counts twice"
        answer, _ = await ask(taker, key, QUESTIONS[2], events[-1].conversation_id)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[2] and cluster.num_encoded == 1

    run(scenario)


# ---- a storm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_no_token_is_ever_wrong_in_a_storm_of_losses(seed):
    """Clients ask, leave and come back while workers and the registry die and are replaced: right answers or typed errors."""

    async def main():
        rng = random.Random(seed)
        right, wrong = 0, []
        async with cluster_of(num_prefill=2, num_decode=3, router={"call_timeout_s": 0.3}) as cluster:
            routers = [cluster.router(f"r{i}") for i in range(2)]
            keys = [(await routers[0].prepare(video(b"%d" % i))).media_id for i in range(3)]
            over = False

            async def client(number):
                nonlocal right
                for _ in range(3):
                    which, name, questions = rng.randrange(3), "", []
                    for i in range(3):
                        question = f"{number} {i} {rng.random()}"
                        try:
                            if rng.random() < 0.2:
                                await rng.choice(routers).prepare(video(b"%d" % which))
                            answer, name = await ask(rng.choice(routers), keys[which], question, name, deadline_s=5)
                        except SparseVilaError as error:
                            wrong.append(error)
                            break
                        questions.append(question)
                        assert answer.token_ids == conversation(keys[which], questions, NUM)[-1]
                        right += 1

            async def fate():
                number = 10
                while not over:
                    await asyncio.sleep(rng.uniform(0.01, 0.05))
                    what = rng.random()
                    if what < 0.5:
                        cluster.kill(rng.choice(list(cluster.decode.workers)))
                        cluster.add_decode(f"d{number}")
                    elif what < 0.8:
                        cluster.kill(rng.choice(list(cluster.prefill.workers)))
                        cluster.add_prefill(f"p{number}")
                    elif what < 0.9:
                        cluster.registry.kill("registry")
                        cluster.start_registry()
                    number += 1
                    cluster.clock.now_s += 0.2
                    cluster.report()

            storm = asyncio.create_task(fate())
            try:
                await asyncio.gather(*(client(i) for i in range(10)))
            finally:
                over = True
                await storm
            for error in wrong:
                assert isinstance(error, (Unavailable, NotFound, QueueFull)), repr(error)
            assert right > 20, [repr(error) for error in wrong]

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_worker_that_died_is_forgotten_by_every_router():
    async def scenario(cluster, router, key):
        lost = home(cluster, key)
        cluster.kill(lost)
        with pytest.raises(WorkerLost):
            await router._fleet.call("decode", lost, "info", caller=router._short_call())
        await cluster.settled()
        assert lost not in {one.worker for one in cluster.directory.snapshot().workers}
        answer, _ = await ask(cluster.router("other"), key, QUESTIONS[0], sampling=SamplingParams(max_tokens=NUM))
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[0]

    run(scenario)
