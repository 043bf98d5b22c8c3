"""What another tenant can do with a conversation whose token it has: nothing."""

import asyncio
import json

import pytest

from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.core.api_keys import ApiKeyEntry, add_api_key, hash_api_key
from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, NotFound
from sparsevila_cluster.gateway.service import VideoQAService
from tests.cluster.scripted_cluster import NUM, QUESTIONS, ask, home, listen, run, run_prepared, turn, until, video
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


def test_turns_of_one_owner_that_find_no_place_wait_at_the_router_and_those_of_others_do_not():
    async def scenario(cluster, router, key):
        async def num_turns(what):
            return (await router.info())["router"][what]

        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")
        flood = [asyncio.create_task(ask(router, key, QUESTIONS[0], owner="ann")) for _ in range(8)]
        await until(lambda: len(worker.running) == 3)
        await asyncio.sleep(0.05)
        assert len(worker.running) == 3 and await num_turns("turns_waiting") == 5 and await num_turns("turns") == 8
        flood.pop().cancel()
        aborted = asyncio.create_task(ask(router, key, QUESTIONS[0], owner="ann", turn_id="mine"))
        await until(lambda: "mine" in router._turns)
        await asyncio.sleep(0.01)
        assert await router.abort("mine")
        with pytest.raises(Cancelled, match="'mine'|turn mine"):
            await asyncio.wait_for(aborted, 1)
        with pytest.raises(DeadlineExceeded, match="waiting for other turns of 'ann'"):
            await ask(router, key, QUESTIONS[0], owner="ann", deadline_s=0.1)
        others = [asyncio.create_task(ask(router, key, QUESTIONS[0], owner=owner)) for owner in ("bob", "", "", "", "")]
        await until(lambda: len(worker.running) == 8)
        worker.breakpoints.free("token 2")
        wanted = conversation(key, QUESTIONS, NUM)[0]
        assert all(answer.token_ids == wanted for answer, _ in await asyncio.gather(*flood, *others))
        assert await num_turns("turns_waiting") == 0 and not router._places._queues

    run_prepared(scenario, num_decode=1, router={"max_turns_per_owner": 3})


def test_while_others_have_turns_at_whatever_router_one_owner_has_a_share_only():
    async def scenario(cluster, router, key):
        worker = cluster.decode.workers[home(cluster, key)]
        worker.breakpoints.hold("token 2")

        def num_of_ann():
            return sum(name.startswith("ann") for name in worker.running)

        asked = [asyncio.create_task(ask(cluster.router("other"), key, QUESTIONS[0], owner="bob"))]
        await until(lambda: worker.running)
        cluster.report()
        asked.append(asyncio.create_task(ask(router, key, QUESTIONS[0], owner="ann", turn_id="ann 0")))
        await until(lambda: len(worker.running) == 2)  # of this one the router learned of bob
        asked += [asyncio.create_task(ask(router, key, QUESTIONS[0], owner="ann", turn_id=f"ann {i}")) for i in range(1, 30)]
        await until(lambda: num_of_ann() == 3)
        await asyncio.sleep(0.05)
        assert num_of_ann() == 3
        worker.breakpoints.free("token 2")
        wanted = conversation(key, QUESTIONS, NUM)[0]
        assert all(answer.token_ids == wanted for answer, _ in await asyncio.gather(*asked))

    # A half of 12 is shared by two routers.
    run_prepared(scenario, num_decode=1, router={"max_turns_per_owner": 12, "replicas": 2}, engine={"max_share": 0.5})


@pytest.mark.parametrize("brownout_at, wanted", [(1.0, 2 * 7), (0.5, 2 * (7 + 11))])
def test_without_a_number_one_owner_may_fill_the_batches_of_all_workers(brownout_at, wanted):
    async def scenario(cluster, router, key):
        assert router._places._num_places == wanted and router._places._num_shared == int(wanted * 0.75)

    run_prepared(scenario, engine={"max_batch": 7, "max_waiting": 11}, decode={"replicas": 2, "brownout_at": brownout_at})


# ---- what the server tells ---------------------------------------------------------------------------------------------------


async def told(service, key):
    """What GetServerInfo tells the holder of a key."""
    async with service.call("GetServerInfo", [f"Bearer {key}"], lambda: None) as call:
        return await service.server_info(call)


def test_the_info_of_a_user_has_nothing_of_workers_nor_of_other_tenants(tmp_path):
    file = tmp_path / "keys.yaml"
    add_api_key(file, ApiKeyEntry(name="root", hash=hash_api_key("r"), tenant="ops", role="admin"))

    async def scenario(cluster, router):
        gateway = GatewayConfig(api_keys={"a": "ann", "b": "bob"}, keys_file=str(file))
        service = VideoQAService(router, gateway, cluster.config.engine)
        try:
            ours = await router.prepare(video(tenant="ann"))
            theirs = await router.prepare(video(b"another video", tenant="bob"))
            for _ in range(2):
                await ask(router, ours.media_id, QUESTIONS[0], tenant="ann")
            cluster.report()
            everything = (await told(service, "r")).details
            media = {one["media_id"] for one in everything["media"]}
            assert media == {ours.media_id, theirs.media_id} and everything["pools"]["decode"][0]["worker"] == "d0"
            info = await told(service, "a")
            assert info.model == cluster.config.engine.model
            counts = {name: info.details[name] for name in ("media", "media_bytes", "conversations")}
            assert counts == {"media": 1, "media_bytes": ours.kv_bytes, "conversations": 2}
            assert not (await told(service, "b")).details["conversations"]
            allowed = {"model", "media", "media_bytes", "conversations", "door", "limits"}
            assert info.details.keys() == allowed
            said = json.dumps(info.details)
            workers = [*cluster.decode.workers, *cluster.prefill.workers]
            for secret in (*workers, "pid", "node", "address", ours.media_id, theirs.media_id, "bob", "router"):
                assert f'"{secret}' not in said, secret
        finally:
            await service.close()

    run(scenario)


# ---- who makes room ----------------------------------------------------------------------------------------------------------


def test_many_conversations_of_one_tenant_do_not_push_out_anothers():
    """Neither from the router's table, nor from the directory, from which they are recovered."""

    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0], tenant="ann")
        for _ in range(20):
            await ask(router, key, QUESTIONS[0], tenant="bob")
        token = ConversationToken.parse(name)
        assert router._conversations.find(token, "ann") is not None and len(router._conversations) == 8
        assert cluster.directory.history(token.base) is not None and cluster.directory.snapshot().num_conversations == 8
        await cluster.settled()
        cluster.kill(token.worker)
        answer, _ = await ask(router, key, QUESTIONS[1], name, tenant="ann")
        assert answer.token_ids == conversation(key, QUESTIONS, NUM)[1]

    run_prepared(scenario, router={"max_conversations": 8})


def test_tokens_that_are_made_up_do_not_push_out_anothers_conversations():
    async def scenario(cluster, router, key):
        _, name = await ask(router, key, QUESTIONS[0], tenant="ann")
        token = ConversationToken.parse(name)
        for i in range(20):
            router._conversations.state_of(ConversationToken(f"{i:032x}", "d0", 1, 5), "bob")
        assert router._conversations.find(token, "ann").num_turns == 1

    run_prepared(scenario, router={"max_conversations": 8})
