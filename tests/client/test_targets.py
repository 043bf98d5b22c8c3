"""A client of several servers: whose turn it is, what becomes of calls when one dies, and when that one is asked again."""

import asyncio
import itertools
import os
import signal
import socket
import threading
import time
from contextlib import asynccontextmanager

import pytest

from sparsevila_cluster.client import AsyncClient, Client, call_errors, targets
from sparsevila_cluster.client.targets import Targets
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, NotFound, QueueFull, Unavailable, WorkerLost
from tests.client.router_process import RouterProcess
from tests.client.scripted_server import MEDIA_ID, TEXT, TOKENS, Scripted, serving, wired
from tests.client.test_resume import HOWS, cut_after

BIG = bytes(range(256)) * 10_000


@asynccontextmanager
async def two(**options):
    """Two servers, each behind a wire: (servicers, wires, a client of both that calls the first one next)."""
    servicers = Scripted(), Scripted()
    servicers[1]._ids = itertools.count(100)
    async with wired(servicers[0]) as a, wired(servicers[1]) as b:
        async with AsyncClient.connect(f"127.0.0.1:{a.port},127.0.0.1:{b.port}", **options) as client:
            while not servicers[1].calls:
                await client.info()
            for one in servicers:
                one.calls.clear()
            yield servicers, (a, b), client


async def die(wire):
    """Nobody listens any more, and who was connected is cut off."""
    wire._server.close()
    wire.cut()


def cut_off(wire):
    """A step of a script: what was sent arrives, then the server dies."""

    async def step(context):
        await asyncio.sleep(0.05)
        await die(wire)
        await asyncio.sleep(5)

    return step


# ---- what a list may be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a:1,,b:2", "target 2 of 'a:1,,b:2' must be host:port, got ''"),
        (",a:1", "target 1 of .* got ''"),
        ("a:1,", "target 2 of .* got ''"),
        ("a:1,b", "target 2 of .* got 'b'"),
        ("a:1, b:2", "target 2 of .* got ' b:2'"),
        ("a:1,http://b:2", "target 2 of .* got 'http://b:2'"),
        ("a:1,b:0", "target 2 of .* a port is 1 to 65535"),
        ("a:65536", "got 'a:65536'; a port is 1 to 65535"),
        ("a:1,b:2,a:1", "target 3 of .* must not be there twice, got 'a:1'"),
        (",".join(f"a:{i}" for i in range(1, 67)), "up to 64 of them with commas between, got 66"),
    ],
)
def test_a_bad_list_is_told_by_its_bad_part(text, told):
    for connect in (AsyncClient.connect, Client.connect):
        with pytest.raises(BadRequest, match=told):
            connect(text)


def test_hosts_of_all_kinds_may_stand_in_a_list():
    assert targets.parse_targets("a.example.org:1,[::1]:2,unix:/tmp/s,127.0.0.1:65535")[1:3] == ["[::1]:2", "unix:/tmp/s"]


# ---- whose turn it is --------------------------------------------------------------------------------------------------


async def test_calls_go_round():
    async with two() as (servicers, _, client):
        for _ in range(6):
            await client.media(MEDIA_ID)
        assert [len(one.calls) for one in servicers] == [3, 3]
        await asyncio.gather(*(client.ask(MEDIA_ID, "What?") for _ in range(8)))
        assert [len(one.of("Ask")) for one in servicers] == [4, 4]


async def test_a_conversation_stays_where_it_is():
    async with two() as (servicers, _, client):
        chats = [client.conversation(MEDIA_ID) for _ in range(4)]
        for chat in chats:
            await asyncio.gather(*(chat.ask(f"{i}?") for i in range(5)))
        await asyncio.gather(*(chat.close() for chat in chats))
    asked = [{request.conversation_id for request in one.of("Ask")} - {""} for one in servicers]
    closed = [{request.conversation_id for request in one.of("CloseConversation")} for one in servicers]
    assert asked == closed and [len(one.of("Ask")) for one in servicers] == [10, 10]


def test_clients_of_one_list_do_not_all_begin_with_its_first():
    assert len({Targets("a:1,b:2,c:3").choose().name for _ in range(100)}) == 3


def test_where_a_call_failed_it_is_made_again_only_if_there_is_nowhere_else():
    found = Targets("a:1,b:2,c:3")
    for _ in range(9):
        last = found.choose()
        assert found.choose(after=last) is not last
    only = Targets("a:1")
    assert only.choose(after=only.choose()).name == "a:1"


