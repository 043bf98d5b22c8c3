"""What becomes of a media prefix whose transfer fails: the prefill ends well, the copy stays, no byte is lost on either side."""

import asyncio
import uuid

import pytest

from sparsevila_cluster.core.errors import LaneLost, NotFound, QueueFull, SparseVilaError
from sparsevila_cluster.transport import TransferTicket
from tests.cluster import worker_fixtures
from tests.cluster.worker_fixtures import Gate, answer, landed, made, request_of, settled, ticket_for, turn_of, until


def test_a_lane_that_breaks_does_not_end_the_prefill(checkpoint, clips, monkeypatch):
    """The worker at the other end is gone in mid-prefill: the error names it, and the copy goes elsewhere as it is."""
    gate = Gate(monkeypatch)

    async def main():
        config = worker_fixtures.config_of(checkpoint, "gloo", transport={"dial_timeout_s": 0.5, "op_timeout_s": 2.0})
        async with worker_fixtures.workers(config, decode=2) as ([prefill], [gone, other]):
            key = await prefill.key_of(request_of(clips[0]))
            making = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, await ticket_for(gone, key)))
            await gate.wait()
            await until(lambda: gone.engine.prefixes.arena.used_bytes > 0)
            await gone.close()
            gate.opened.set()
            with pytest.raises(LaneLost, match="decode-0"):
                await making
            await settled(prefill)
            (copy,) = prefill.copies.all()
            assert copy.key == key and prefill.num_prefills == 1
            await prefill.ship(key, await ticket_for(other, key, num_bytes=copy.kv_bytes))
            assert await answer(other, turn_of(key))
            assert prefill.sink.counts[("prefills_total",)] == 1
            with pytest.raises(LaneLost, match="decode-0"):
                await prefill.ship(key, TransferTicket("t", gone.receiver.address, 5.0))

    asyncio.run(main())


def test_a_lane_that_breaks_is_built_anew(checkpoint, clips, monkeypatch):
    gate = Gate(monkeypatch, start=32)

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, "gloo")) as ([prefill], [decode]):
            key = await prefill.key_of(request_of(clips[0]))
            making = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, await ticket_for(decode, key)))
            await gate.wait()
            await until(lambda: decode.sink.counts[("kv_transfer_bytes_total", "in", "gloo")] > 0)
            for lane in decode.receiver._all_lanes():
                lane.fail(LaneLost("cut by a test"))
            gate.opened.set()
            _, report, _ = await making
            assert report["attempts"] == 2 and prefill.num_prefills == 1
            rows = worker_fixtures.rows_of(decode.engine.prefixes.get(key))
            assert all(a.equal(b) for a, b in zip(rows, worker_fixtures.rows_of(prefill.copies.all()[0]), strict=True))
            assert decode.engine.prefixes.arena.used_bytes == prefill.copies.used_bytes

    asyncio.run(main())


def test_a_transfer_that_is_given_up_over_there_leaves_the_copy(checkpoint, clips, monkeypatch):
    gate = Gate(monkeypatch)

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            key = await prefill.key_of(request_of(clips[0]))
            ticket = await ticket_for(decode, key)
            making = asyncio.ensure_future(made(prefill, request_of(clips[0]), key, ticket))
            await gate.wait()
            await until(lambda: decode.engine.prefixes.arena.used_bytes > 0)
            await decode.release(ticket.transfer_id)
            await decode.release(ticket.transfer_id)
            gate.opened.set()
            with pytest.raises(SparseVilaError, match=ticket.transfer_id):
                await making
            await settled(decode)
            assert decode.engine.prefixes.arena.used_bytes == 0 and len(prefill.copies.all()) == 1
            await prefill.ship(key, await ticket_for(decode, key))
            assert key in decode.engine.prefixes and prefill.num_prefills == 1

    asyncio.run(main())


def test_what_the_other_end_refuses_is_told_and_the_copy_stays(checkpoint, clips):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            size = (await landed(prefill, decode, request_of(clips[1])))[0].kv_bytes
        config = worker_fixtures.config_of(checkpoint, engine={"prefix_bytes": int(size * 1.5)})
        async with worker_fixtures.workers(config) as ([prefill], [decode]):
            first, _ = await landed(prefill, decode, request_of(clips[1]))
            await decode._desk.hold(first.media_id)
            key = await prefill.key_of(request_of(clips[0]))
            with pytest.raises(QueueFull):
                await made(prefill, request_of(clips[0]), key, await ticket_for(decode, key))
            decode._desk.let_go(first.media_id)
            # The lease of a ticket is over before anything comes; nobody expects another one.
            late = await ticket_for(decode, key, lease_s=0.1)
            await until(lambda: decode.receiver.state(late.transfer_id).terminal)
            for ticket in (late, TransferTicket(uuid.uuid4().hex, decode.receiver.address, 5.0)):
                with pytest.raises(NotFound):
                    await prefill.ship(key, ticket)
            with pytest.raises(NotFound, match="no copy"):
                await prefill.ship("unknown", late)
            assert len(prefill.copies.all()) == 2 and prefill.num_prefills == 2
            await prefill.ship(key, await ticket_for(decode, key))
            assert decode.engine.prefixes.num_evicted == 1

    asyncio.run(main())
