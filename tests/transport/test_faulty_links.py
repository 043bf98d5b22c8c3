"""What happens when links misbehave: a right prefix or a typed error in time, no resident extent touched, every byte back."""

import random
import threading

import pytest
import torch

from sparsevila_cluster.core.errors import DataLoss, LaneLost, SparseVilaError
from sparsevila_cluster.transport import TransferState
from sparsevila_cluster.transport.backends.inproc import InprocLink
from sparsevila_cluster.transport.backends.objectstore import ObjectStoreLink
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.transfer_attempt import TransferAttempt
from tests.transport.faulty_link import OF_BULK, OF_MESSAGES, Fault, Script
from tests.transport.transport_fixtures import BOUNDS, DictObjectStore, Pair, make_prefix, rows_equal, until

HASTY = {"chunk_bytes": 65536, "silence_s": 2.0, "op_timeout_s": 2.0, "dial_timeout_s": 2.0}


@pytest.fixture
def pair(kind):
    one = Pair(kind, **HASTY)
    yield one
    one.close()


def send_beside_another(pair):
    """A prefix is resident, another one is sent. Returns the report or the error; the first one must be as it was."""
    there = make_prefix("there", length=700, seed=9)
    pair.send(there)
    resident = pair.resident("there")
    pair.sender.forget(pair.receiver.address)  # the next one comes over a lane of its own
    return there, resident


def check_after(pair, there, resident, sent, outcome):
    assert pair.resident("there") is resident and rows_equal(there, resident)
    if isinstance(outcome, SparseVilaError):
        assert pair.resident("sent") is None
        pair.settle(there.kv_bytes)
    else:
        assert rows_equal(sent, pair.resident("sent"))
        pair.settle(there.kv_bytes + sent.kv_bytes)


# Operation 0 of a lane is the hello, 1 the offer, 2 ff. the chunks; what comes back: welcome, grants, acknowledgement.
@pytest.mark.parametrize("what", OF_MESSAGES)
@pytest.mark.parametrize(
    ("op", "at"), [("send", 0), ("send", 1), ("send", 2), ("send", 9), ("receive", 0), ("receive", 1), ("receive", 7)]
)
def test_one_bad_message(pair, monkeypatch, what, op, at):
    there, resident = send_beside_another(pair)
    script = Script([Fault(what, op, at)]).install(monkeypatch)
    sent = make_prefix("sent")
    report = pair.send(sent, BOUNDS)
    assert script.num_done == 1
    assert report.attempts == 1 or script.num_links == 2
    check_after(pair, there, resident, sent, report)


@pytest.mark.parametrize("number", range(15))
def test_an_offer_left_unread_in_a_lane_that_was_given_up_takes_nothing_over(pair, monkeypatch, number):
    """The sender hears a message twice and dials anew while the receiver still reads what came over the old lane."""
    there, resident = send_beside_another(pair)
    Script([Fault("duplicate", "receive", 0)]).install(monkeypatch)
    sent = make_prefix("sent")
    check_after(pair, there, resident, sent, pair.send(sent, BOUNDS))


@pytest.mark.parametrize("what", OF_BULK)
@pytest.mark.parametrize("at", [0, 5, 17])
def test_one_bad_chunk(pair, monkeypatch, what, at):
    there, resident = send_beside_another(pair)
    script = Script([Fault(what, "send_bulk", at)]).install(monkeypatch)
    sent = make_prefix("sent")
    report = pair.send(sent, BOUNDS)
    assert script.num_done == 1
    damaged = what in ("flip", "garbage")
    assert (report.attempts, script.num_links) == {True: (2, 1), False: (2, 2) if what == "break" else (1, 1)}[damaged]
    check_after(pair, there, resident, sent, report)


def test_damaged_twice_is_data_loss(pair, monkeypatch):
    there, resident = send_beside_another(pair)
    Script([Fault("flip", "send_bulk", 2), Fault("flip", "send_bulk", 20), Fault("flip", "send_bulk", 30)]).install(monkeypatch)
    sent = make_prefix("sent")
    with pytest.raises(DataLoss, match="checksum mismatch in chunk") as caught:
        pair.send(sent, BOUNDS)
    check_after(pair, there, resident, sent, caught.value)
    pair.send(make_prefix("next"))
    assert pair.sender.info()["lanes"][0]["epoch"] == 1  # damage alone costs no lane


@pytest.mark.parametrize("what", ["drop", "break", "flip"])
def test_no_lane_holds(pair, monkeypatch, what):
    there, resident = send_beside_another(pair)
    script = Script([Fault(what, "send", 4)], every_link=True).install(monkeypatch)
    sent = make_prefix("sent")
    with pytest.raises(LaneLost, match="lost the lane to decode-0") as caught:
        pair.send(sent, BOUNDS)
    assert script.num_links == 2 and caught.value.worker == "decode-0"
    check_after(pair, there, resident, sent, caught.value)
    assert pair.tally.counts["kv_lane_rebuild_total",] == 2


