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
from tests.transport.transport_fixtures import BOUNDS, Pair, make_prefix, other_model, until


class TestEveryKind:
    # ---- refusals ---------------------------------------------------------------------------------------------------------------

    def test_what_nobody_expects_is_refused(self, pair):
        with pytest.raises(NotFound, match="does not expect"):
            pair.send(make_prefix(), expected=False)
        ticket = pair.ticket("another key")
        transfer = pair.sender.begin(make_prefix(), BOUNDS, ticket)
        with pytest.raises(NotFound):
            transfer.finish(5.0)
        pair.settle()

    @pytest.mark.parametrize("refusal", [QueueFull("no room", 3.0), TooLarge("too long"), Incompatible("other bits")])
    def test_a_worker_that_refuses_says_why(self, pair, refusal):
        pair.prefix_sink.refusal = refusal
        transfer = pair.begin(make_prefix())
        transfer.wrote_all()
        with pytest.raises(type(refusal), match=str(refusal)) as caught:
            transfer.finish(5.0)
        assert getattr(caught.value, "retry_after_s", 3.0) == 3.0
        assert pair.receiver.state(transfer.transfer_id) is TransferState.FAILED
        pair.prefix_sink.refusal = None
        pair.send(make_prefix())  # the lane is none the worse
        assert pair.sender.info()["lanes"][0]["epoch"] == 1

    def test_a_receiver_without_room(self, pair):
        with pytest.raises(TooLarge, match="prefix_bytes"):
            pair.send(make_prefix(length=7000))
        pair.settle()

    def test_a_publication_that_fails_gives_its_bytes_back(self, pair, monkeypatch):
        def refuse(manifest, extent):
            raise QueueFull("not today")

        monkeypatch.setattr(pair.prefix_sink, "publish", refuse)
        with pytest.raises(QueueFull, match="not today"):
            pair.send(make_prefix())
        pair.settle()

    def test_another_model(self, kind):
        pair = Pair(kind, spec=other_model())
        try:
            with pytest.raises(Incompatible, match="fingerprint=model-b; this worker has model-a"):
                pair.send(make_prefix(spec=other_model()))
            assert pair.prefix_sink.num_cancelled == 0  # no extent was touched
        finally:
            pair.close()

    def test_a_manifest_of_another_version(self, pair, monkeypatch):
        of = Manifest.of
        with monkeypatch.context() as newer:
            newer.setattr(Manifest, "of", lambda *given: replace(of(*given), version=9))
            with pytest.raises(Incompatible, match="version 9; this worker speaks 2"):
                pair.send(make_prefix())
        pair.settle()
        assert pair.prefix_sink.num_cancelled == 0
        pair.send(make_prefix())

    def test_a_lane_of_another_version(self, pair, monkeypatch):
        monkeypatch.setattr("sparsevila_cluster.transport.send_lane.VERSION", 9)
        with pytest.raises(Incompatible, match="a lane of version 9"):
            pair.send(make_prefix())
        pair.settle()

    def test_without_the_token_nobody_joins(self, pair, kind):
        ticket = pair.ticket("a")
        stranger = replace(ticket, receiver=replace(ticket.receiver, token="guessed"))
        transfer = pair.sender.begin(make_prefix(), BOUNDS, stranger)
        transfer.wrote_all()
        with pytest.raises((PermissionDenied, LaneLost)):
            transfer.finish(5.0)
        assert pair.receiver.state(ticket.transfer_id) is TransferState.RESERVED
        pair.settle()

    # ---- endings ----------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("rows", [0, 300, 1100])
    def test_an_abort_frees_both_sides(self, fine, rows):
        transfer = fine.begin(make_prefix(), BOUNDS)
        for layer in range(2 if rows else 0):
            transfer.wrote(layer, 0, rows)
        started = TransferState.SENDING if rows else TransferState.GRANTED
        until(lambda: fine.receiver.state(transfer.transfer_id) is started, "it is under way")
        transfer.abort("the client left")
        transfer.abort("again")
        with pytest.raises(Cancelled, match="the client left"):
            transfer.finish(5.0)
        fine.settle()
        until(lambda: fine.receiver.state(transfer.transfer_id) is TransferState.ABORTED, "it says so")
        fine.send(make_prefix("b"))
        assert fine.sender.info()["lanes"][0]["epoch"] == 1

    def test_a_transfer_that_is_not_wanted_any_more(self, fine):
        transfer = fine.begin(make_prefix(), BOUNDS)
        transfer.wrote(0, 0, 1100)
        until(lambda: transfer.received_bytes > 0, "some of it has landed")
        fine.receiver.forget(transfer.transfer_id)
        fine.receiver.forget(transfer.transfer_id)
        fine.receiver.forget("never heard of")
        with pytest.raises(Cancelled, match="not wanted"):
            transfer.finish(5.0)
        fine.settle()
        assert fine.receiver.state(transfer.transfer_id) is TransferState.ABORTED

    def test_forgotten_before_it_came(self, pair):
        ticket = pair.ticket("a")
        pair.receiver.forget(ticket.transfer_id)
        transfer = pair.sender.begin(make_prefix(), BOUNDS, ticket)
        with pytest.raises(NotFound, match="over: aborted"):
            transfer.finish(5.0)

    def test_a_reservation_that_nobody_uses_expires(self, pair):
        pair.receiver.expect("idle", "a", 0.05)
        until(lambda: pair.receiver.state("idle") is TransferState.EXPIRED, "it expires")
        assert pair.tally.counts["kv_lease_expired_total",] == 1
        transfer = pair.sender.begin(make_prefix(), BOUNDS, TransferTicket("idle", pair.receiver.address, 5.0))
        with pytest.raises(NotFound, match="over: expired"):
            transfer.finish(5.0)
        with pytest.raises(NotFound):
            pair.receiver.state("unheard of")

    def test_an_acknowledged_transfer_is_acknowledged_again(self, pair):
        sent = make_prefix()
        ticket = pair.ticket(sent.key)
        for _ in range(2):
            transfer = pair.sender.begin(sent, BOUNDS, ticket)
            transfer.wrote_all()
            transfer.finish(5.0)
        pair.settle(sent.kv_bytes)

    def test_the_ticket_has_a_deadline_of_its_own(self, pair):
        transfer = pair.begin(make_prefix(), BOUNDS, deadline_s=0.3)
        with pytest.raises(DeadlineExceeded, match="the 0.3 s of its ticket"):
            transfer.finish(60.0)
        pair.settle()

    def test_a_deadline_while_the_worker_over_there_is_busy(self, pair):
        pair.prefix_sink.gate.clear()
        transfer = pair.begin(make_prefix())
        transfer.wrote_all()
        with pytest.raises(DeadlineExceeded):
            transfer.finish(0.2)
        pair.prefix_sink.gate.set()
        pair.settle()

    def test_close_of_the_receiver(self, fine):
        transfer = fine.begin(make_prefix(), BOUNDS)
        transfer.wrote(0, 0, 1100)
        until(lambda: transfer.received_bytes > 0, "some of it has landed")
        fine.receiver.close()
        with pytest.raises(LaneLost):
            transfer.finish(8.0)
        fine.settle()
        with pytest.raises(Unavailable):
            fine.receiver.expect("late", "a", 1.0)
        fine.receiver.close()

    def test_close_of_the_sender(self, fine):
        transfer = fine.begin(make_prefix(), BOUNDS)
        transfer.wrote(0, 0, 1100)
        until(lambda: transfer.received_bytes > 0, "some of it has landed")
        fine.sender.close()
        with pytest.raises(Cancelled, match="closing"):
            transfer.finish(5.0)
        fine.settle()
        with pytest.raises(Unavailable):
            fine.sender.begin(make_prefix(), BOUNDS, fine.ticket("a"))
