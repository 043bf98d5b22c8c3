"""What a receiver and a sender promise, each with the one test that notices when it is broken."""

import threading
import time
from dataclasses import replace

import pytest

from sparsevila_cluster.core.errors import DataLoss
from sparsevila_cluster.transport import TransferState
from sparsevila_cluster.transport.backends.inproc import dial_inproc
from sparsevila_cluster.transport.incoming_transfer import IncomingTransfer
from sparsevila_cluster.transport.link import Endpoint
from sparsevila_cluster.transport.manifest import Manifest
from tests.transport.transport_fixtures import BOUNDS, Pair, make_prefix, rows_equal, until
from tests.transport.wire_scripts import CPU, ScriptedPeer, Step, sender_script

FREE = 7.0  # what the sink writes to an extent that it takes back


@pytest.fixture
def pair():
    one = Pair("inproc", chunk_bytes=65536, credits=2, beat_s=0.05)
    yield one
    one.close()


class Script:
    """A sender of one transfer, step by step."""

    def __init__(self, pair, worker="prefill-9", ticket=None, key="a", checksum=True, **manifest):
        self.prefix = make_prefix(key)
        self.ticket = ticket or pair.ticket(key)
        config = pair.config.model_copy(update={"checksum": checksum})
        made = Manifest.of(self.prefix, self.ticket.transfer_id, BOUNDS, config)
        self.steps = sender_script(self.prefix, replace(made, straight_bytes=0, **manifest), self.ticket.receiver.token, worker)
        self.peer = ScriptedPeer(dial_inproc(self.ticket.receiver, "lane", Endpoint(pair.config, CPU)), patience_s=5.0)
        self._done = 0

    def do(self, num):
        """The next `num` steps."""
        for step in self.steps[self._done : self._done + num]:
            self.peer._do(step)
        self._done += num

    def hears(self, name):
        """Wait for a message; all of that name so far."""
        self.peer._do(Step("wait", until=lambda came, body: came == name))
        return [body for came, body in self.peer.heard if came == name]

    def close(self):
        self.peer.play([])


def free_rows_are_untouched(pair):
    arena = pair.prefix_sink.store.arena
    return bool((arena.k_all[:, :1500] == FREE).all() and (arena.v_all[:, :1500] == FREE).all())


# ---- a receiver ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_a_commit_before_the_last_chunk_publishes_nothing(pair, num_chunks):
    script = Script(pair)
    script.do(3 + 4 * num_chunks)
    script.peer._do(Step("commit", {"transfer": script.ticket.transfer_id}))
    (refused,) = script.hears("refused")
    assert refused["failure"]["error"] == "DataLoss" and "came before its commit" in refused["failure"]["message"]
    assert pair.resident("a") is None
    script.close()
    pair.settle()


@pytest.mark.parametrize("changed", ["transfer_id", "key"])
def test_a_manifest_of_something_else_than_was_offered(pair, changed):
    script = Script(pair)
    made = Manifest.unpack(script.steps[1].body["manifest"])
    other = (
        replace(made, transfer_id="other") if changed == "transfer_id" else replace(made, metadata=replace(made.metadata, key="b"))
    )
    script.steps[1].body["manifest"] = other.pack()
    script.do(2)
    (refused,) = script.hears("refused")
    assert "came with the offer of" in refused["failure"]["message"]
    assert pair.receiver.state(script.ticket.transfer_id) is TransferState.FAILED
    script.close()
    pair.settle()
    assert pair.prefix_sink.num_cancelled == 0  # no extent was touched


def test_no_extent_is_free_while_something_is_on_its_way_to_it(pair):
    script = Script(pair)
    script.do(4)  # the first chunk is announced
    script.peer._do(Step("abort", {"transfer": script.ticket.transfer_id, "reason": "enough"}))
    time.sleep(0.2)
    assert pair.prefix_sink.used_bytes == script.prefix.kv_bytes and not [one for one in script.peer.heard if one[0] == "ended"]
    script.do(2)  # and here it is
    assert script.hears("ended")
    assert pair.prefix_sink.used_bytes == 0 and free_rows_are_untouched(pair)
    script.close()


