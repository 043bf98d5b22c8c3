"""A decode worker with a real engine: tickets, turns told in lists, conversations made again, brownout, health, closing."""

import asyncio
import json
import threading
import time
import uuid
from dataclasses import replace

import pytest
import torch

from sparsevila_cluster.cluster.directory import Directory
from sparsevila_cluster.core.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    QueueFull,
    SparseVilaError,
    TooLarge,
    Unavailable,
)
from sparsevila_cluster.engine.async_engine import queue_pressure
from tests.cluster import worker_fixtures
from tests.cluster.worker_fixtures import answer, events_of, prepared, request_of, turn_of, until


def test_turns_are_told_in_lists_and_the_first_token_is_not_delayed(checkpoint, clips, endless):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            stream = decode.ask(turn_of(handle.media_id, max_tokens=60))
            first = await anext(stream)
            if first[-1].kind == "accepted":
                first += await anext(stream)
            # The answer is still being made when its first token is told.
            assert [event.kind for event in first[:2]] == ["accepted", "token"] and first[-1].index < 40
            await until(lambda: not decode.engine.turns)
            events, sizes = await events_of(stream)
            assert sizes[:-1] == [8] * (len(sizes) - 1) and 1 <= sizes[-1] <= 8  # all of it was there already
            assert [event.index for event in [*first, *events] if event.kind == "token"] == list(range(60))
            assert events[-1].kind == "done"

    asyncio.run(main())


def test_only_its_tenant_closes_a_conversation(checkpoint, clips, endless):
    """Also while its first turn runs, when no journal knows it."""

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            stream = decode.ask(turn_of(handle.media_id, max_tokens=2000, tenant="ann", owner="ann"))
            assert decode.report(False).owners == frozenset()
            await anext(stream)
            assert decode.report(False).owners == {"ann"}
            for stranger in ("bob", ""):
                assert not await decode.close_conversation("c", stranger) and decode.engine.turns
            await stream.aclose()
            await until(lambda: not decode.engine.turns)
            tokens = await answer(decode, turn_of(handle.media_id, tenant="ann"))
            assert not await decode.close_conversation("c", "bob") and len(decode.report(True).records) == 1
            assert await decode.close_conversation("c", "ann") and not decode.report(True).records
            assert tokens == await answer(decode, turn_of(handle.media_id, tenant="ann"))
            assert await decode.close_conversation("c")

    asyncio.run(main())


def test_leaving_a_stream_aborts_the_turn_and_frees_it(checkpoint, clips, endless):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            before = decode.engine.conversations.arena.used_bytes
            stream = decode.ask(turn_of(handle.media_id, max_tokens=2000))
            await anext(stream)
            assert decode.engine.turns
            await stream.aclose()
            await until(lambda: not decode.engine.turns)
            assert not len(decode.engine.conversations), "nobody may have heard of a conversation whose first turn was left"
            assert not await decode.close_conversation("c")
            assert decode.engine.conversations.arena.used_bytes == before == 0
            # The same by name, and by deadline: the reader is told.
            for turn, end, error in (
                (turn_of(handle.media_id, max_tokens=2000), lambda turn: decode.abort(turn.turn_id), Cancelled),
                (turn_of(handle.media_id, max_tokens=2000, deadline_s=0.5), lambda turn: asyncio.sleep(0), DeadlineExceeded),
            ):
                stream = decode.ask(turn)
                told = await anext(stream)
                await end(turn)
                with pytest.raises(error):
                    async for events in stream:
                        told += events
                # What was said before the end is told before the error.
                assert [event.index for event in told[1:]] == list(range(len(told) - 1))
            assert not await decode.abort("nobody")
            assert decode.report(full=True).records == ()

    asyncio.run(main())


def test_a_refused_turn_does_not_end_another_one_of_its_name(checkpoint, clips, endless):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            turn = turn_of(handle.media_id, max_tokens=100)
            first = asyncio.ensure_future(answer(decode, turn))
            await until(lambda: turn.turn_id in decode.engine.turns)
            with pytest.raises(BadRequest, match="already in use"):
                await answer(decode, replace(turn, conversation_id="d"))
            with pytest.raises(NotFound, match="not resident"):
                await answer(decode, turn_of("nothing"))
            assert len(await first) == 100

    asyncio.run(main())


