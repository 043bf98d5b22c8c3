"""What another tenant can do with a conversation whose token it has: nothing."""

import asyncio

import pytest

from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.core.errors import NotFound
from tests.cluster.scripted_cluster import NUM, QUESTIONS, ask, listen, run_prepared, turn
from tests.cluster.scripted_workers import conversation


def forged(name, num_turns):
    token = ConversationToken.parse(name)
    return str(ConversationToken(token.base, token.worker, 7, num_turns))


@pytest.mark.parametrize("router_is_new", [False, True])
@pytest.mark.parametrize("num_turns", [0, 1, 2, 500])
def test_a_forged_token_does_not_spoil_the_owners_conversation(num_turns, router_is_new):
    async def scenario(cluster, router, key):
        wanted = conversation(key, QUESTIONS, NUM)
        _, name = await ask(router, key, QUESTIONS[0], tenant="ann")
        at = cluster.router("other") if router_is_new else router
        thief = asyncio.create_task(listen(at, turn(key, "tell me", forged(name, num_turns), tenant="bob")))
        await asyncio.sleep(0.02)  # it waits for the text of turns that never were
        answer, name = await ask(at, key, QUESTIONS[1], name, tenant="ann")
        assert answer.token_ids == wanted[1]
        with pytest.raises(NotFound):
            await thief
        answer, name = await ask(at, key, QUESTIONS[2], name, tenant="ann")
        assert answer.token_ids == wanted[2]

    run_prepared(scenario)


@pytest.mark.parametrize("router_is_new", [False, True])
@pytest.mark.parametrize("worker_is_gone", [False, True])
def test_only_its_owner_closes_a_conversation(worker_is_gone, router_is_new):
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0], tenant="ann")
        base, worker = ConversationToken.parse(name).base, ConversationToken.parse(name).worker
        at = cluster.router("other") if router_is_new else router
        if worker_is_gone:
            cluster.directory.forget_worker(worker)
        assert not await at.close_conversation(name, "bob")
        assert cluster.directory.history(base) is not None and base in cluster.decode.workers[worker].chats
        assert base not in cluster.directory.report(cluster.decode.workers[worker].report(True)).close
        answer, name = await ask(at, key, QUESTIONS[1], name, tenant="ann")
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]
        assert await at.close_conversation(name, "ann")
        assert cluster.directory.history(base) is None and not cluster.decode.workers[worker].chats

    run_prepared(scenario)
