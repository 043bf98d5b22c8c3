"""Turns whose worker is lost: the same tokens from another one, the media encoded once, and every error a typed one in time."""

import asyncio
from dataclasses import replace

import pytest

from sparsevila_cluster.cluster.directory import SETTLE_REPORTS
from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.cluster.routing.visits import LAG_TOKENS
from sparsevila_cluster.core.errors import BadRequest, Cancelled, LaneLost, NotFound, QueueFull, Unavailable
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, SamplingParams, TurnRecord
from tests.cluster.scripted_cluster import (
    NUM,
    QUESTIONS,
    Cluster,
    ask,
    cluster_of,
    home,
    listen,
    run_prepared,
    turn,
    until,
    video,
)
from tests.cluster.scripted_workers import answer_tokens, conversation

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
            worker.breakpoints.errors[point] = [Unavailable("closing")]
            task = asyncio.create_task(listen(router, turn(key, QUESTIONS[1], name, want_evidence=True)))
        else:
            worker.breakpoints.hold(point)
            task = asyncio.create_task(listen(router, turn(key, QUESTIONS[1], name, want_evidence=True)))
            await worker.breakpoints.reached(point)
            if how == "kill":
                cluster.kill(worker.name)
            else:
                cluster.decode.stop(worker.name)
        events = await task
        checked(events, key, 1)
        assert cluster.num_encoded == 1 and cluster.count("turns_recovered_total") == 1
        moved = ConversationToken.parse(events[-1].conversation_id)
        assert moved.worker != worker.name and moved.moves == 1 and moved.base == ConversationToken.parse(name).base
        if how == "stop":
            cluster.decode.go_on(worker.name)
            worker.breakpoints.free(point)
        answer, _ = await ask(router, key, QUESTIONS[2], str(moved))
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[2] and cluster.count("turns_recovered_total") == 1

    run_prepared(scenario)


def test_it_goes_on_under_the_pressure_that_it_began_under():
    async def scenario(cluster, router, key):
        await router.set_brownout(0.5)
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        task = asyncio.create_task(ask(router, key, QUESTIONS[0]))
        await worker.breakpoints.reached("token 2")
        await router.set_brownout(0.0)
        cluster.kill(worker.name)
        answer, name = await task
        assert answer.token_ids == conversation(key, QUESTIONS, NUM, 0.5)[0] and answer.usage.brownout == 0.5

    run_prepared(scenario)


def test_workers_may_be_lost_one_after_the_other():
    """If it gets further each time: a turn that kills workers always dies at the same token, more or less."""
    num = 3 * (LAG_TOKENS + 2)

    async def scenario(cluster, router, key):
        task = asyncio.create_task(listen(router, turn(key, QUESTIONS[0], sampling=SamplingParams(max_tokens=num))))
        for i in range(0, num, LAG_TOKENS + 2):
            for worker in cluster.decodes:
                worker.breakpoints.hold(f"token {i}")
            while not any(worker.running for worker in cluster.decodes):
                await asyncio.sleep(0.01)
            (worker,) = [worker for worker in cluster.decodes if worker.running]
            await worker.breakpoints.reached(f"token {i}")
            cluster.kill(worker.name)
            for worker in cluster.decodes:
                worker.breakpoints.free(f"token {i}")
        events = await task
        assert Answer.from_events(events).token_ids == conversation(key, QUESTIONS, num)[0]
        assert [event.index for event in events if event.kind == "token"] == list(range(num))
        assert ConversationToken.parse(events[-1].conversation_id).moves == 3 and cluster.num_encoded == 1
        assert cluster.count("turns_recovered_total") == 1

    run_prepared(scenario, num_decode=4)


def test_attempts_are_bounded():
    async def scenario(cluster, router, key):
        for worker in cluster.decodes:
            worker.breakpoints.errors["token 1"] = [Unavailable("closing")] * 9
        with pytest.raises(Unavailable, match="closing"):
            await ask(router, key, QUESTIONS[0])
        assert cluster.decode.num("ask") == 3

    run_prepared(scenario, num_decode=5, router={"max_attempts": 3})


@pytest.mark.parametrize("error", [BadRequest("no"), QueueFull("full"), Cancelled("aborted")], ids=repr)
def test_what_is_no_loss_is_told_also_in_mid_answer(error):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.decode.workers[home(cluster, key)].breakpoints.errors["token 3"] = [error]
        with pytest.raises(type(error)):
            await ask(router, key, QUESTIONS[1], name)
        assert cluster.decode.num("ask") == 2 and not cluster.count("turns_recovered_total")
        answer, _ = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run_prepared(scenario)


def test_a_lost_lane_is_another_workers_chance():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.errors["token 3"] = [LaneLost("out of reach")]
        events = await listen(router, turn(key, QUESTIONS[0]))
        checked(events, key)
        assert not worker.running and home(cluster, key) == worker.name, "it lives, and keeps its prefix"

    run_prepared(scenario)


