"""Requests that workers die of: two workers at most, a typed error, and no error for whoever was there by chance."""

import asyncio
from contextlib import aclosing

import pytest

from sparsevila_cluster.cluster.routing.suspects import EntryGate
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, PoisonRequest, WorkerClosed, WorkerLost
from sparsevila_cluster.core.requests import Answer
from tests.cluster.scripted_cluster import NUM, QUESTIONS, Clock, ask, cluster_of, home, listen, run, turn, until, video
from tests.cluster.scripted_workers import conversation

POISON = "what kills you?"
POINTS = ["ask", *(f"token {i}" for i in range(NUM)), "done"]


def kill_at(cluster, worker, question, point):
    """`worker` dies when a turn with this question comes to a point."""
    original = worker.ask

    async def asked(turn, history):
        point_of = {"accepted": "ask", "done": "done"}
        async with aclosing(original(turn, history)) as lists:
            async for events in lists:
                here = point_of.get(events[0].kind, f"token {events[0].index}")
                if turn.question == question and here == point:
                    cluster.kill(worker.name)
                    await asyncio.sleep(5)
                yield events

    worker.ask = asked


def poison(cluster, question=POISON, point="ask"):
    for worker in cluster.decodes:
        kill_at(cluster, worker, question, point)


def answered(events, key, question):
    answer = Answer.from_events(events)
    assert answer.token_ids == conversation(key, [question], NUM)[0]
    assert [event.index for event in events if event.kind == "token"] == list(range(NUM))
    assert [event.kind for event in events].count("accepted") == 1


def run_with_key(scenario, **fields):
    async def with_key(cluster, router):
        await scenario(cluster, router, (await router.prepare(video())).media_id)

    run(with_key, **{"num_decode": 5, **fields})


@pytest.mark.parametrize("point", POINTS)
def test_a_question_costs_two_workers_and_is_refused_at_once_from_then_on(point):
    async def scenario(cluster, router, key):
        poison(cluster, point=point)
        with pytest.raises(PoisonRequest, match="two workers died"):
            await ask(router, key, POISON)
        assert len(cluster.decodes) == 3
        asked = cluster.decode.num("ask")
        with pytest.raises(PoisonRequest, match="two workers died"):
            await ask(router, key, POISON)
        assert cluster.decode.num("ask") == asked and len(cluster.decodes) == 3
        answer, _ = await ask(router, key, QUESTIONS[0])
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[0]
        info = (await router.info())["router"]
        assert info["refused_requests"] == 1 and info["suspected_requests"] == 0

    run_with_key(scenario)


def test_one_whose_last_tokens_were_not_heard_costs_two_workers_too():
    """The same token kills both workers, but the first one had not sent those before it."""

    async def scenario(cluster, router, key):
        first = cluster.decode.workers[home(cluster, key)]
        for worker in cluster.decodes:
            kill_at(cluster, worker, POISON, "token 0" if worker is first else "token 3")
        with pytest.raises(PoisonRequest):
            await ask(router, key, POISON)
        assert len(cluster.decodes) == 3

    run_with_key(scenario)


def test_in_a_later_turn_of_a_conversation_which_then_goes_on():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        poison(cluster)
        with pytest.raises(PoisonRequest):
            await ask(router, key, POISON, name)
        assert len(cluster.decodes) == 3
        answer, _ = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run_with_key(scenario)


@pytest.mark.parametrize("num_poisons", [1, 2])
def test_whoever_was_there_by_chance_is_answered(num_poisons):
    async def scenario(cluster, router, key):
        poisons = [f"{POISON} {i}" for i in range(num_poisons)]
        for question in poisons:
            poison(cluster, question, "token 2")
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 1")
        questions = [f"{i}?" for i in range(6)]
        tasks = {question: asyncio.create_task(listen(router, turn(key, question))) for question in [*questions, *poisons]}
        await until(lambda: sum(worker.num_tokens_sent.values()) == len(tasks))
        worker.breakpoints.free("token 1")
        await asyncio.wait(tasks.values())
        for question in questions:
            answered(tasks[question].result(), key, question)
        for question in poisons:
            assert isinstance(tasks[question].exception(), PoisonRequest)
        assert len(cluster.decodes) >= 9 - 2 * num_poisons

    run_with_key(scenario, num_decode=9, router={"max_attempts": 6}, decode={"replicate_after": 0})