def test_what_arrives_when_its_lane_has_failed_is_written_nowhere(pair, monkeypatch):
    script = Script(pair, checksum=False)
    wait, arrived, failed = IncomingTransfer.wait_for_chunk, threading.Event(), threading.Event()

    def wait_until_failed(*given):
        right = wait(*given)
        arrived.set()
        assert failed.wait(5.0)
        return right

    monkeypatch.setattr(IncomingTransfer, "wait_for_chunk", wait_until_failed)
    script.do(5)
    assert arrived.wait(5.0)
    (lane,) = pair.receiver._all_lanes()
    lane.fail(DataLoss("cut by a test"))
    assert pair.prefix_sink.used_bytes == 0
    failed.set()
    lane.join(5.0)
    assert not lane.has_threads and free_rows_are_untouched(pair)
    script.close()


def test_exactly_as_many_chunks_are_granted_as_there_are_credits(pair):
    script = Script(pair)
    script.do(3)
    assert [grant["upto"] for grant in script.hears("grant")] == [2]
    for landed in (1, 2):
        script.do(4)
        until(lambda landed=landed: pair.receiver.info()["bytes_received"] > 0, "it has landed")
        script.peer._do(Step("wait", until=lambda name, body, landed=landed: name == "grant" and body["landed"] == landed))
    assert [(grant["landed"], grant["upto"]) for name, grant in script.peer.heard if name == "grant"] == [(0, 2), (1, 3), (2, 4)]
    script.close()


def test_no_other_worker_takes_a_transfer_over(pair):
    first = Script(pair, "prefill-8")
    first.do(7)
    second = Script(pair, "prefill-9", first.ticket)
    second.steps[1].body["attempt"] = 2
    second.do(2)
    (refused,) = second.hears("refused")
    assert refused["failure"]["error"] == "NotFound" and "under way from prefill-8" in refused["failure"]["message"]
    second.close()
    first.do(len(first.steps))
    assert rows_equal(first.prefix, pair.resident("a"))
    first.close()


def test_a_transfer_that_lost_its_lane_has_its_whole_lease_again(pair):
    pair.receiver.expect("t", "a", 0.8)
    script = Script(pair, ticket=replace(pair.ticket("b"), transfer_id="t"))
    script.do(4)
    time.sleep(1.0)  # longer than the lease that it began with
    script.close()
    until(lambda: pair.receiver.state("t") is TransferState.RESERVED, "the loss is noticed")
    time.sleep(0.3)  # several looks at leases
    assert pair.receiver.state("t") is TransferState.RESERVED
    until(lambda: pair.receiver.state("t") is TransferState.EXPIRED, "and no more than that")


def test_transfers_that_are_over_are_forgotten_in_the_end(pair, monkeypatch):
    monkeypatch.setattr("sparsevila_cluster.transport.kv_receiver.MAX_REMEMBERED", 8)
    pair.receiver.expect("waits", "a", 60.0)
    for number in range(40):
        pair.receiver.expect(f"over {number}", "a", 60.0)
        pair.receiver.forget(f"over {number}")
    assert sum(pair.receiver.info()["transfers"].values()) <= 8 + 2
    assert pair.receiver.state("waits") is TransferState.RESERVED and pair.receiver.state("over 39") is TransferState.ABORTED


# ---- a sender ------------------------------------------------------------------------------------------------------------


def test_a_copy_that_rots_before_it_is_sent_again_is_data_loss(pair):
    sent = make_prefix()
    pair.send(sent, BOUNDS)
    with pair.prefix_sink.lock:
        pair.prefix_sink.store.remove("a")
    sent.extent.rows(1)[0][700, 0, 3] += 1.0
    with pytest.raises(DataLoss, match="checksum mismatch in chunk"):
        pair.send(sent, BOUNDS)
    assert pair.resident("a") is None
    pair.settle()
