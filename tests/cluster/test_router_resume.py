"""Clients that lost a stream take up the turn: whether it still runs, is over, or its worker is gone."""

import pytest

from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.core.errors import Cancelled
from sparsevila_cluster.core.requests import Answer, Replay
from tests.cluster.scripted_cluster import NUM, QUESTIONS, ask, home, listen, run_prepared, turn
from tests.cluster.scripted_workers import conversation


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
        worker.breakpoints.hold("done" if heard == NUM else f"token {heard}")
        stream = router.ask(asked)
        async for event in stream:
            told.append(event)
            if sum(e.kind == "token" for e in told) == heard:
                break
        name, tokens = told[0].conversation_id, tuple(t for e in told for t in e.token_ids)
        worker.breakpoints.free("done" if heard == NUM else f"token {heard}")
        again = turn(key, QUESTIONS[number], name, turn_id=asked.turn_id, replay=Replay(tokens) if tokens else None)
        taker = cluster.router("other") if elsewhere else router
        events = [event async for event in taker.ask(again)]
        assert tokens + tuple(t for e in events for t in e.token_ids) == conversation(key, QUESTIONS, NUM)[number]
        assert [e.index for e in events if e.kind == "token"] == list(range(heard, NUM)) and events[-1].kind == "done"
        with pytest.raises(Cancelled):
            async for _ in stream:
                pass
        answer, _ = await ask(taker, key, "last?", events[-1].conversation_id)
        assert answer.token_ids == conversation(key, [*QUESTIONS[: number + 1], "last?"], NUM)[number + 1]
        assert len(cluster.directory.history(ConversationToken.parse(name).base).records) == number + 2

    run_prepared(scenario)


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
        records = cluster.directory.history(ConversationToken.parse(name).base).records
        assert [r.token_ids for r in records] == conversation(key, QUESTIONS, NUM)[:2], "the turn counts twice"
        answer, _ = await ask(taker, key, QUESTIONS[2], events[-1].conversation_id)
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[2] and cluster.num_encoded == 1

    run_prepared(scenario)