def test_a_suspect_is_alone_until_it_has_said_something_new():
    async def scenario(cluster, router, key):
        _, other = await ask(router, key, "other?")
        first = cluster.decode.workers[home(cluster, key)]
        first.breakpoints.hold("token 2")
        tasks = [asyncio.create_task(listen(router, turn(key, question))) for question in ("a?", "b?")]
        await until(lambda: sum(first.num_tokens_sent.values()) == NUM + 4)
        (second,) = [worker for worker in cluster.decodes if worker is not first]
        second.breakpoints.hold("token 2")
        cluster.kill(first.name)
        await second.breakpoints.reached("token 2")
        tasks.append(asyncio.create_task(listen(router, turn(key, "and then?", other))))
        await asyncio.sleep(0.1)
        assert len(second.running) == 1, "others entered where a suspect was to be alone"
        second.breakpoints.free("token 2")
        for task, question in zip(tasks, ("a?", "b?"), strict=False):
            answered(await task, key, question)
        assert Answer.from_events(await tasks[2]).token_ids == conversation(key, ["other?", "and then?"], NUM)[1]

    run_with_key(scenario, num_decode=2, decode={"replicate_after": 0})


def test_a_client_that_leaves_a_turn_which_was_alone_leaves_no_trace_of_it():
    """What was held back while it was alone ends with `done`, which its client did not hear."""

    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 0")
        heard = []

        async def leave_early():
            async with aclosing(router.ask(turn(key, "left?", name))) as events:
                async for event in events:
                    heard.append(event.kind)
                    if event.kind == "token" and event.index == 1:
                        return

        task = asyncio.create_task(leave_early())
        await worker.breakpoints.reached("token 0")
        cluster.kill(worker.name)
        await task
        assert heard == ["accepted", "token", "token"]
        answer, name = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run_with_key(scenario)


def test_suspects_of_two_routers_are_not_alone_at_one_worker_together():
    async def scenario(cluster, router, key):
        routers = [router, cluster.router("other")]
        first = cluster.decode.workers[home(cluster, key)]
        first.breakpoints.hold("token 0")
        tasks = [asyncio.create_task(listen(one, turn(key, f"{i}?"))) for i, one in enumerate(routers)]
        await until(lambda: len(first.running) == 2)
        (second,) = [worker for worker in cluster.decodes if worker is not first]
        second.breakpoints.hold("token 0")
        cluster.kill(first.name)
        await second.breakpoints.reached("token 0")
        await asyncio.sleep(0.1)
        assert len(second.running) == 1
        second.breakpoints.free("token 0")
        for i, task in enumerate(tasks):
            answered(await task, key, f"{i}?")

    run_with_key(scenario, num_decode=2)


def test_a_turn_whose_workers_are_killed_before_it_is_there_is_answered():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 1")
        task = asyncio.create_task(listen(router, turn(key, "a?")))
        await worker.breakpoints.reached("token 1")
        for name in [one.name for one in cluster.decodes][:-1]:
            if name != worker.name:
                cluster.kill(name)
        cluster.kill(worker.name)
        answered(await task, key, "a?")

    run_with_key(scenario, num_decode=5)


def test_a_stream_that_breaks_is_not_a_death():
    broken = [WorkerLost("the stream broke")]

    async def scenario(cluster, router, key):
        first = cluster.decode.workers[home(cluster, key)]
        kill_at(cluster, first, "a?", "token 2")
        for worker in cluster.decodes:
            if worker is not first:
                worker.breakpoints.errors["token 2"] = broken
        answered(await listen(router, turn(key, "a?")), key, "a?")
        assert len(cluster.decodes) == 2 and not broken

    run_with_key(scenario, num_decode=3)


def test_workers_that_close_one_after_the_other_make_no_suspect():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes[:-1]:
            worker.breakpoints.errors["token 2"] = [WorkerClosed("closed", worker.name)]
        answered(await listen(router, turn(key, "a?")), key, "a?")
        assert not router._clients.suspects.num_suspects

    run_with_key(scenario, num_decode=4)


def test_a_client_that_leaves_before_its_worker_dies_gets_no_third_one():
    async def scenario(cluster, router, key):
        poison(cluster, point="token 1")
        first = cluster.decode.workers[home(cluster, key)]
        async with aclosing(router.ask(turn(key, POISON))) as events:
            async for event in events:
                if event.kind == "token":
                    break
        await until(lambda: not first.running)
        cluster.kill(first.name)  # of what it still did for nobody
        with pytest.raises(PoisonRequest):
            await ask(router, key, POISON)
        assert len(cluster.decodes) == 3

    run_with_key(scenario)


