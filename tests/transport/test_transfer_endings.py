"""However a transfer ends on whatever kind of link, both sides say so, and every byte comes back."""

from dataclasses import replace

import pytest

from sparsevila_cluster.core.errors import (
    Cancelled,
    DeadlineExceeded,
    Incompatible,
    LaneLost,
    NotFound,
    PermissionDenied,
    QueueFull,
    TooLarge,
    Unavailable,
)
from sparsevila_cluster.transport import TransferState, TransferTicket
from sparsevila_cluster.transport.manifest import Manifest
from tests.transport.transport_fixtures import BOUNDS, Harbour, make_prefix, other_model, until


class TestEveryKind:
    # ---- refusals ---------------------------------------------------------------------------------------------------------------

    def test_what_nobody_expects_is_refused(self, harbour):
        with pytest.raises(NotFound, match="does not expect"):
            harbour.send(make_prefix(), expected=False)
        ticket = harbour.ticket("another key")
        shipment = harbour.shipper.begin(make_prefix(), BOUNDS, ticket)
        with pytest.raises(NotFound):
            shipment.finish(5.0)
        harbour.settle()

    @pytest.mark.parametrize("refusal", [QueueFull("no room", 3.0), TooLarge("too long"), Incompatible("other bits")])
    def test_a_worker_that_refuses_says_why(self, harbour, refusal):
        harbour.quay.refusal = refusal
        shipment = harbour.begin(make_prefix())
        shipment.wrote_all()
        with pytest.raises(type(refusal), match=str(refusal)) as caught:
            shipment.finish(5.0)
        assert getattr(caught.value, "retry_after_s", 3.0) == 3.0
        assert harbour.dock.state(shipment.transfer_id) is TransferState.FAILED
        harbour.quay.refusal = None
        harbour.send(make_prefix())  # the lane is none the worse
        assert harbour.shipper.info()["lanes"][0]["epoch"] == 1

    def test_a_dock_without_room(self, harbour):
        with pytest.raises(TooLarge, match="prefix_bytes"):
            harbour.send(make_prefix(length=7000))
        harbour.settle()

    def test_a_publication_that_fails_gives_its_bytes_back(self, harbour, monkeypatch):
        def refuse(manifest, extent):
            raise QueueFull("not today")

        monkeypatch.setattr(harbour.quay, "publish", refuse)
        with pytest.raises(QueueFull, match="not today"):
            harbour.send(make_prefix())
        harbour.settle()

    def test_another_model(self, kind):
        harbour = Harbour(kind, spec=other_model())
        try:
            with pytest.raises(Incompatible, match="fingerprint=model-b; this worker has model-a"):
                harbour.send(make_prefix(spec=other_model()))
            assert harbour.quay.num_cancelled == 0  # no extent was touched
        finally:
            harbour.close()

    def test_a_manifest_of_another_version(self, harbour, monkeypatch):
        of = Manifest.of
        with monkeypatch.context() as newer:
            newer.setattr(Manifest, "of", lambda *given: replace(of(*given), version=9))
            with pytest.raises(Incompatible, match="version 9; this worker speaks 1"):
                harbour.send(make_prefix())
        harbour.settle()
        assert harbour.quay.num_cancelled == 0
        harbour.send(make_prefix())

    def test_a_lane_of_another_version(self, harbour, monkeypatch):
        monkeypatch.setattr("sparsevila_cluster.transport.send_lane.VERSION", 9)
        with pytest.raises(Incompatible, match="a lane of version 9"):
            harbour.send(make_prefix())
        harbour.settle()

    def test_without_the_token_nobody_joins(self, harbour, kind):
        ticket = harbour.ticket("a")
        stranger = replace(ticket, receiver=replace(ticket.receiver, token="guessed"))
        shipment = harbour.shipper.begin(make_prefix(), BOUNDS, stranger)
        shipment.wrote_all()
        with pytest.raises((PermissionDenied, LaneLost)):
            shipment.finish(5.0)
        assert harbour.dock.state(ticket.transfer_id) is TransferState.RESERVED
        harbour.settle()

    # ---- endings ----------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("rows", [0, 300, 1100])
    def test_an_abort_frees_both_sides(self, fine, rows):
        shipment = fine.begin(make_prefix(), BOUNDS)
        for layer in range(2 if rows else 0):
            shipment.wrote(layer, 0, rows)
        started = TransferState.SENDING if rows else TransferState.GRANTED
        until(lambda: fine.dock.state(shipment.transfer_id) is started, "it is under way")
        shipment.abort("the client left")
        shipment.abort("again")
        with pytest.raises(Cancelled, match="the client left"):
            shipment.finish(5.0)
        fine.settle()
        until(lambda: fine.dock.state(shipment.transfer_id) is TransferState.ABORTED, "it says so")
        fine.send(make_prefix("b"))
        assert fine.shipper.info()["lanes"][0]["epoch"] == 1

    def test_a_transfer_that_is_not_wanted_any_more(self, fine):
        shipment = fine.begin(make_prefix(), BOUNDS)
        shipment.wrote(0, 0, 1100)
        until(lambda: shipment.landed_bytes > 0, "some of it has landed")
        fine.dock.forget(shipment.transfer_id)
        fine.dock.forget(shipment.transfer_id)
        fine.dock.forget("never heard of")
        with pytest.raises(Cancelled, match="not wanted"):
            shipment.finish(5.0)
        fine.settle()
        assert fine.dock.state(shipment.transfer_id) is TransferState.ABORTED

    def test_forgotten_before_it_came(self, harbour):
        ticket = harbour.ticket("a")
        harbour.dock.forget(ticket.transfer_id)
        shipment = harbour.shipper.begin(make_prefix(), BOUNDS, ticket)
        with pytest.raises(NotFound, match="over: aborted"):
            shipment.finish(5.0)

    def test_a_reservation_that_nobody_uses_expires(self, harbour):
        harbour.dock.expect("idle", "a", 0.05)
        until(lambda: harbour.dock.state("idle") is TransferState.EXPIRED, "it expires")
        assert harbour.tally.counts["kv_lease_expired_total",] == 1
        shipment = harbour.shipper.begin(make_prefix(), BOUNDS, TransferTicket("idle", harbour.dock.address, 5.0))
        with pytest.raises(NotFound, match="over: expired"):
            shipment.finish(5.0)
        with pytest.raises(NotFound):
            harbour.dock.state("unheard of")

    def test_an_acknowledged_transfer_is_acknowledged_again(self, harbour):
        sent = make_prefix()
        ticket = harbour.ticket(sent.key)
        for _ in range(2):
            shipment = harbour.shipper.begin(sent, BOUNDS, ticket)
            shipment.wrote_all()
            shipment.finish(5.0)
        harbour.settle(sent.kv_bytes)

    def test_the_ticket_has_a_deadline_of_its_own(self, harbour):
        shipment = harbour.begin(make_prefix(), BOUNDS, deadline_s=0.3)
        with pytest.raises(DeadlineExceeded, match="the 0.3 s of its ticket"):
            shipment.finish(60.0)
        harbour.settle()

    def test_a_deadline_while_the_worker_over_there_is_busy(self, harbour):
        harbour.quay.gate.clear()
        shipment = harbour.begin(make_prefix())
        shipment.wrote_all()
        with pytest.raises(DeadlineExceeded):
            shipment.finish(0.2)
        harbour.quay.gate.set()
        harbour.settle()

    def test_close_of_the_dock(self, fine):
        shipment = fine.begin(make_prefix(), BOUNDS)
        shipment.wrote(0, 0, 1100)
        until(lambda: shipment.landed_bytes > 0, "some of it has landed")
        fine.dock.close()
        with pytest.raises(LaneLost):
            shipment.finish(8.0)
        fine.settle()
        with pytest.raises(Unavailable):
            fine.dock.expect("late", "a", 1.0)
        fine.dock.close()

    def test_close_of_the_shipper(self, fine):
        shipment = fine.begin(make_prefix(), BOUNDS)
        shipment.wrote(0, 0, 1100)
        until(lambda: shipment.landed_bytes > 0, "some of it has landed")
        fine.shipper.close()
        with pytest.raises(Cancelled, match="closing"):
            shipment.finish(5.0)
        fine.settle()
        with pytest.raises(Unavailable):
            fine.shipper.begin(make_prefix(), BOUNDS, fine.ticket("a"))