def test_a_ticket_is_refused_at_once_when_there_could_be_no_room(checkpoint, clips, endless):
    async def main():
        probe = worker_fixtures.config_of(checkpoint)
        async with worker_fixtures.workers(probe, model=endless) as ([prefill], [decode]):
            size = (await prepared(prefill, decode, request_of(clips[0])))[0].kv_bytes
        config = worker_fixtures.config_of(checkpoint, engine={"prefix_bytes": int(size * 1.5)})
        async with worker_fixtures.workers(config, model=endless) as ([prefill], [decode]):
            with pytest.raises(TooLarge, match="prefix_bytes"):
                await decode.reserve("t", "k", 2 * size, 5.0)
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            assert await decode.reserve("idle", "k", size, 5.0)  # an idle prefix makes way
            stream = decode.ask(turn_of(handle.media_id, max_tokens=2000))
            await anext(stream)
            with pytest.raises(QueueFull, match="in use"):
                await decode.reserve("busy", "k", size, 5.0)
            assert await decode.reserve("small", "k", size // 3, 5.0) and await decode.reserve("unknown", "k", None, 5.0)
            with pytest.raises(BadRequest, match="before"):
                await decode.reserve("small", "k", size // 3, 5.0)
            assert decode.receiver.info()["transfers"] == {"acked": 1, "reserved": 3}
            for name in ("idle", "small", "unknown", "idle", "never"):
                await decode.release(name)
            assert decode.receiver.info()["transfers"] == {"acked": 1, "aborted": 3}
            await stream.aclose()

    asyncio.run(main())


def test_reports_tell_residents_when_they_change_and_everything_when_asked(checkpoint, clips):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            assert decode.report(False).residents == () and decode.report(False).residents is None
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            report = decode.report(False)
            (told,) = report.residents
            assert (told.media_id, told.kv_bytes) == (handle.media_id, handle.kv_bytes) and report.records is None
            assert report.load.prefix_bytes == handle.kv_bytes and report.address == decode.receiver.address
            await answer(decode, turn_of(handle.media_id))
            report = decode.report(False)
            assert report.residents is None and report.load.num_running == 0 and report.load.turn_bytes > 0
            full = decode.report(True)
            assert full.residents == (told,) and full.records[0].conversation_id == "c"
            values = decode.sink.values
            assert values[("media_objects", "decode")] == 1 and values[("conversations",)] == 1
            assert values[("kv_bytes", "decode", "prefixes")] == handle.kv_bytes
            assert values[("kv_bytes", "decode", "parked")] == 0
            assert values[("kv_budget_bytes", "decode", "parked")] == decode.config.engine.parked_bytes
            info = json.loads(json.dumps(await decode.info()))
            assert info["residents"] == [handle.media_id] and info["conversations"] == 1
            (lane,) = info["lanes"]
            assert (lane["direction"], lane["peer"], lane["kind"]) == ("in", prefill.name, "inproc")
            (lane,) = json.loads(json.dumps(await prefill.info()))["lanes"]
            assert (lane["direction"], lane["peer"], lane["kind"]) == ("out", decode.name, "inproc")
            directory = Directory()
            assert directory.report(report).send_all and not directory.report(full).send_all
            assert not directory.report(prefill.report(True)).send_all
            assert [one.worker for one in directory.holders(handle.media_id)] == [decode.name]
            assert [one.worker for one in directory.copies(handle.media_id)] == [prefill.name]
            assert directory.history("c").records == full.records[0].records
            assert await decode.drop(handle.media_id) and not await decode.drop(handle.media_id)
            assert decode.report(False).residents == ()

    asyncio.run(main())


def test_the_line_presses_in_proportion_and_lets_go(checkpoint, clips, endless):
    assert [queue_pressure(line, 10, 0.5) for line in (0, 5, 6, 10, 20)] == pytest.approx([0, 0, 0.2, 1, 1])
    assert queue_pressure(10, 10, 1.0) == 0.0

    async def main():
        config = worker_fixtures.config_of(checkpoint, engine={"max_batch": 1, "max_waiting": 4}, decode={"brownout_at": 0.25})
        async with worker_fixtures.workers(config, model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            turns = [turn_of(handle.media_id, conversation=str(i), max_tokens=40) for i in range(4)]
            asking = [asyncio.ensure_future(events_of(decode.ask(turn))) for turn in turns]
            usages = [(await one)[0][-1].usage for one in asking]
            assert max(usage.brownout for usage in usages) > 0 and any(usage.degraded for usage in usages)
            assert decode.engine.brownout == 0.0
            await decode.set_brownout(0.7)
            (events, _) = await events_of(decode.ask(turn_of(handle.media_id, conversation="x")))
            assert events[-1].usage.brownout == 0.7 and decode.engine.brownout == 0.7
            await decode.set_brownout(0.0)
            with pytest.raises(BadRequest):
                await decode.set_brownout(2.0)
            assert decode.sink.counts[("retrieval_degraded_total",)] >= 2

    asyncio.run(main())


def test_warming_leaves_nothing(checkpoint):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            await prefill.warm([decode.receiver.address])
            await decode.warm()
            assert decode.receiver.info()["lanes"] and prefill.num_prefills == 0 and prefill.copies.used_bytes == 0
            assert decode.engine.num_steps >= 2 and len(decode.engine.prefixes) == len(decode.engine.conversations) == 0
            assert not decode.sink.counts and decode.report(True).records == ()

    asyncio.run(main())


def test_a_stuck_engine_and_a_closed_worker_fail_the_check(checkpoint):
    async def main():
        config = worker_fixtures.config_of(checkpoint, engine={"turn_timeout_s": 0.2})
        async with worker_fixtures.workers(config) as (_, [decode]):
            await decode.check()
            go_on = threading.Event()
            stuck = decode.async_engine.post(lambda engine: go_on.wait(10))
            try:
                await until(lambda: decode.async_engine._thread.stuck_s > 0.2)
                with pytest.raises(Internal, match="a turn may take 0.2 s"):
                    await decode.check()
                with pytest.raises(DeadlineExceeded):
                    await decode.abort("x")
            finally:
                go_on.set()
            await asyncio.wrap_future(stuck)
            await until(lambda: decode.async_engine._thread.stuck_s == 0.0)
            await decode.check()
            await decode.close()
            with pytest.raises(Unavailable):
                await decode.check()

    asyncio.run(main())


def test_closing_does_not_wait_for_an_engine_that_is_stuck(checkpoint):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, engine={"close_timeout_s": 0.2})) as (_, [decode]):
            go_on = threading.Event()
            decode.async_engine.post(lambda engine: go_on.wait(20))
            began_s = time.monotonic()
            with pytest.raises(DeadlineExceeded, match="0.2 s"):
                await decode.close()
            assert time.monotonic() - began_s < 5
            go_on.set()

    asyncio.run(main())


def test_closing_ends_turns_and_frees_everything(checkpoint, clips, endless):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            await answer(decode, turn_of(handle.media_id, conversation="idle"))
            stream = decode.ask(turn_of(handle.media_id, max_tokens=2000))
            await anext(stream)
            await decode.reserve(uuid.uuid4().hex, "k", None, 60.0)
            await decode.close()
            await decode.close()
            with pytest.raises(Unavailable):
                await events_of(stream)
            for call in (decode.ask(turn_of(handle.media_id)).__anext__(), decode.reserve("t", "k", None, 1.0), decode.drop("k")):
                with pytest.raises(Unavailable):
                    await call

    asyncio.run(main())


def test_an_engine_error_ends_one_batch_and_not_the_worker(checkpoint, clips, endless, monkeypatch):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), model=endless) as ([prefill], [decode]):
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            wanted = await answer(decode, turn_of(handle.media_id, conversation="a"))
            with monkeypatch.context() as broken:
                broken.setattr(decode.engine, "_forward", lambda batch: torch.empty(0).mean(5))
                with pytest.raises(SparseVilaError) as raised:
                    await answer(decode, turn_of(handle.media_id, conversation="b"))
                assert isinstance(raised.value, Internal)
            assert await answer(decode, turn_of(handle.media_id, conversation="b")) == wanted

    asyncio.run(main())