def test_it_is_refused_for_a_while_only():
    async def scenario(cluster, router, key):
        poison(cluster)
        with pytest.raises(PoisonRequest, match=r"refused for 0\.2 s"):
            await ask(router, key, POISON)
        cured = {worker: type(worker).ask.__get__(worker) for worker in cluster.decodes}
        for worker, stock in cured.items():
            worker.ask = stock
        with pytest.raises(PoisonRequest):
            await ask(router, key, POISON)
        await asyncio.sleep(0.25)
        cluster.clock.now_s += 1
        cluster.report()
        answered(await listen(router, turn(key, POISON)), key, POISON)

    run_with_key(scenario, router={"refuse_s": 0.2})


def test_other_routers_refuse_it_too():
    async def scenario(cluster, router, key):
        poison(cluster)
        with pytest.raises(PoisonRequest):
            await ask(router, key, POISON)
        await cluster.settled()
        asked = cluster.decode.num("ask")
        with pytest.raises(PoisonRequest):
            await ask(cluster.router("other"), key, POISON)
        assert cluster.decode.num("ask") == asked and len(cluster.decodes) == 3

    run_with_key(scenario)


# ---- preparations ------------------------------------------------------------------------------------------------------------


def poison_media(cluster, content, point):
    """Prefill workers die when media of this content come to a point: "key_of" or "encode"."""
    for worker in cluster.prefill.workers.values():
        _poison_prefill(cluster, worker, content, point)


def _poison_prefill(cluster, worker, content, point):
    key_of, make = worker.key_of, worker.make

    def is_hit(request):
        return content in request.sources[0].data

    async def die():
        cluster.kill(worker.name)
        await asyncio.sleep(5)

    async def poisoned_key_of(request):
        if point == "key_of" and is_hit(request):
            await die()
        return await key_of(request)

    async def poisoned_make(request, key, ticket):
        async with aclosing(make(request, key, ticket)) as items:
            async for item in items:
                if point == "encode" and is_hit(request):
                    await die()
                yield item

    worker.key_of, worker.make = poisoned_key_of, poisoned_make


@pytest.mark.parametrize("point", ["key_of", "encode"])
def test_media_cost_two_prefill_workers_and_are_refused_at_once_from_then_on(point):
    async def scenario(cluster, router):
        poison_media(cluster, b"deadly", point)
        with pytest.raises(PoisonRequest, match="two workers died"):
            await router.prepare(video(b"deadly"))
        assert len(cluster.prefill.workers) == 3
        await cluster.settled()
        asked = len(cluster.prefill.calls)
        for one in (router, cluster.router("other")):
            with pytest.raises(PoisonRequest):
                await one.prepare(video(b"deadly"))
        assert len(cluster.prefill.calls) == asked, "a worker was asked about media that are refused"
        assert (await router.prepare(video())).media_id

    run(scenario, num_prefill=5)


def test_other_preparations_at_a_worker_that_dies_are_made():
    async def scenario(cluster, router):
        poison_media(cluster, b"deadly", "encode")
        for worker in cluster.prefill.workers.values():
            worker.breakpoints.hold("make")
        requests = [video(f"fine {i}".encode()) for i in range(6)]
        tasks = [asyncio.create_task(router.prepare(request)) for request in requests]
        deadly = asyncio.create_task(router.prepare(video(b"deadly")))
        await until(lambda: cluster.prefill.num("make") == 7)
        for worker in cluster.prefill.workers.values():
            worker.breakpoints.free("make")
        with pytest.raises(PoisonRequest):
            await deadly
        assert len({(await task).media_id for task in tasks}) == 6
        assert len(cluster.prefill.workers) >= 2

    run(scenario, num_prefill=4)


def test_a_maker_that_is_killed_twice_at_random_does_not_refuse_media_that_it_had_made():
    async def scenario(cluster, router):
        for worker in cluster.prefill.workers.values():
            worker.breakpoints.hold("send")
        task = asyncio.create_task(router.prepare(video()))
        for _ in range(2):
            await until(lambda: any(worker.copies and worker.num_making for worker in cluster.prefill.workers.values()))
            (maker,) = [worker for worker in cluster.prefill.workers.values() if worker.num_making]
            cluster.kill(maker.name)
        (last,) = cluster.prefill.workers.values()
        last.breakpoints.free("send")
        assert (await task).media_id

    run(scenario, num_prefill=3)


# ---- the gate ----------------------------------------------------------------------------------------------------------------


