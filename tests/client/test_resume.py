"""A turn over broken streams: every token once and in order, the text whole, asked once; and when nothing is made again."""

import asyncio
import time
from contextlib import aclosing

import grpc
import pytest

from sparsevila_cluster.client import call_errors
from sparsevila_cluster.client.turn_stream import TurnStream
from sparsevila_cluster.core.errors import (
    BadRequest,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    Internal,
    QueueFull,
    Unavailable,
    WorkerLost,
)
from sparsevila_cluster.core.requests import FinishReason
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.client.scripted_server import MEDIA_ID, TEXT, TOKENS, Scripted, connect, refuse, serving, wired


def fails(code, details):
    """Ends the call with a status and nothing else, as gRPC itself or a proxy would."""
    return lambda context: context.abort(code, details)


def raises(error):
    return lambda context: refuse(context, error)


def cut_after(num, how, accept=True):
    async def step(context):
        return accept, num, how

    return step


async def end(context):
    return "end"


HOWS = {
    "unavailable": fails(grpc.StatusCode.UNAVAILABLE, "going away"),
    "cancelled": fails(grpc.StatusCode.CANCELLED, ""),
    "stream terminated": fails(grpc.StatusCode.INTERNAL, "stream terminated by RST_STREAM with error code: INTERNAL_ERROR"),
    "stream removed": fails(grpc.StatusCode.UNKNOWN, "Stream removed"),
    "worker lost": raises(WorkerLost("decode-1 is gone")),
    "ended early": end,
}


async def ask_through(servicer, wire_or_port, **options):
    port = getattr(wire_or_port, "port", wire_or_port)
    async with connect(port) as client:
        chat = client.conversation(MEDIA_ID)
        pieces = [piece async for piece in chat.stream("What?", **options)]
        return chat, pieces


@pytest.mark.parametrize("num", range(len(TOKENS) + 1))
@pytest.mark.parametrize("how", ["unavailable", "socket"])
async def test_a_stream_cut_anywhere_goes_on_at_the_next_token(how, num):
    servicer = Scripted()
    async with wired(servicer) as wire:

        async def reset(context):
            await asyncio.sleep(0.05)  # what was sent is on its way
            wire.cut()
            await asyncio.sleep(5)

        servicer.script["Ask"] = [cut_after(num, HOWS.get(how, reset))]
        chat, pieces = await ask_through(servicer, wire)
        answer = chat.turns[0][1]
        first, second = servicer.of("Ask")
    assert "".join(pieces) == answer.text == TEXT and answer.token_ids == tuple(TOKENS)
    assert answer.finish_reason is FinishReason.STOP and len(answer.evidence) == 1
    assert second.said_token_ids == TOKENS[:num] and not first.said_token_ids
    assert (first.said_brownout, second.said_brownout) == (0, 0.5 if num else 0)
    assert second.turn_id == first.turn_id and second.question == first.question
    assert first.conversation_id == "" and second.conversation_id == chat.conversation_id == "c0"


@pytest.mark.parametrize("how", HOWS)
async def test_every_way_to_lose_a_stream_resumes(how):
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(2, HOWS[how]), cut_after(3, HOWS[how])]
    async with serving(servicer) as (_, port):
        chat, pieces = await ask_through(servicer, port)
    assert "".join(pieces) == TEXT and [list(r.said_token_ids) for r in servicer.of("Ask")] == [[], TOKENS[:2], TOKENS[:5]]
    turn_id = servicer.of("Ask")[0].turn_id  # the lost stream is told to end before the turn goes on
    assert [name for name, _ in servicer.calls[:3]] == ["Ask", "Abort", "Ask"] and servicer.of("Abort")[0].turn_id == turn_id


async def test_events_arrive_once_and_in_order():
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(1, HOWS["unavailable"]), cut_after(0, HOWS["cancelled"]), cut_after(8, HOWS["unavailable"])]
    async with serving(servicer) as (_, port), connect(port) as client:
        chat = client.conversation(MEDIA_ID)
        stream = TurnStream(client._connection, chat._turn("What?", {}), 20)
        events = [event async for event in stream.events()]
    assert stream.num_streams == 4
    kinds = [event.kind for event in events]
    assert kinds == ["accepted", *["token"] * len(TOKENS), "evidence", "done"]
    assert [event.index for event in events if event.kind == "token"] == list(range(len(TOKENS)))


