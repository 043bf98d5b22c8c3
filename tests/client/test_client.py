"""The calls of a client over a scripted server: turns, information, deadlines."""

import asyncio
import time

import pytest

from sparsevila_cluster.client.proto_messages import to_event
from sparsevila_cluster.core import errors
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, NotFound, Unavailable
from sparsevila_cluster.core.requests import Answer
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.client.scripted_server import MEDIA_ID, TEXT, TOKENS, Scripted, connect, serving, wired

# ---- turns -----------------------------------------------------------------------------------------------------------


async def test_an_answer_is_whole():
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        answer = await client.ask(await client.media(MEDIA_ID), "What?")
        assert isinstance(answer, Answer) and (answer.text, answer.token_ids) == (TEXT, tuple(TOKENS))
        assert answer.usage.visual_tokens_retrieved == 16 and answer.timeline == {"ttft": 1.0, "total": 2.0}
        (seen,) = answer.evidence
        assert (seen.frame, seen.time_s, seen.share, seen.grid) == (2, 1.5, 1.0, (2, 3))
        assert seen.cells == ((0, 1, 0.75), (1, 2, 0.25)) and answer.evidence.places() == "1.5 s (100%)"
        with pytest.raises(NotFound, match="cannot be read again"):
            answer.evidence.show()
        assert [piece async for piece in client.stream(MEDIA_ID, "What?")][-1] == "."
    assert [request.conversation_id for request in servicer.of("CloseConversation")] == ["c0", "c1"]


async def test_questions_asked_at_once_share_one_conversation():
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        chat = client.conversation(MEDIA_ID)
        answers = await asyncio.gather(*(chat.ask(f"{i}?") for i in range(5)))
    assert [answer.text for answer in answers] == [TEXT] * 5 and len(chat.turns) == 5
    assert sorted(request.conversation_id for request in servicer.of("Ask")) == ["", *["c0"] * 4]


async def test_mistakes_cost_no_call():
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        chat = client.conversation(MEDIA_ID)
        for options, told in [({"top_p": 0}, "top_p"), ({"colour": 1}, "'colour'"), ({"timeout_s": 0}, "deadline_s")]:
            with pytest.raises(BadRequest, match=told):
                chat.stream("What?", **options)
        with pytest.raises(BadRequest, match="non-empty"):
            await chat.ask("  ")
        await chat.close()  # nothing was begun
        with pytest.raises(BadRequest, match="deadline_s"):
            await client.info(timeout_s=-1)
    assert not servicer.calls


# ---- the rest --------------------------------------------------------------------------------------------------------


async def test_information_and_deleting():
    servicer = Scripted()
    servicer.details = '{"pools": {"decode": []}}'
    async with serving(servicer) as (_, port), connect(port) as client:
        info = await client.info()
        assert info["model"] == "tiny" and info["details"] == {"pools": {"decode": []}} and info["max_inline_bytes"] == 1000
        assert await client.delete_media(MEDIA_ID) is True
        servicer.details = "{"
        with pytest.raises(errors.DataLoss, match="no JSON"):
            await client.info()


async def test_calls_outlast_a_server_that_is_away_for_a_moment():
    servicer = Scripted()
    servicer.script = {name: [Unavailable("no worker")] * 2 for name in ("GetMedia", "DeleteMedia", "GetServerInfo")}
    async with serving(servicer) as (_, port), connect(port) as client:
        await asyncio.gather(client.info(), client.media(MEDIA_ID), client.delete_media(MEDIA_ID))
    assert len(servicer.calls) == 9


async def test_every_call_has_a_deadline():
    servicer = Scripted()
    methods = ("GetServerInfo", "GetMedia", "DeleteMedia", "PrepareMedia", "UploadMedia", "Ask")
    servicer.script = {name: [lambda context: asyncio.sleep(30)] * 2 for name in methods}
    async with serving(servicer) as (_, port), connect(port, timeout_s=0.3) as client:
        for call in (
            client.info,
            lambda: client.media("x"),
            lambda: client.delete_media("x"),
            lambda: client.prepare("https://example.org/a.mp4"),
            lambda: client.upload(b"abc"),
            lambda: client.ask(MEDIA_ID, "What?"),
        ):
            started_s = time.monotonic()
            with pytest.raises(DeadlineExceeded, match=f"127.0.0.1:{port}"):
                await call()
            assert 0.2 < time.monotonic() - started_s < 2
        servicer.script = {}
        assert (await client.info(timeout_s=5))["model"] == "tiny"


async def test_a_stopped_connection_ends_at_the_deadline():
    servicer = Scripted()
    async with wired(servicer) as wire, connect(wire.port) as client:
        await client.info()
        wire.held.set()
        with pytest.raises(DeadlineExceeded):
            await client.info(timeout_s=0.4)


def test_a_kind_of_event_that_is_newer_than_this_client_is_passed_over():
    assert to_event("t", pb.AskEvent()) is None