@pytest.mark.parametrize("kind", ["inproc", "gloo"], indirect=True)
def test_the_object_store_takes_over(kind, monkeypatch):
    pair = Pair(kind, DictObjectStore(), **HASTY)
    try:
        script = Script([Fault("break", "send_bulk", 3)], every_link=True, spared="objectstore").install(monkeypatch)
        sent = make_prefix("sent")
        transfer = pair.begin(sent, BOUNDS)
        transfer.wrote(0, 0, 1100)
        until(lambda: script.num_links == 3, "two lanes broke")
        transfer.wrote_all()
        report = transfer.finish(8.0)
        assert script.kinds == [kind, kind, "objectstore"] and report.kind == "objectstore" and report.attempts == 3
        assert rows_equal(sent, pair.resident("sent"))
        pair.settle(sent.kv_bytes)
    finally:
        pair.close()


@pytest.mark.parametrize("kind", ["gloo"], indirect=True)
def test_no_fallback_where_none_is_wanted(kind, monkeypatch):
    pair = Pair(kind, DictObjectStore(), fallback=False, **HASTY)
    try:
        script = Script([Fault("break", "send_bulk", 0)], every_link=True).install(monkeypatch)
        with pytest.raises(LaneLost):
            pair.send(make_prefix())
        assert script.kinds == [kind, kind]
        pair.settle()
    finally:
        pair.close()


def test_an_object_store_that_dies():
    object_store = DictObjectStore()
    pair = Pair("objectstore", object_store, **HASTY)
    try:
        transfer = pair.begin(make_prefix(), BOUNDS)
        transfer.wrote(0, 0, 1500)
        until(lambda: transfer.received_bytes > 0, "some of it has landed")
        object_store.broken = True
        with pytest.raises(LaneLost, match="the object store is gone"):
            transfer.finish(5.0)
        pair.settle()
        assert pair.receiver.state(transfer.transfer_id) is TransferState.RESERVED  # another lane may still bring it
    finally:
        pair.close()


@pytest.mark.parametrize("kind", ["inproc", "objectstore"], indirect=True)
def test_bulk_of_another_size_breaks_the_lane_only(pair, monkeypatch):
    """gloo would end the process, which is why its sizes are computed on both sides and asserted before a send."""
    cls = {"inproc": InprocLink, "objectstore": ObjectStoreLink}[pair.receiver.address.kind]
    real = cls.send_bulk
    with monkeypatch.context() as short:
        short.setattr(cls, "send_bulk", lambda self, parts: real(self, [part[:-3].clone() for part in parts]))
        with pytest.raises(LaneLost, match="received bulk of .*, expected"):
            pair.send(make_prefix())
    pair.settle()


def test_more_than_was_announced_is_never_sent(pair, monkeypatch):
    gather = ChunkBuffers.gather
    with monkeypatch.context() as wrong:
        wrong.setattr(ChunkBuffers, "gather", lambda self, chunk: [torch.cat([part, part]) for part in gather(self, chunk)])
        with pytest.raises(SparseVilaError, match="AssertionError"):
            pair.send(make_prefix())
    pair.settle()


def test_a_sender_that_grants_itself_something(pair, monkeypatch):
    """Chunks without a grant, of an unknown transfer, or twice: the lane ends, the worker does not."""
    allocate, sent = pair.prefix_sink.allocate, threading.Event()

    def allocate_late(*args):  # what is granted after it could come in time
        sent.wait(5.0)
        return allocate(*args)

    with monkeypatch.context() as greedy:
        greedy.setattr(pair.prefix_sink, "allocate", allocate_late)
        greedy.setattr(TransferAttempt, "next_is_ready", property(lambda self: self.sent < len(self.manifest.chunks)))
        with pytest.raises(LaneLost):
            pair.send(make_prefix())
        sent.set()
    pair.settle()
    pair.send(make_prefix("b"))


@pytest.mark.parametrize("seed", range(3))
def test_a_storm_of_cancels_and_faults(kind, seed, monkeypatch):
    """Many transfers, some aborted, forgotten or overdue, over links that break now and then: every byte comes back."""
    dice = random.Random(seed)
    pair = Pair(kind, num_slots=4000, **HASTY)
    faults = [Fault(dice.choice(OF_MESSAGES), dice.choice(["send", "receive"]), dice.randrange(400)) for _ in range(3)]
    Script(faults).install(monkeypatch)
    outcomes = []
    lock = threading.Lock()

    def client(number):
        mine = random.Random(100 * seed + number)
        for turn in range(8):
            key = f"{number}-{turn}"
            sent = make_prefix(key, length=mine.randrange(1, 900), seed=number)
            transfer = pair.begin(sent)
            end = mine.choice(["finish", "finish", "abort", "forget", "overdue"])
            try:
                transfer.wrote(0, 0, sent.length)
                if end == "abort":
                    transfer.abort("storm")
                if end == "forget":
                    pair.receiver.forget(transfer.transfer_id)
                transfer.wrote_all()
                transfer.finish(0.002 if end == "overdue" else 8.0)
                outcome = "acked"
            except SparseVilaError as error:
                outcome = type(error).__name__
                transfer.abort("over")
            pair.receiver.forget(transfer.transfer_id)
            came = pair.resident(key)
            with lock:
                outcomes.append(outcome)
                if came is not None and not rows_equal(sent, came):
                    outcomes.append("wrong rows")

    threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert "wrong rows" not in outcomes and outcomes.count("acked") >= 4
        until(lambda: pair.receiver.info()["bytes_in_flight"] == 0, "nothing is in flight")
        with pair.prefix_sink.lock:
            for prefix in list(pair.prefix_sink.store):
                pair.prefix_sink.store.remove(prefix.key)
        pair.settle(0)
    finally:
        pair.close()