def test_calls_about_one_conversation_move_together():
    found = Targets("a:1,b:2,c:3")
    home = found.choose("chat")
    elsewhere = {found.choose("chat", after=home) for _ in range(5)}
    assert len(elsewhere) == 1 and home not in elsewhere and found.choose("chat") in elsewhere


# ---- one dies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [0, 4, len(TOKENS)])
async def test_an_answer_goes_on_at_another_server(num):
    async with two() as (servicers, wires, client):
        servicers[0].script["Ask"] = [cut_after(num, cut_off(wires[0]))]
        chat, started_s = client.conversation(MEDIA_ID), time.monotonic()
        answer = await chat.ask("What?")
        assert time.monotonic() - started_s < 3
        assert answer.text == TEXT and answer.token_ids == tuple(TOKENS)
        (resumed,) = servicers[1].of("Ask")
        # What was sent last may not have been read when its server died.
        said = list(resumed.said_token_ids)
        assert said == TOKENS[: len(said)] and len(said) <= num and servicers[1].of("Abort")
        assert resumed.conversation_id == ("c0" if said or resumed.conversation_id else "")
        for _ in range(3):
            assert (await chat.ask("And?")).text == TEXT
        assert [len(one.of("Ask")) for one in servicers] == [1, 4]


async def test_every_call_finds_the_server_that_lives(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(BIG)
    async with two() as (servicers, wires, client):
        chat = client.conversation(MEDIA_ID)
        await chat.ask("What?")
        assert servicers[0].of("Ask")
        await die(wires[0])
        servicers[0].calls.clear()
        started_s = time.monotonic()
        await chat.ask("And?")
        await chat.close()
        await client.media(MEDIA_ID)
        assert await client.delete_media(MEDIA_ID)
        assert (await client.info())["model"] == "tiny"
        assert (await client.prepare(tmp_path / "clip.mp4")).media_id == MEDIA_ID
        await client.upload(BIG)
        assert time.monotonic() - started_s < 3 and not servicers[0].calls
        assert len(servicers[1].of("UploadMedia")) == 2


@pytest.mark.parametrize("method", ["UploadMedia", "PrepareMedia"])
async def test_what_is_cut_begins_again_elsewhere(tmp_path, method):
    (tmp_path / "clip.mp4").write_bytes(BIG)
    async with two() as (servicers, wires, client):
        servicers[0].script[method] = [cut_off(wires[0])]
        if method == "UploadMedia":
            upload = await client.upload(tmp_path / "clip.mp4")
            assert upload.num_bytes == len(BIG)
            assert b"".join(chunk.data for chunk in servicers[1].uploads[upload.upload_id]) == BIG
        else:
            assert (await client.prepare("https://example.org/clip.mp4")).media_id == MEDIA_ID
        assert [len(one.of(method)) for one in servicers] == [1, 1]


async def test_what_a_server_refuses_another_one_may_do():
    async with two() as (servicers, _, client):
        refusals = [QueueFull("8 turns wait", retry_after_s=0.01), WorkerLost("decode-1 is gone")] * 2
        servicers[0].script = {"Ask": refusals, "PrepareMedia": refusals[:2]}
        for _ in range(4):
            assert (await client.ask(MEDIA_ID, "What?")).text == TEXT
        for _ in range(2):
            await client.prepare("https://example.org/clip.mp4")
        assert len(servicers[1].of("Ask")) == 4 and len(servicers[1].of("PrepareMedia")) == 2


async def test_nobody_can_be_reached(monkeypatch):
    monkeypatch.setattr(call_errors, "RETRY_FOR_S", 0.5)
    async with two() as (_, wires, client):
        for wire in wires:
            await die(wire)
        for call in (client.info, lambda: client.ask(MEDIA_ID, "What?"), lambda: client.prepare(b"abc")):
            started_s = time.monotonic()
            with pytest.raises(Unavailable) as told:
                await call()
            assert time.monotonic() - started_s < 5
            assert str(told.value).startswith(f"none of 127.0.0.1:{wires[0].port},127.0.0.1:{wires[1].port} answers; ")


async def test_the_deadline_bounds_the_search():
    async with two() as (_, wires, client):
        for wire in wires:
            await die(wire)
        started_s = time.monotonic()
        with pytest.raises((Unavailable, DeadlineExceeded), match=f"{wires[0].port},127.0.0.1:{wires[1].port}"):
            await client.info(timeout_s=0.5)
        assert time.monotonic() - started_s < 2


# ---- and comes back ----------------------------------------------------------------------------------------------------


async def test_a_server_that_comes_back_is_asked_again(monkeypatch):
    monkeypatch.setattr(targets, "FIRST_PROBE_S", 0.1)
    here, other = Scripted(), Scripted()
    async with serving(other) as (_, port):
        async with serving(here) as (server, own):
            async with AsyncClient.connect(f"127.0.0.1:{port},127.0.0.1:{own}") as client:
                await asyncio.gather(client.info(), client.info())
                assert here.calls and other.calls
                await server.stop(0)
                for _ in range(4):
                    await client.info()
                assert len(here.calls) == 1
                async with serving(here, own):
                    until_s = time.monotonic() + 20
                    while len(here.calls) == 1:
                        assert time.monotonic() < until_s
                        await client.info()
                        await asyncio.sleep(0.02)
                    here.calls.clear()
                    for _ in range(4):
                        await client.info()
                    assert len(here.calls) == 2


async def test_a_server_that_keeps_silent_is_left_alone():
    async with two() as (servicers, _, client):
        servicers[0].script["GetMedia"] = [lambda context: asyncio.sleep(30)]
        with pytest.raises(DeadlineExceeded):
            await client.media(MEDIA_ID, timeout_s=0.3)
        for _ in range(4):
            await client.media(MEDIA_ID, timeout_s=0.3)
        assert len(servicers[1].of("GetMedia")) == 4


@pytest.mark.parametrize("how", ["unavailable", "cancelled", "stream terminated"])
async def test_a_server_that_breaks_off_is_left_alone(how):
    async with two() as (servicers, _, client):
        servicers[0].script["GetMedia"] = [HOWS[how]] * 9
        for _ in range(4):
            await client.media(MEDIA_ID)
        assert [len(one.of("GetMedia")) for one in servicers] == [1, 4]


async def test_a_port_that_accepts_and_says_nothing_costs_a_second():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with serving(Scripted()) as (_, port):
            async with AsyncClient.connect(f"127.0.0.1:{silent.getsockname()[1]},127.0.0.1:{port}", timeout_s=10) as client:
                started_s = time.monotonic()
                for _ in range(4):
                    await client.info()
                assert time.monotonic() - started_s < 5


async def test_closing_ends_the_probes():
    async with two() as (_, wires, client):
        await die(wires[0])
        await client.info()
        (probe,) = [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "Targets._probe"]
    await asyncio.wait([probe], timeout=5)
    assert probe.cancelled()


# ---- a conversation that died with its router --------------------------------------------------------------------------


async def test_a_conversation_that_only_a_dead_router_knew_is_begun_again():
    async with two() as (servicers, _, client):
        servicers[0].script["Ask"] = [cut_after(3, HOWS["unavailable"])]
        servicers[1].script["Ask"] = [NotFound("conversation 'c0' is unknown")]
        answer = await client.ask(MEDIA_ID, "What?")
        assert answer.text == TEXT and answer.token_ids == tuple(TOKENS)
    asked = [(request.conversation_id, len(request.said_token_ids)) for one in servicers for request in one.of("Ask")]
    assert sorted(asked) == [("", 0), ("", 3), ("c0", 3)]


async def test_what_nobody_knows_is_still_told():
    async with two() as (servicers, _, client):
        for one in servicers:
            one.script["Ask"] = [NotFound("media 'x' is not resident")] * 3
        with pytest.raises(NotFound, match="not resident"):
            await client.ask(MEDIA_ID, "What?")
        assert sum(len(one.of("Ask")) for one in servicers) == 1


# ---- processes ---------------------------------------------------------------------------------------------------------


def test_a_killed_process_is_no_error_to_anybody(served):
    """Two routers of one node behind one port, and clients that know this port or another one, too: SIGKILL amid many answers."""
    killed = RouterProcess().wait()
    other = RouterProcess(killed.port).wait()
    one_port, two_ports = f"127.0.0.1:{killed.port}", f"127.0.0.1:{killed.port},127.0.0.1:{served[1]}"
    told, errors, begun = [], [], threading.Barrier(9)

    def converse(target):
        try:
            with Client.connect(target, timeout_s=30) as client:
                chat = client.conversation(MEDIA_ID)
                begun.wait(30)
                told.extend("".join(chat.stream(f"{i}?")) for i in range(3))
                chat.close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=converse, args=(target,)) for target in [one_port, one_port, one_port, two_ports] * 2]
    try:
        for thread in threads:
            thread.start()
        begun.wait(30)
        time.sleep(0.15)
        os.kill(killed.process.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        with Client.connect(one_port) as client:
            assert client.info()["version"] == str(other.process.pid)
        assert time.monotonic() - killed_s < 5
        for thread in threads:
            thread.join(60)
    finally:
        killed.stop()
        other.stop()
    assert not errors and told == [TEXT] * 24
