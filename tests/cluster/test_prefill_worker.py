"""A prefill worker with a real engine: chunks leave early, copies stay, whatever ends early gives every byte back."""

import asyncio
import json
import time

import pytest

from sparsevila_cluster.cluster.workers.host_copies import HostCopies
from sparsevila_cluster.core.errors import (
    BadMedia,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    QueueFull,
    TooLarge,
    Unavailable,
)
from sparsevila_cluster.transport import TransferTicket
from tests.cluster import worker_fixtures
from tests.cluster.worker_fixtures import Gate, answer, made, prepared, request_of, settled, ticket_for, turn_of, until

KINDS = ("inproc", "gloo")


def nothing_is_left(prefill, decode):
    assert prefill.copies.used_bytes == 0 and decode.engine.prefixes.arena.used_bytes == 0
    assert prefill.staging is None or prefill.staging.used_bytes == 0


def test_keys_tell_media_tenants_and_the_wire_apart(checkpoint, clips):
    async def main():
        keys = set()
        for transport in ({}, {"quantization": "int8"}):
            async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, transport=transport), decode=0) as (
                [prefill],
                _,
            ):
                keys |= {await prefill.key_of(request_of(clip, tenant=tenant)) for clip in clips for tenant in ("", "a", "b")}
                with pytest.raises(BadMedia):
                    await prefill.key_of(request_of("missing.mp4"))
                with pytest.raises(BadRequest):
                    await prefill.key_of(request_of(clips[0], prune_keep=7))
        assert len(keys) == 12

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_leave_while_later_ones_are_computed(checkpoint, clips, monkeypatch, kind):
    gate = Gate(monkeypatch, start=48)

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, kind)) as ([prefill], [decode]):
            key = await prefill.key_of(request_of(clips[0]))
            making = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, await ticket_for(decode, key)))
            await gate.wait()
            await until(lambda: decode.receiver.info()["bytes_in_flight"] > 0)
            got = ("kv_transfer_bytes_total", "in", kind)
            await until(lambda: decode.sink.counts[got] > 0)
            # Its share counts what the sender has heard of, which is later than what the receiver has.
            await until(lambda: any(job.transfer.received_bytes for job in prefill._jobs.values()))
            assert not making.done() and prefill.num_prefills == 0 and key not in decode.engine.prefixes
            gate.opened.set()
            handle, report, progress = await making
            assert 0 < report["hidden_share"] <= 1 and not handle.reused
            stages = [stage for _, stage, _, _ in progress]
            assert list(dict.fromkeys(stages)) == ["decode", "encode", "prune", "prefill"]
            counts, observed = prefill.sink.counts, prefill.sink.observed
            assert counts[("prefills_total",)] == 1
            assert counts[("visual_tokens_total", "encoded")] == handle.visual_tokens
            assert counts[("visual_tokens_total", "kept")] == handle.visual_tokens_kept
            for name in ("media_decode_seconds", "encode_seconds", "prune_seconds", "prefill_seconds"):
                assert observed[(name,)] == 1
            assert observed[("queue_wait_seconds", "prefill")] == 1

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["decode", "encode", "prune", "prefill"])
def test_leaving_ends_the_prefill_at_its_next_report(checkpoint, clips, stage):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            key = await prefill.key_of(request_of(clips[0]))
            ticket = await ticket_for(decode, key)
            stream = prefill.make(request_of(clips[0]), key, ticket)
            async for _, at, *_ in stream:
                if at == stage:
                    break
            await stream.aclose()
            await decode.release(ticket.transfer_id)
            await settled(prefill)
            await settled(decode)
            if prefill.num_prefills == 0:
                nothing_is_left(prefill, decode)
            handle, _ = await prepared(prefill, decode, request_of(clips[0]))
            assert await answer(decode, turn_of(handle.media_id)) and prefill.num_prefills <= 2

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_in_mid_prefill_frees_both_sides(checkpoint, clips, monkeypatch, kind):
    gate = Gate(monkeypatch)

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, kind)) as ([prefill], [decode]):
            key = await prefill.key_of(request_of(clips[0]))
            ticket = await ticket_for(decode, key)
            asking = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, ticket))
            await gate.wait()
            await until(lambda: decode.engine.prefixes.arena.used_bytes > 0)
            assert prefill.copies.used_bytes > 0
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            gate.opened.set()
            await settled(prefill)
            await settled(decode)
            nothing_is_left(prefill, decode)
            assert prefill.num_prefills == 0 and decode.receiver.state(ticket.transfer_id).terminal

    asyncio.run(main())


