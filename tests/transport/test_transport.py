"""Every kind of link carries prefixes the same way: one class of tests for all of them."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import BadConfig, DeadlineExceeded, QueueFull
from sparsevila_cluster.transport import KVReceiver, KVSender, TransferState, TransferTicket
from tests.transport.transport_fixtures import BOUNDS, FINE, SPEC, Cupboard, Harbour, Quay, make_prefix, rows_equal, until


class TestEveryKind:
    @pytest.mark.smoke
    def test_a_prefix_arrives_as_it_was(self, harbour, kind):
        sent = make_prefix()
        report = harbour.send(sent, BOUNDS)
        came = harbour.resident(sent.key)
        assert rows_equal(sent, came) and came.extent.arena is not sent.extent.arena
        for name in ("is_visual", "positions", "token_map", "visual_index"):
            assert torch.equal(getattr(came, name), getattr(sent, name)), name
        plain = "next_pos generation_floor grids media frames times_s kind num_frames duration_s num_visual tenant spec"
        for name in plain.split():
            assert getattr(came, name) == getattr(sent, name), name
        assert (report.kind, report.attempts, report.epoch, report.num_bytes) == (kind, 1, 1, sent.kv_bytes)
        harbour.settle(sent.kv_bytes)
        assert harbour.tally.counts["kv_transfer_bytes_total", "in", kind] == sent.kv_bytes
        assert harbour.tally.counts["kv_transfers_total", "acked"] == 1

    @pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 1023])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_length_and_dtype(self, kind, length, dtype, monkeypatch):
        spec = replace(SPEC, dtype=dtype)
        monkeypatch.setattr("tests.transport.transport_fixtures.SPEC", spec)
        harbour = Harbour(kind, spec=spec, **FINE)
        harbour.quay = harbour.dock._landing = Quay(2000, spec)
        try:
            sent = make_prefix(length=length, spec=spec)
            harbour.send(sent, sorted({0, length // 3, length}))
            assert rows_equal(sent, harbour.resident(sent.key))
        finally:
            harbour.close()

    def test_rows_leave_while_others_are_being_written(self, fine):
        sent = make_prefix()
        shipment = fine.begin(sent, BOUNDS)
        for start, stop in ((0, 1100), (1100, 1500)):
            for layer in range(SPEC.num_layers):
                before = shipment.landed_bytes
                shipment.wrote(layer, start, stop)
                until(lambda before=before: shipment.landed_bytes > before, "what was written has landed")
        report = shipment.finish(5.0)
        assert 0.5 < report.hidden_share < 1.0
        assert rows_equal(sent, fine.resident(sent.key))

    def test_nothing_leaves_before_it_is_final(self, harbour):
        sent = make_prefix()
        shipment = harbour.begin(sent, BOUNDS)
        final = [rows.clone() for rows in sent.extent.rows(2)]
        for rows in sent.extent.rows(2):
            rows.zero_()
        for layer in (0, 1):
            shipment.wrote(layer, 0, 1500)
        time.sleep(0.1)
        for rows, value in zip(sent.extent.rows(2), final, strict=True):
            rows.copy_(value)
        shipment.wrote(2, 0, 1500)
        shipment.finish(5.0)
        assert rows_equal(sent, harbour.resident(sent.key))

    def test_rows_that_nobody_wrote_end_at_the_deadline(self, harbour):
        shipment = harbour.begin(make_prefix(), BOUNDS)
        shipment.wrote(0, 0, 1500)
        shipment.wrote(1, 1100, 1500)  # a hole before it
        with pytest.raises(DeadlineExceeded, match="0 of 1500 rows were written"):
            shipment.finish(0.3)
        harbour.settle()
        assert harbour.dock.state(shipment.transfer_id) is TransferState.ABORTED

    def test_several_at_once_share_a_lane(self, fine):
        sent = [make_prefix(key=str(i), length=600, seed=i) for i in range(5)]
        shipments = [fine.begin(one) for one in sent]
        for shipment in shipments:
            shipment.wrote_all()
        assert {shipment.finish(5.0).epoch for shipment in shipments} == {1}
        assert all(rows_equal(one, fine.resident(one.key)) for one in sent)
        assert len(fine.dock.info()["lanes"]) == 1

    def test_a_transfer_that_waits_holds_no_other_up(self, fine):
        slow, quick = make_prefix("slow"), make_prefix("quick", seed=1)
        waiting = fine.begin(slow, BOUNDS)
        waiting.wrote(0, 0, 1100)
        fine.send(quick)
        waiting.wrote_all()
        waiting.finish(5.0)
        assert rows_equal(slow, fine.resident("slow")) and rows_equal(quick, fine.resident("quick"))

    def test_no_more_is_sent_than_was_granted(self, kind):
        harbour = Harbour(kind, credits=2, **FINE)
        try:
            shipment = harbour.begin(make_prefix(), BOUNDS)
            harbour.quay.gate.clear()
            second = harbour.begin(make_prefix("b", seed=1), BOUNDS)
            second.wrote_all()
            time.sleep(0.3)  # without an extent over there nothing of it leaves
            assert second.landed_bytes == 0 and harbour.tally.counts["kv_transfer_bytes_total", "out", kind] == 0
            harbour.quay.gate.set()
            second.finish(5.0)
            shipment.abort("enough")
            harbour.settle(second.prefix.kv_bytes)
        finally:
            harbour.close()

    def test_int8_stays_within_half_a_step(self, kind):
        harbour = Harbour(kind, quantization="int8")
        try:
            sent = make_prefix()
            for rows in sent.extent.rows(1):
                rows[:4] = 0.0  # rows whose scale is 0
            report = harbour.send(sent, BOUNDS)
            came = harbour.resident(sent.key)
            assert report.num_bytes == sent.kv_bytes // 4 + sent.kv_bytes // 4 // SPEC.head_dim * 4
            for layer in range(SPEC.num_layers):
                for before, after in zip(sent.extent.rows(layer), came.extent.rows(layer), strict=True):
                    scale = before.abs().amax(-1, keepdim=True) / 127
                    assert ((before - after).abs() <= scale * 0.5001).all()
                    assert not torch.equal(before, after)
        finally:
            harbour.close()

    def test_without_checksums(self, kind):
        harbour = Harbour(kind, checksum=False)
        try:
            sent = make_prefix()
            harbour.send(sent, BOUNDS)
            assert rows_equal(sent, harbour.resident(sent.key))
        finally:
            harbour.close()

    def test_an_idle_lane_makes_way(self, kind):
        courier = Cupboard()
        harbour = Harbour(kind, courier, max_lanes=1)
        quay = Quay()
        other = KVReceiver("decode-1", quay, SPEC, harbour.config, courier=courier)
        courier.docks["decode-1"] = other
        try:
            for turn in range(2):
                harbour.send(make_prefix(key=f"here {turn}", length=50))
                other.expect(f"there {turn}", f"there {turn}", 5.0)
                prefix = make_prefix(key=f"there {turn}", length=50)
                shipment = harbour.shipper.begin(prefix, (0, 50), TransferTicket(f"there {turn}", other.address, 5.0))
                shipment.wrote_all()
                shipment.finish(5.0)
                assert [lane["dock"] for lane in harbour.shipper.info()["lanes"]] == ["decode-1"]
            until(lambda: not harbour.dock.info()["lanes"], "the first dock lost its lane")
        finally:
            harbour.close()
            other.close()

    def test_a_dock_whose_lanes_are_all_busy(self, kind):
        harbour = Harbour(kind, max_lanes=1, **FINE)
        second = KVSender("prefill-1", SPEC, harbour.config, courier=harbour.courier)
        try:
            shipment = harbour.begin(make_prefix(), BOUNDS)
            shipment.wrote(0, 0, 1500)
            until(lambda: shipment.landed_bytes > 0, "some of it has landed")
            late = second.begin(make_prefix("b"), BOUNDS, harbour.ticket("b"))
            with pytest.raises(QueueFull, match="1 lanes, none of them idle"):
                late.finish(5.0)
            shipment.wrote_all()
            shipment.finish(5.0)
        finally:
            second.close()
            harbour.close()

    def test_a_lane_can_be_built_ahead(self, harbour):
        harbour.shipper.warm(harbour.dock.address, 5.0)
        assert harbour.shipper.info()["lanes"][0]["up"]
        harbour.send(make_prefix())
        assert harbour.shipper.info()["lanes"][0]["epoch"] == 1
        harbour.shipper.forget(harbour.dock.address)
        assert harbour.shipper.info()["lanes"] == []

    def test_no_thread_is_left(self, kind):
        before = set(threading.enumerate())
        harbour = Harbour(kind)
        harbour.send(make_prefix())
        harbour.close()
        until(lambda: not set(threading.enumerate()) - before, "threads end")

    def test_idle_lanes_stay(self, kind):
        harbour = Harbour(kind, silence_s=1.0)
        try:
            harbour.send(make_prefix())
            time.sleep(2.2)
            harbour.send(make_prefix("b"))
            assert harbour.shipper.info()["lanes"][0]["epoch"] == 1
            assert harbour.tally.counts["kv_lane_rebuild_total",] == 0
        finally:
            harbour.close()


def test_kinds_that_cannot_serve_say_so():
    quay = Quay(10)
    with pytest.raises(BadConfig, match="objectstore needs an object store"):
        KVReceiver("d", quay, SPEC, TransportConfig(kind="objectstore"))
    if not torch.cuda.is_available():
        with pytest.raises(BadConfig, match="nccl needs KV on a GPU"):
            KVReceiver("d", quay, SPEC, TransportConfig(kind="nccl"))


def test_auto_is_gloo_on_a_processor():
    dock = KVReceiver("d", Quay(10), SPEC, TransportConfig())
    assert dock.address.kind == "gloo" and dock.address.host == "127.0.0.1"
    dock.close()
