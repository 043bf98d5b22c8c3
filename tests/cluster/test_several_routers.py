"""Several routers of one cluster, each with its own gRPC server on the port that they share: what one knows, the others do, too."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time

import grpc
import pytest

from sparsevila_cluster.client import AsyncClient
from sparsevila_cluster.core.cluster_config import ClusterConfig, GatewayConfig, build_cluster_config
from sparsevila_cluster.core.errors import BadConfig, NotFound, Unavailable
from sparsevila_cluster.core.requests import Replay
from sparsevila_cluster.gateway.grpc import GrpcServer
from sparsevila_cluster.gateway.service import VideoQAService
from sparsevila_cluster.serve import application
from sparsevila_cluster.serve.application import with_routers
from sparsevila_cluster.serve.serve_cluster import _reserved_port
from tests.cluster.scripted_cluster import NUM, QUESTIONS, ask, holders, home, listen, run, run_prepared, turn, until, video
from tests.cluster.scripted_workers import conversation

# ---- how many, and what they share -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "cores", "num"),
    [
        ({"door": {"spool_dir": "/spool"}}, 2, 2),
        ({"door": {"spool_dir": "/spool"}}, 1, 1),
        ({}, 64, 1),  # what is uploaded to one could not be prepared through the other
        ({"door": {"spool_dir": "/spool", "port": 0}}, 64, 1),
        ({"door": {"spool_dir": "/spool"}, "router": {"replicas": 1}}, 64, 1),
        ({"door": {"spool_dir": "/spool"}, "router": {"replicas": 3}}, 1, 3),
    ],
)
def test_there_are_two_routers_where_they_can_run_side_by_side(fields, cores, num, monkeypatch):
    monkeypatch.setattr(application, "_num_cores", lambda: cores)
    config = with_routers(build_cluster_config(**fields))
    assert config.router.replicas == num and with_routers(config) == config
    assert with_routers(ClusterConfig(), spool_follows=True).router.replicas == min(2, cores)


@pytest.mark.parametrize(
    ("door", "told"),
    [({"port": 0, "spool_dir": "/spool"}, "door.port must be 1 to 65535 .* got 0"), ({}, "door.spool_dir must be a folder")],
)
def test_routers_that_could_not_share_are_refused(door, told):
    with pytest.raises(BadConfig, match=told):
        with_routers(build_cluster_config(door=door, router={"replicas": 2}))


def grpc_server(port):
    server = grpc.aio.server(options=[("grpc.so_reuseport", 1)])
    return server, server.add_insecure_port(f"127.0.0.1:{port}")


def test_a_reserved_port_is_for_routers_only():
    async def main():
        with _reserved_port(ClusterConfig(door=GatewayConfig(port=0))) as port:
            with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                stranger.bind(("127.0.0.1", port))
                stranger.listen()
            with pytest.raises(Unavailable, match=f"cannot listen on 127.0.0.1:{port}"):
                with _reserved_port(ClusterConfig(door=GatewayConfig(port=port))):
                    pass
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, "the reservation itself listens"
            servers = [grpc_server(port) for _ in range(2)]
            assert [own for _, own in servers] == [port, port]
            for server, _ in servers:
                await server.start()
            for _ in range(8):
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
                    await asyncio.wait_for(channel.channel_ready(), 5)
            for server, _ in servers:
                await server.stop(0)
            again, own = grpc_server(port)
            assert own == port, "a router that starts again does not get its port"
            await again.stop(0)

    asyncio.run(main())


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_another_user_cannot_share_the_port():
    script = (
        "import os, socket, sys; os.setuid(65534); s = socket.socket()\n"
        "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "s.bind(('127.0.0.1', int(sys.argv[1]))); s.listen()"
    )
    with _reserved_port(ClusterConfig(door=GatewayConfig(port=0))) as port:
        done = subprocess.run([sys.executable, "-c", script, str(port)], capture_output=True, text=True, timeout=30)
        assert done.returncode != 0 and "Address already in use" in done.stderr
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            own.bind(("127.0.0.1", port))


# ---- what they know of each other --------------------------------------------------------------------------------------


def test_media_that_were_deleted_through_one_router_are_not_made_again_by_another():
    async def scenario(cluster, router):
        key = (await router.prepare(video())).media_id
        _, name = await ask(router, key, QUESTIONS[0])
        assert await cluster.router("other").delete_media(key)
        for conversation_id in ("", name):
            with pytest.raises(NotFound, match="prepare it first"):
                await ask(router, key, QUESTIONS[1], conversation_id)
        assert not holders(cluster, key) and cluster.num_encoded == 1
        third = cluster.router("third")
        assert not (await third.prepare(video())).reused
        assert (await ask(router, key, QUESTIONS[0]))[0].token_ids == conversation(key, QUESTIONS, NUM)[0]
        # It is not deleted any more: whoever remembers what it was made of makes it again.
        (holder,) = holders(cluster, key)
        cluster.kill(holder)
        for worker in cluster.prefill.workers.values():
            worker.copies.clear()
        cluster.report()
        assert (await ask(third, key, QUESTIONS[0]))[0].token_ids == conversation(key, QUESTIONS, NUM)[0]

    run(scenario)


def test_a_router_that_dies_while_media_are_made_holds_nobody_up_for_long():
    async def scenario(cluster, router):
        cluster.prefill.workers["p0"].breakpoints.hold("encode")
        dying = asyncio.create_task(router.prepare(video()))
        await cluster.prefill.workers["p0"].breakpoints.reached("encode")

        async def stay_silent(*args):  # a process that is gone gives nothing back
            await asyncio.sleep(0)

        router._clients.directory.once = lambda *args: type("Gone", (), {"unclaim": stay_silent, "claim": stay_silent})()
        dying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await dying
        cluster.prefill.workers["p0"].breakpoints.free("encode")
        waiting = asyncio.create_task(cluster.router("other").prepare(video()))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        for _ in range(11):
            cluster.clock.now_s += 1
            cluster.report()
        assert (await asyncio.wait_for(waiting, 5)).media_id

    run(scenario)


@pytest.mark.parametrize("heard", [0, 3])
def test_a_turn_whose_conversation_nobody_knows_goes_on_in_a_new_one(heard):
    """As a client asks whose router died before the directory heard of the conversation."""

    async def scenario(cluster, router, key):
        wanted = conversation(key, QUESTIONS, NUM)
        told = tuple(wanted[0][:heard])
        events = await listen(router, turn(key, QUESTIONS[0], "", replay=Replay(told) if told else None))
        assert told + tuple(t for e in events for t in e.token_ids) == wanted[0]
        answer, _ = await ask(cluster.router("other"), key, QUESTIONS[1], events[-1].conversation_id)
        assert answer.token_ids == wanted[1]

    run_prepared(scenario)


def test_calls_of_one_owner_begin_at_a_pace_while_others_have_calls_at_another_router(tmp_path):
    async def scenario(cluster, _):
        door = GatewayConfig(spool_dir=str(tmp_path / "spool"), api_keys={"a": "ann", "b": "bob"}, paced_calls_per_s=1.0)
        routers = [cluster.router(f"r{i}") for i in range(2)]
        services = [VideoQAService(router, door, cluster.config.engine) for router in routers]

        def call(at, key):
            return services[at].call("Ask", [f"Bearer {key}"], lambda: None)

        async def calls(num):
            for _ in range(num):
                async with call(1, "b"):
                    pass

        try:
            await asyncio.wait_for(calls(100), 1)  # nobody else has any
            async with call(0, "a"), call(1, "b"):
                await until(lambda: routers[0]._places.recent.has_others("ann") and routers[1]._places.recent.has_others("bob"))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(calls(100), 1)
        finally:
            await asyncio.gather(*(service.close() for service in services))

    run(scenario)


# ---- and what their clients notice -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def doors(cluster, folder, num=2):
    """[(router, gRPC server)] of one cluster with one spool, and a client of all, which calls the first one next."""
    opened = []
    for i in range(num):
        router, door = cluster.router(f"r{i}"), GatewayConfig(port=0, spool_dir=str(folder / "spool"), max_inline_bytes=0)
        service = VideoQAService(router, door, cluster.config.engine)
        server = GrpcServer(service, door)
        await server.start()
        opened.append((router, server, service))
    targets = ",".join(f"127.0.0.1:{server.port}" for _, server, _ in opened)
    try:
        async with AsyncClient.connect(targets, timeout_s=20) as client:
            while (await client.info())["details"]["router"]["name"] != f"r{num - 1}":
                pass
            yield [(router, server) for router, server, _ in opened], client
    finally:
        for _, server, service in opened:
            await server.stop(0)
            await service.close()


MEDIA = video().sources[0].data


def test_media_conversations_and_turns_are_those_of_every_router(tmp_path):
    async def scenario(cluster, _):
        async with doors(cluster, tmp_path) as (routers, client):
            media = await client.prepare(await client.upload(MEDIA))  # the first router keeps it, the second one prepares it
            assert [len(router._preparer._remembered) for router, _ in routers] == [0, 1]
            wanted = conversation(media.media_id, QUESTIONS, NUM)
            chat = client.conversation(media)
            for number, question in enumerate(QUESTIONS):
                client._connection._targets._homes.clear()  # as another client would ask, the next router
                assert (await chat.ask(question, max_tokens=NUM)).token_ids == wanted[number]
            infos = [(await client.info())["details"] for _ in routers]
            assert {info["router"]["name"] for info in infos} == {"r0", "r1"}
            assert infos[0]["media"] == infos[1]["media"] and [info["conversations"] for info in infos] == [1, 1]
            assert (await client.media(media.media_id)).media_id == (await client.media(media.media_id)).media_id
            await chat.close()
            assert not any(worker.chats for worker in cluster.decodes)
            assert [await client.delete_media(media.media_id) for _ in range(2)] == [True, False]

    run(scenario)


@pytest.mark.parametrize("at", ["ask", "token 0", "token 3", "done"])
def test_a_router_that_goes_costs_its_streams_one_reconnect(tmp_path, at):
    async def scenario(cluster, _):
        async with doors(cluster, tmp_path) as (routers, client):
            media = await client.prepare(await client.upload(MEDIA))
            worker = cluster.decode.workers[home(cluster, media.media_id)]
            worker.breakpoints.hold(at)
            chats = [client.conversation(media) for _ in range(4)]
            asking = [asyncio.create_task(chat.ask(QUESTIONS[0], max_tokens=NUM)) for chat in chats]
            await worker.breakpoints.reached(at)
            await asyncio.sleep(0.05)
            started_s = time.monotonic()
            await routers[0][1].stop(0)
            worker.breakpoints.free(at)
            answers = await asyncio.gather(*asking)
            wanted = conversation(media.media_id, QUESTIONS, NUM)
            assert [answer.token_ids for answer in answers] == [wanted[0]] * 4 and time.monotonic() - started_s < 5
            assert [(await chat.ask(QUESTIONS[1], max_tokens=NUM)).token_ids for chat in chats] == [wanted[1]] * 4
            await asyncio.gather(*(chat.close() for chat in chats))
            assert not any(worker.running for worker in cluster.decodes)

    run(scenario)
