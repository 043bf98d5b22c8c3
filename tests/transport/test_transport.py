"""Every kind of link carries prefixes the same way: one class of tests for all of them."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import BadConfig, DeadlineExceeded, QueueFull
from sparsevila_cluster.transport import TRANSPORTS, KVReceiver, KVSender, TransferState, TransferTicket
from sparsevila_cluster.transport.manifest import layer_row_bytes
from tests.transport.transport_fixtures import (
    BOUNDS,
    FINE,
    SPEC,
    DictObjectStore,
    Pair,
    StoreSink,
    assert_same_metadata,
    make_prefix,
    rows_equal,
    until,
)


class TestEveryKind:
    @pytest.mark.smoke
    def test_a_prefix_arrives_as_it_was(self, pair, kind):
        sent = make_prefix()
        report = pair.send(sent, BOUNDS)
        came = pair.resident(sent.key)
        assert rows_equal(sent, came) and came.extent.arena is not sent.extent.arena
        assert_same_metadata(came.metadata, sent.metadata)
        assert torch.equal(came.visual_index, sent.visual_index)
        assert (report.kind, report.attempts, report.epoch, report.num_bytes) == (kind, 1, 1, sent.kv_bytes)
        pair.settle(sent.kv_bytes)
        assert pair.tally.counts["kv_transfer_bytes_total", "in", kind] == sent.kv_bytes
        assert pair.tally.counts["kv_transfers_total", "acked"] == 1

    @pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1023])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_length_and_dtype(self, kind, length, dtype, monkeypatch):
        spec = replace(SPEC, dtype=dtype)
        monkeypatch.setattr("tests.transport.transport_fixtures.SPEC", spec)
        pair = Pair(kind, spec=spec, **FINE)
        pair.prefix_sink = pair.receiver._prefix_sink = StoreSink(2000, spec)
        try:
            sent = make_prefix(length=length, spec=spec)
            pair.send(sent, sorted({0, length // 3, length}))
            assert rows_equal(sent, pair.resident(sent.key))
        finally:
            pair.close()

    def test_rows_leave_while_others_are_being_written(self, fine):
        sent = make_prefix()
        transfer = fine.begin(sent, BOUNDS)
        written = 0
        for start, stop in ((0, 1100), (1100, 1500)):
            for layer in range(SPEC.num_layers):
                transfer.wrote(layer, start, stop)
                written += (stop - start) * layer_row_bytes(SPEC)
                until(lambda written=written: transfer.received_bytes == written, "what was written has arrived")
        report = transfer.finish(5.0)
        assert 0.5 < report.hidden_share < 1.0
        assert rows_equal(sent, fine.resident(sent.key))

    def test_nothing_leaves_before_it_is_final(self, pair):
        sent = make_prefix()
        transfer = pair.begin(sent, BOUNDS)
        final = [rows.clone() for rows in sent.extent.rows(2)]
        for rows in sent.extent.rows(2):
            rows.zero_()
        for layer in (0, 1):
            transfer.wrote(layer, 0, 1500)
        time.sleep(0.1)
        for rows, value in zip(sent.extent.rows(2), final, strict=True):
            rows.copy_(value)
        transfer.wrote(2, 0, 1500)
        transfer.finish(5.0)
        assert rows_equal(sent, pair.resident(sent.key))

    def test_rows_that_nobody_wrote_end_at_the_deadline(self, pair):
        transfer = pair.begin(make_prefix(), BOUNDS)
        transfer.wrote(0, 0, 1500)
        transfer.wrote(1, 1100, 1500)  # a hole before it
        with pytest.raises(DeadlineExceeded, match="0 of 1500 rows were written"):
            transfer.finish(0.3)
        pair.settle()
        assert pair.receiver.state(transfer.transfer_id) is TransferState.ABORTED

    def test_several_at_once_share_a_lane(self, fine):
        sent = [make_prefix(key=str(i), length=600, seed=i) for i in range(5)]
        transfers = [fine.begin(one) for one in sent]
        for transfer in transfers:
            transfer.wrote_all()
        assert {transfer.finish(5.0).epoch for transfer in transfers} == {1}
        assert all(rows_equal(one, fine.resident(one.key)) for one in sent)
        assert len(fine.receiver.info()["lanes"]) == 1

    def test_a_transfer_that_waits_holds_no_other_up(self, fine):
        slow, quick = make_prefix("slow"), make_prefix("quick", seed=1)
        waiting = fine.begin(slow, BOUNDS)
        waiting.wrote(0, 0, 1100)
        fine.send(quick)
        waiting.wrote_all()
        waiting.finish(5.0)
        assert rows_equal(slow, fine.resident("slow")) and rows_equal(quick, fine.resident("quick"))

    def test_no_more_is_sent_than_was_granted(self, kind):
        pair = Pair(kind, credits=2, **FINE)
        try:
            transfer = pair.begin(make_prefix(), BOUNDS)
            pair.prefix_sink.gate.clear()
            second = pair.begin(make_prefix("b", seed=1), BOUNDS)
            second.wrote_all()
            time.sleep(0.3)  # without an extent over there nothing of it leaves
            assert second.received_bytes == 0 and pair.tally.counts["kv_transfer_bytes_total", "out", kind] == 0
            pair.prefix_sink.gate.set()
            second.finish(5.0)
            transfer.abort("enough")
            pair.settle(second.prefix.kv_bytes)
        finally:
            pair.close()

    def test_int8_stays_within_half_a_step(self, kind):
        pair = Pair(kind, quantization="int8")
        try:
            sent = make_prefix()
            for rows in sent.extent.rows(1):
                rows[:4] = 0.0  # rows whose scale is 0
            report = pair.send(sent, BOUNDS)
            came = pair.resident(sent.key)
            assert report.num_bytes == sent.kv_bytes // 4 + sent.kv_bytes // 4 // SPEC.head_dim * 4
            for layer in range(SPEC.num_layers):
                for before, after in zip(sent.extent.rows(layer), came.extent.rows(layer), strict=True):
                    scale = before.abs().amax(-1, keepdim=True) / 127
                    assert ((before - after).abs() <= scale * 0.5001).all()
                    assert not torch.equal(before, after)
        finally:
            pair.close()

    def test_without_checksums(self, kind):
        pair = Pair(kind, checksum=False)
        try:
            sent = make_prefix()
            pair.send(sent, BOUNDS)
            assert rows_equal(sent, pair.resident(sent.key))
        finally:
            pair.close()

    def test_an_idle_lane_makes_way(self, kind):
        object_store = DictObjectStore()
        pair = Pair(kind, object_store, max_lanes=1)
        prefix_sink = StoreSink()
        other = KVReceiver("decode-1", prefix_sink, SPEC, pair.config, object_store=object_store)
        object_store.receivers["decode-1"] = other
        try:
            for turn in range(2):
                pair.send(make_prefix(key=f"here {turn}", length=50))
                other.expect(f"there {turn}", f"there {turn}", 5.0)
                prefix = make_prefix(key=f"there {turn}", length=50)
                transfer = pair.sender.begin(prefix, (0, 50), TransferTicket(f"there {turn}", other.address, 5.0))
                transfer.wrote_all()
                transfer.finish(5.0)
                assert [lane["receiver"] for lane in pair.sender.info()["lanes"]] == ["decode-1"]
            until(lambda: not pair.receiver.info()["lanes"], "the first receiver lost its lane")
        finally:
            pair.close()
            other.close()

    def test_a_receiver_whose_lanes_are_all_busy(self, kind):
        pair = Pair(kind, max_lanes=1, **FINE)
        second = KVSender("prefill-1", pair.config, object_store=pair.object_store)
        try:
            transfer = pair.begin(make_prefix(), BOUNDS)
            transfer.wrote(0, 0, 1500)
            until(lambda: transfer.received_bytes > 0, "some of it has landed")
            late = second.begin(make_prefix("b"), BOUNDS, pair.ticket("b"))
            with pytest.raises(QueueFull, match="1 lanes, none of them idle"):
                late.finish(5.0)
            transfer.wrote_all()
            transfer.finish(5.0)
        finally:
            second.close()
            pair.close()

    def test_a_lane_can_be_built_ahead(self, pair):
        pair.sender.warm(pair.receiver.address, 5.0)
        assert pair.sender.info()["lanes"][0]["up"]
        pair.send(make_prefix())
        assert pair.sender.info()["lanes"][0]["epoch"] == 1
        pair.sender.forget(pair.receiver.address)
        assert pair.sender.info()["lanes"] == []

    def test_no_thread_is_left(self, kind):
        before = set(threading.enumerate())
        pair = Pair(kind)
        pair.send(make_prefix())
        pair.close()
        until(lambda: not set(threading.enumerate()) - before, "threads end")

    def test_idle_lanes_stay(self, kind):
        pair = Pair(kind, silence_s=1.0)
        try:
            pair.send(make_prefix())
            time.sleep(2.2)
            pair.send(make_prefix("b"))
            assert pair.sender.info()["lanes"][0]["epoch"] == 1
            assert pair.tally.counts["kv_lane_rebuild_total",] == 0
        finally:
            pair.close()


def test_a_kind_that_is_not_in_the_table():
    config = TransportConfig(kind="pigeon")
    for build in (lambda: KVReceiver("d", StoreSink(10), SPEC, config), lambda: KVSender("p", config)):
        with pytest.raises(BadConfig, match="'auto', 'inproc', 'gloo', 'nccl' or 'objectstore', got 'pigeon'"):
            build()


def test_another_kind_is_one_row(monkeypatch):
    monkeypatch.setitem(TRANSPORTS, "pigeon", TRANSPORTS["inproc"])
    pair = Pair("pigeon")
    try:
        sent = make_prefix()
        pair.send(sent, BOUNDS)
        assert pair.receiver.address.kind == "pigeon" and rows_equal(sent, pair.resident(sent.key))
    finally:
        pair.close()


def test_kinds_that_cannot_serve_say_so():
    prefix_sink = StoreSink(10)
    with pytest.raises(BadConfig, match="objectstore needs an object store"):
        KVReceiver("d", prefix_sink, SPEC, TransportConfig(kind="objectstore"))
    if not torch.cuda.is_available():
        with pytest.raises(BadConfig, match="nccl needs KV on a GPU"):
            KVReceiver("d", prefix_sink, SPEC, TransportConfig(kind="nccl"))


def test_auto_is_gloo_on_a_processor():
    receiver = KVReceiver("d", StoreSink(10), SPEC, TransportConfig())
    assert receiver.address.kind == "gloo" and receiver.address.host == "127.0.0.1"
    receiver.close()