async def test_a_server_that_comes_back_on_its_port_finishes_the_answer():
    servicer, arrived = Scripted(), asyncio.Event()

    async def hang(context):
        arrived.set()
        await asyncio.sleep(30)

    servicer.script["Ask"] = [cut_after(4, hang)]
    async with serving(servicer) as (server, port):
        asking = asyncio.create_task(ask_through(servicer, port))
        await asyncio.wait_for(arrived.wait(), 10)
        await server.stop(0)
    await asyncio.sleep(0.3)
    async with serving(servicer, port):
        _, pieces = await asking
    assert "".join(pieces) == TEXT and list(servicer.of("Ask")[-1].said_token_ids) == TOKENS[:4]


async def test_a_conversation_that_moved_goes_on_under_its_new_name():
    servicer = Scripted()
    servicer.moved_to = {"c0": "c0-elsewhere"}
    servicer.script["Ask"] = [cut_after(3, HOWS["worker lost"])]
    async with serving(servicer) as (_, port), connect(port) as client:
        chat = client.conversation(MEDIA_ID)
        assert (await chat.ask("one")).text == TEXT and chat.conversation_id == "c0-elsewhere"
        assert (await chat.ask("two")).text == TEXT and len(chat.turns) == 2
        await chat.close()
    assert [request.conversation_id for request in servicer.of("Ask")] == ["", "c0", "c0-elsewhere"]
    assert servicer.of("CloseConversation")[0].conversation_id == "c0-elsewhere"


@pytest.mark.parametrize("index", [0, 3])
async def test_a_token_out_of_order_is_no_answer(index):
    class Wrong(Scripted):
        async def Ask(self, request, context):
            yield pb.AskEvent(accepted=pb.Accepted(turn_id=request.turn_id, conversation_id="c"))
            yield pb.AskEvent(token=pb.Token(index=0, token_ids=[1, 2], text="x"))
            yield pb.AskEvent(token=pb.Token(index=index, token_ids=[3], text="y"))

    async with serving(Wrong()) as (_, port):
        with pytest.raises(DataLoss, match=f"127.0.0.1:{port}: turn .* token {index} arrived where token 2 was due"):
            await ask_through(None, port)


# ---- before anything is accepted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unavailable", "cancelled", "stream terminated", "worker lost", "ended early"])
async def test_what_was_not_accepted_is_asked_again(how):
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(0, HOWS[how], accept=False)] * 2
    async with serving(servicer) as (_, port):
        _, pieces = await ask_through(servicer, port)
    assert "".join(pieces) == TEXT and [name for name, _ in servicer.calls] == ["Ask", "Abort", "Ask", "Abort", "Ask"]
    assert len({request.turn_id for _, request in servicer.calls}) == 1 and not any(r.said_token_ids for r in servicer.of("Ask"))


async def test_a_full_queue_is_asked_again_when_it_says_so():
    servicer = Scripted()
    servicer.script["Ask"] = [QueueFull("8 turns wait", retry_after_s=0.3)] * 2
    started_s = time.monotonic()
    async with serving(servicer) as (_, port):
        _, pieces = await ask_through(servicer, port)
    assert "".join(pieces) == TEXT and len(servicer.of("Ask")) == 3 and 0.6 <= time.monotonic() - started_s < 3


async def test_a_queue_that_stays_full_is_told(monkeypatch):
    monkeypatch.setattr(call_errors, "MAX_REFUSALS", 2)
    servicer = Scripted()
    servicer.script["Ask"] = [QueueFull("8 turns wait", retry_after_s=0.01)] * 9
    async with serving(servicer) as (_, port):
        with pytest.raises(QueueFull, match=f"127.0.0.1:{port}: 8 turns wait") as told:
            await ask_through(servicer, port)
        assert told.value.retry_after_s == 0.01 and len(servicer.of("Ask")) == 3
        servicer.script["Ask"] = [QueueFull("8 turns wait", retry_after_s=60)]
        with pytest.raises(QueueFull):  # at once: there will be no room before the deadline
            await asyncio.wait_for(ask_through(servicer, port, timeout_s=5), 2)
        assert len(servicer.of("Ask")) == 4