def test_the_gate_lets_in_by_order_of_arrival_and_keeps_one_alone():
    async def main():
        gate, log = EntryGate(), []

        async def visit(name, alone, for_s):
            await gate.enter(alone, Deadline(5.0), name)
            log.append(f"+{name}")
            await asyncio.sleep(for_s)
            log.append(f"-{name}")
            gate.leave(alone)

        entrants = (("a", 0.03), ("b", 0.02), ("C", 0.01), ("d", 0.01), ("e", 0.02), ("F", 0.0))
        tasks = []
        for name, for_s in entrants:
            tasks.append(asyncio.create_task(visit(name, name.isupper(), for_s)))
            await asyncio.sleep(0)
        await asyncio.sleep(0.005)
        assert gate.is_wanted_alone
        await asyncio.gather(*tasks)
        assert log == ["+a", "+b", "-b", "-a", "+C", "-C", "+d", "+e", "-d", "-e", "+F", "-F"]
        assert gate.is_idle and not gate.is_wanted_alone

    asyncio.run(main())


@pytest.mark.parametrize("how", ["late", "cancelled"])
def test_whoever_gives_up_in_line_holds_up_nobody(how):
    async def main():
        gate, deadline = EntryGate(), Deadline(0.05 if how == "late" else 5.0)
        await gate.enter(False, deadline, "first")
        waiting = asyncio.create_task(gate.enter(True, deadline, "second"))
        behind = asyncio.create_task(gate.enter(False, Deadline(5.0), "third"))
        await asyncio.sleep(0.01)
        assert not behind.done()
        if how == "cancelled":
            waiting.cancel()
        with pytest.raises((DeadlineExceeded, asyncio.CancelledError, Cancelled)):
            await waiting
        await asyncio.wait_for(behind, 1.0)
        gate.leave(False)
        gate.leave(False)
        assert gate.is_idle

    asyncio.run(main())


def test_whoever_gives_up_just_when_let_in_fails_nobody():
    async def main():
        gate = EntryGate()
        await gate.enter(True, Deadline(5.0), "first")
        waiting = [asyncio.create_task(gate.enter(False, Deadline(5.0), name)) for name in ("second", "third")]
        await asyncio.sleep(0.01)
        waiting[0].cancel()
        gate.leave(True)  # before the one that was cancelled has run
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        await asyncio.wait_for(waiting[1], 1.0)
        gate.leave(False)
        assert gate.is_idle

    asyncio.run(main())


def test_the_directory_forgets_what_is_refused_in_time():
    from sparsevila_cluster.cluster.directory import MAX_REFUSED, Directory

    clock = Clock()
    directory = Directory(1.0, clock=clock)
    directory.refuse(("key", "digest"), 10.0)
    directory.refuse(("key:question",), 20.0)
    assert directory.find("digest", None).refused == {"digest"} and directory.find(None, "key").refused == {"key", "key:question"}
    assert not directory.find(None, "other").refused
    clock.now_s += 15.0
    assert directory.find(None, "key").refused == {"key:question"} and not directory.find("digest", None).refused
    directory.refuse([f"{i}" for i in range(MAX_REFUSED)], 10.0)
    assert not directory.find(None, "key").refused, "the table is bounded"


def test_the_scripted_cluster_is_whole_without_poison():
    async def main():
        async with cluster_of() as cluster:
            key = (await cluster.router().prepare(video())).media_id
            answered(await listen(cluster.routers[0], turn(key, POISON)), key, POISON)

    asyncio.run(main())


def test_media_that_had_arrived_when_their_maker_died_are_not_suspected():
    """Its last words were not heard, so only the decode worker knows."""

    async def scenario(cluster, router):
        for worker in cluster.prefill.workers.values():
            _dies_behind_the_last_byte(cluster, worker)
        handle = await router.prepare(video())
        assert len(cluster.prefill.workers) == 4 and not router._clients.suspects.num_suspects
        await router.delete_media(handle.media_id)
        assert (await router.prepare(video())).media_id == handle.media_id
        assert len(cluster.prefill.workers) == 3

    run(scenario, num_prefill=5)


def _dies_behind_the_last_byte(cluster, worker):
    make = worker.make

    async def deadly_make(request, key, ticket):
        async with aclosing(make(request, key, ticket)) as items:
            async for item in items:
                if item[0] == "made":
                    cluster.kill(worker.name)
                    await asyncio.sleep(5)
                if item[1:] != ("prefill", 1, 1):
                    yield item

    worker.make = deadly_make