def test_media_that_cannot_be_used_and_copies_that_do_not_fit(checkpoint, clips, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("this is no video")

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            ticket = await ticket_for(decode, "k")
            for request, error in (
                (request_of(text), BadMedia),
                (request_of(clips[0], max_frames=100_000), TooLarge),
                (request_of(clips[0], deadline_s=1e-6), DeadlineExceeded),
            ):
                with pytest.raises(error):
                    await made(prefill, request, "k", ticket)
            await settled(prefill)
            nothing_is_left(prefill, decode)
            size = (await prepared(prefill, decode, request_of(clips[0])))[0].kv_bytes
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, prefill={"copy_bytes": size // 2})) as (
            [prefill],
            [decode],
        ):
            with pytest.raises(TooLarge, match="a prefill worker keeps"):
                await prepared(prefill, decode, request_of(clips[0]))
            nothing_is_left(prefill, decode)
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, prefill={"copy_bytes": int(size * 1.5)})) as (
            [prefill],
            [decode],
        ):
            one, _ = await prepared(prefill, decode, request_of(clips[0]))
            assert prefill.copies.hold(one.media_id) and not await prefill.drop(one.media_id)
            with pytest.raises(QueueFull, match="being made or sent"):
                await prepared(prefill, decode, request_of(clips[1]))
            prefill.copies.release(one.media_id)
            assert prefill.report(False).residents is not None and prefill.report(False).residents is None
            two, _ = await prepared(prefill, decode, request_of(clips[1]))
            report = prefill.report(False)
            assert [handle.media_id for handle in report.residents] == [two.media_id] and report.address is None
            assert report.load.prefix_bytes == two.kv_bytes
            assert await prefill.drop(two.media_id) and not await prefill.drop(two.media_id)
            assert prefill.report(False).residents == ()

    asyncio.run(main())


def test_rows_computed_elsewhere_are_copied_to_the_host_as_they_become_final(checkpoint, clips):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), decode=2) as ([prefill], [one, two]):
            prefill.staging = HostCopies(prefill.model.spec, 2**20)
            handle, _ = await prepared(prefill, one, request_of(clips[0]))
            assert prefill.staging.used_bytes == 0 and prefill.copies.used_bytes == handle.kv_bytes
            await prefill.ship(handle.media_id, await ticket_for(two, handle.media_id))
            rows = [worker_fixtures.rows_of(decode.engine.prefixes.get(handle.media_id)) for decode in (one, two)]
            assert all(a.equal(b) for a, b in zip(*rows, strict=True))
            with pytest.raises(BadMedia):
                await made(prefill, request_of("missing.mp4"), "k", await ticket_for(one, "k"))
            assert prefill.staging.used_bytes == 0

    asyncio.run(main())


def test_a_prefill_that_says_nothing_fails_the_check_and_keys_do_not_wait_for_it(checkpoint, clips, monkeypatch):
    gate = Gate(monkeypatch)

    async def main():
        config = worker_fixtures.config_of(checkpoint, engine={"prepare_timeout_s": 5.0, "max_waiting": 1})
        async with worker_fixtures.workers(config) as ([prefill], [decode]):
            await prefill.check()
            key = await prefill.key_of(request_of(clips[0]))
            making = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, await ticket_for(decode, key)))
            await gate.wait()
            assert await prefill.key_of(request_of(clips[1])) != key
            waiting = asyncio.ensure_future(prepared(prefill, decode, request_of(clips[1])))
            await until(lambda: prefill.report(False).load.num_waiting == 1)
            assert prefill.report(False).load.num_running == 1
            with pytest.raises(QueueFull, match="the limit is 1"):
                await prepared(prefill, decode, request_of(clips[0], max_frames=3))
            monkeypatch.setattr(prefill.async_engine, "_last_report_s", time.perf_counter() - 6)
            with pytest.raises(Internal, match="no progress"):
                await prefill.check()
            gate.opened.set()
            await making
            assert (await waiting)[1]["num_bytes"] > 0
            await prefill.check()
            json.dumps(await prefill.info())
            assert prefill.num_prefills == 2

    asyncio.run(main())


def test_closing_in_mid_prefill_frees_everything(checkpoint, clips, monkeypatch):
    gate = Gate(monkeypatch)

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            key = await prefill.key_of(request_of(clips[0]))
            making = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, await ticket_for(decode, key)))
            waiting = asyncio.ensure_future(prepared(prefill, decode, request_of(clips[1])))
            await gate.wait()
            closing = asyncio.ensure_future(prefill.close())
            await asyncio.sleep(0.05)
            gate.opened.set()
            await closing
            for one in (making, waiting):
                with pytest.raises((Unavailable, Cancelled)):
                    await one
            await settled(decode)
            nothing_is_left(prefill, decode)
            prefill.copies.check_integrity()
            ticket = TransferTicket("t", decode.receiver.address, 1.0)
            for call in (prefill.check(), prefill.key_of(request_of(clips[0])), prefill.ship(key, ticket)):
                with pytest.raises(Unavailable):
                    await call

    asyncio.run(main())