@pytest.mark.parametrize("error", [BadRequest("top_p"), Internal("KeyError"), Cancelled("aborted"), DataLoss("bits")], ids=repr)
@pytest.mark.parametrize("accept", [True, False])
async def test_what_another_attempt_would_not_mend_is_told_at_once(error, accept):
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(0, raises(error), accept)]
    async with serving(servicer) as (_, port):
        with pytest.raises(type(error), match=f"^127.0.0.1:{port}: {error}$"):
            await ask_through(servicer, port)
    assert len(servicer.of("Ask")) == 1


# ---- ends ------------------------------------------------------------------------------------------------------------


async def test_a_server_that_is_not_there_is_told_in_time(monkeypatch, unused_port):
    monkeypatch.setattr(call_errors, "RETRY_FOR_S", 0.5)
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match=f"127.0.0.1:{unused_port}"):
        await ask_through(None, unused_port)
    assert 0.5 <= time.monotonic() - started_s < 5


async def test_a_stream_that_always_breaks_ends(monkeypatch):
    monkeypatch.setattr(call_errors, "RETRY_FOR_S", 0.5)
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(0, HOWS["unavailable"])] * 1000
    async with serving(servicer) as (_, port):
        with pytest.raises(Unavailable, match="going away"):
            await ask_through(servicer, port)
    assert 2 < len(servicer.of("Ask")) < 30


@pytest.mark.parametrize("num", [0, 4])
async def test_the_deadline_ends_a_silent_stream(num):
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(num, lambda context: asyncio.sleep(30))]
    started_s = time.monotonic()
    async with serving(servicer) as (_, port):
        with pytest.raises(DeadlineExceeded, match=f"127.0.0.1:{port}"):
            await ask_through(servicer, port, timeout_s=0.5)
        assert 0.4 < time.monotonic() - started_s < 3 and len(servicer.of("Ask")) == 1
        await asyncio.wait_for(servicer.ended_early.wait(), 5)


async def test_the_deadline_counts_over_all_attempts():
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(1, HOWS["unavailable"])] + [cut_after(0, lambda context: asyncio.sleep(30))]
    started_s = time.monotonic()
    async with serving(servicer) as (_, port):
        with pytest.raises(DeadlineExceeded):
            await ask_through(servicer, port, timeout_s=1)
    assert time.monotonic() - started_s < 3


async def test_leaving_a_stream_aborts_the_turn():
    servicer = Scripted()
    servicer.script["Ask"] = [cut_after(3, lambda context: asyncio.sleep(30))]
    async with serving(servicer) as (_, port), connect(port) as client:
        chat = client.conversation(MEDIA_ID)
        async with aclosing(chat.stream("What?")) as pieces:
            assert await anext(pieces) == "A "
        await asyncio.wait_for(servicer.ended_early.wait(), 5)
        await asyncio.wait_for(servicer.aborted.wait(), 5)
        assert servicer.of("Abort")[0].turn_id == servicer.of("Ask")[0].turn_id and not chat.turns
        assert (await chat.ask("And?")).text == TEXT and servicer.of("Ask")[1].conversation_id == "c0"


async def test_cancelling_a_task_aborts_the_turn():
    servicer, arrived = Scripted(), asyncio.Event()

    async def hang(context):
        arrived.set()
        await asyncio.sleep(30)

    servicer.script["Ask"] = [cut_after(2, hang)]
    async with serving(servicer) as (_, port), connect(port) as client:
        asking = asyncio.create_task(client.ask(MEDIA_ID, "What?"))
        await asyncio.wait_for(arrived.wait(), 10)
        await asyncio.sleep(0.5)  # sent is not read yet: until then the client knows of no conversation to close
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(servicer.ended_early.wait(), 5)
        await asyncio.wait_for(servicer.aborted.wait(), 5)
    assert servicer.of("CloseConversation")[0].conversation_id == "c0"


async def test_closing_ends_what_runs():
    servicer, arrived = Scripted(), asyncio.Event()

    async def hang(context):
        arrived.set()
        await asyncio.sleep(30)

    servicer.script["Ask"] = [cut_after(2, hang)]
    async with serving(servicer) as (_, port):
        client = connect(port)
        asking = asyncio.create_task(client.ask(MEDIA_ID, "What?"))
        await asyncio.wait_for(arrived.wait(), 10)
        await client.close()
        with pytest.raises(Unavailable, match="closed"):
            await asyncio.wait_for(asking, 5)
        await asyncio.wait_for(servicer.ended_early.wait(), 5)
        await client.close()
        with pytest.raises(Unavailable, match="closed"):
            await client.info()
    assert len(servicer.of("Ask")) == 1