def test_clients_that_lose_the_same_worker_share_the_way_back():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        tasks = [asyncio.create_task(listen(router, turn(key, f"{i}?"))) for i in range(8)]
        await until(lambda: sum(worker.num_tokens_sent.values()) == 2 * len(tasks))
        cluster.kill(worker.name)
        for i, task in enumerate(tasks):
            checked(await task, key, 0, f"{i}?")
        assert cluster.prefill.num("ship") == 1 and cluster.num_encoded == 1 and cluster.count("turns_recovered_total") == 8

    run_prepared(scenario, decode={"replicas": 2, "replicate_after": 0})  # a hot prefix would be sent by itself


# ---- what was forgotten ------------------------------------------------------------------------------------------------------


def test_an_evicted_conversation_is_made_again_where_it_was():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        worker = cluster.decode.workers[home(cluster, key)]
        worker.chats.clear()
        answer, moved = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]
        assert ConversationToken.parse(moved).moves == 0 and worker.num_replayed == 1
        assert cluster.prefill.num("ship") == 0 and not cluster.count("turns_recovered_total")

    run_prepared(scenario)


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

    run_prepared(scenario)


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

    run_prepared(scenario)


@pytest.mark.parametrize(("change", "error"), [("other", NotFound), ("gone", Unavailable)])
def test_media_whose_source_has_changed_or_gone_can_not_be_made_again(change, error, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(video().sources[0].data)

    async def main():
        async with cluster_of() as cluster:
            router = cluster.router()
            key = (await router.prepare(PrepareRequest((MediaSource(str(path), "video", "'what they call it'"),)))).media_id
            _, name = await ask(router, key, QUESTIONS[0])
            lose_everything(cluster, key)
            if change == "gone":
                path.unlink()
            else:
                path.write_bytes(video(b"another").sources[0].data)
            with pytest.raises(error) as told:
                await ask(router, key, QUESTIONS[1], name)
            assert cluster.num_encoded == 1
            assert str(tmp_path) not in str(told.value), "a path of the server's"

    async def with_real_keys():
        from sparsevila_cluster.cluster.routing.media_preparer import digest_of
        from tests.cluster import scripted_workers

        config = Cluster().config.engine
        original = scripted_workers.ScriptedPrefill.key_of
        scripted_workers.ScriptedPrefill.key_of = lambda self, request: asyncio.to_thread(digest_of, request, config)
        try:
            await main()
        finally:
            scripted_workers.ScriptedPrefill.key_of = original

    asyncio.run(asyncio.wait_for(with_real_keys(), 10))


def test_a_conversation_whose_text_is_lost_too_is_not_found():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        cluster.directory.forget_conversation(ConversationToken.parse(name).base)
        cluster.kill(home(cluster, key))
        with pytest.raises(NotFound, match="text of conversation"):
            await ask(router, key, QUESTIONS[1], name)

    run_prepared(scenario)


# ---- what nobody heard -------------------------------------------------------------------------------------------------------


def finish_unheard(worker, key, name, question="never heard?"):
    """A worker brings a turn to its end whose client has left."""
    base = ConversationToken.parse(name).base
    chat = worker.chats[base]
    asked = replace(turn(key, question), conversation_id=base)
    worker.chats[base] = [*chat, TurnRecord(asked, answer_tokens(key, chat, question, 0.0, NUM))]
    return asked


def lose_directory(cluster):
    """It comes back empty, and everybody who lives has reported to it."""
    cluster.start_directory()
    cluster.report()
    cluster.clock.now_s += SETTLE_REPORTS


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("routers", [1, 2])
def test_a_turn_that_ended_when_its_client_had_left_is_no_part_of_the_conversation(lost, routers):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        finish_unheard(cluster.decode.workers[home(cluster, key)], key, name)
        if lost:
            lose_directory(cluster)
        router = router if routers == 1 else cluster.router("other")
        for number in (1, 2):
            answer, name = await ask(router, key, QUESTIONS[number], name)
            assert (
                answer.token_ids == conversation(key, QUESTIONS, NUM)[number]
                and ConversationToken.parse(name).num_turns == number + 1
            )

    run_prepared(scenario)


def test_it_is_what_its_client_comes_back_for():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        asked = finish_unheard(cluster.decode.workers[home(cluster, key)], key, name, QUESTIONS[1])
        lose_directory(cluster)
        events = await listen(router, replace(asked, conversation_id=name))
        checked(events, key, 1)

    run_prepared(scenario)


def test_a_turn_that_nobody_heard_does_not_stand_in_for_one_that_was():
    """One worker finishes a turn for nobody while it is out of reach, another one the turn that the client asked instead; then the
    directory is lost, and with the second worker the only memory of what was said."""

    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0])
        first = cluster.decode.workers[home(cluster, key)]
        cluster.decode.stop(first.name)
        answer, name = await ask(router, key, QUESTIONS[1], name)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1] and ConversationToken.parse(name).worker != first.name
        cluster.decode.go_on(first.name)
        finish_unheard(first, key, name)
        cluster.kill(ConversationToken.parse(name).worker)
        lose_directory(cluster)
        with pytest.raises(NotFound, match="text of conversation"):
            await ask(router, key, QUESTIONS[2], name)

    run_prepared(scenario)
