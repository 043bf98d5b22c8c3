"""Two real processes over gloo: either side is killed or stopped at every state of a transfer; the other one cleans up."""

import signal
import socket
import time
from contextlib import suppress

import pytest

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport import KVSender, TransferReport, TransferState, TransferTicket
from tests.transport.peer_process import SHORT, Peer
from tests.transport.transport_fixtures import SPEC, Pair, make_prefix, rows_equal, until

LONG = 80_000  # rows: 61 MB, so that a signal meets bulk under way
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
SLACK_S = 3.0  # what a machine with other work adds
NOTICED_S = {"killed": SLACK_S, "stopped": SHORT["silence_s"] + SLACK_S}


@pytest.fixture
def peers():
    made = []

    def make(*given):
        made.append(Peer(*given))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


@pytest.fixture
def pair():
    one = Pair("gloo", num_slots=200_000, **SHORT)
    yield one
    one.close()


def order(address, transfer_id, rows, length=LONG, bounds=None):
    bounds = bounds or [0, length // 2, length]
    return {
        "address": address,
        "transfer_id": transfer_id,
        "key": "a",
        "length": length,
        "seed": 3,
        "bounds": bounds,
        "rows": rows,
    }


@pytest.mark.parametrize("state", ["allocating", "granted", "sending", "half", "publishing"])
@pytest.mark.parametrize("how", SIGNALS)
def test_the_sender_is_lost(pair, peers, monkeypatch, how, state):
    victim, successor = peers("sender"), peers("sender")
    kept = make_prefix("kept", length=500)
    pair.send(kept)
    resident = pair.resident("kept")
    pair.receiver.expect("t", "a", 30.0)
    publish = pair.prefix_sink.publish

    def slowly(manifest, extent):
        reached.append(True)
        time.sleep(0.5)
        publish(manifest, extent)

    reached: list[bool] = []
    if state == "allocating":
        pair.prefix_sink.gate.clear()
    if state == "publishing":
        monkeypatch.setattr(pair.prefix_sink, "publish", slowly)
    rows = {"granted": 0, "half": LONG // 2}.get(state, LONG)
    victim.tell(**order(pair.receiver.address, "t", rows))
    seen = {"granted": TransferState.GRANTED, "sending": TransferState.SENDING, "half": TransferState.SENDING}
    if state == "publishing":
        until(lambda: bool(reached), "it is being published")
    elif state == "allocating":
        until(lambda: any(lane["transfers"] for lane in pair.receiver.info()["lanes"]), "it was offered")
    else:
        until(lambda: pair.receiver.state("t") is seen[state], state)
    victim.signal(SIGNALS[how])
    if state == "publishing":
        until(lambda: pair.receiver.state("t") is TransferState.ACKED, "what was verified is published all the same")
    else:
        pair.prefix_sink.gate.set()
        gone_s = until(lambda: pair.receiver.state("t") is TransferState.RESERVED, "the loss is noticed")
        back_s = gone_s + until(lambda: pair.prefix_sink.used_bytes == kept.kv_bytes, "the bytes are back")
        print(f"sender {how} while {state}: noticed after {gone_s * 1e3:.0f} ms, bytes back after {back_s * 1e3:.0f} ms")
        assert gone_s < NOTICED_S[how]
    # Whoever sends it again, over a lane of its own, is welcome.
    outcome = successor.ask(**order(pair.receiver.address, "t", LONG))
    assert isinstance(outcome, TransferReport), outcome
    if how == "stopped":
        victim.signal(signal.SIGCONT)
        told = victim.read()  # it goes on with what it was at: acknowledged already, or lost
        assert isinstance(told, TransferReport) or told == "LaneLost"
    victim.close()
    assert rows_equal(make_prefix("a", LONG, 3), pair.resident("a"))
    assert pair.resident("kept") is resident and rows_equal(kept, resident)
    pair.settle(kept.kv_bytes + LONG * SPEC.bytes_per_token)


@pytest.mark.parametrize("state", ["idle", "allocating", "granted", "sending", "half"])
@pytest.mark.parametrize("how", SIGNALS)
def test_the_receiver_is_lost(pair, peers, how, state):
    victim = peers("receiver")
    address = victim.hello["address"]
    sender = pair.sender
    sent = make_prefix("a", LONG, 3)
    victim.ask(what="expect", transfer_id="t", key="a")
    if state == "allocating":
        victim.ask(what="hold")
    if state == "idle":
        sender.warm(address, 5.0)
        victim.signal(SIGNALS[how])
        time.sleep(0.05)
    transfer = sender.begin(sent, [0, LONG // 2, LONG], TransferTicket("t", address, 20.0))
    rows = {"granted": 0, "half": LONG // 2}.get(state, LONG)
    last = SPEC.num_layers - 1
    for layer in range(last if state == "sending" else SPEC.num_layers):
        transfer.wrote(layer, 0, rows)
    if state == "sending":  # else all of it may have arrived before the signal
        transfer.wrote(last, 0, LONG // 2)
    if state in ("allocating", "granted"):
        until(lambda: any(lane["transfers"] for lane in sender.info()["lanes"]), "it was offered")
        time.sleep(0.1)
    elif state != "idle":
        until(lambda: transfer.received_bytes > 0, "some of it has landed")
    start_s = time.monotonic()
    if state != "idle":
        victim.signal(SIGNALS[how])
    with pytest.raises(LaneLost, match="lost the lane to decode-0") as caught:
        if state == "sending":
            transfer.wrote(last, LONG // 2, LONG)
        transfer.finish(15.0)
    assert caught.value.worker == "decode-0"
    took_s = time.monotonic() - start_s
    print(f"receiver {how} while {state}: the sender knew for certain after {took_s * 1e3:.0f} ms")
    # An offer into a full socket waits for its own deadline, then the dialing of the next lane does.
    assert took_s < {"killed": 0.0, "stopped": SHORT["op_timeout_s"] + SHORT["dial_timeout_s"]}[how] + SLACK_S
    until(lambda: not any(lane["transfers"] for lane in sender.info()["lanes"]), "nothing is left on the lane")
    assert rows_equal(sent, make_prefix("a", LONG, 3))  # the sender's rows are as they were
    pair.send(make_prefix("b"))  # other receivers are none the worse
    if how == "stopped":
        victim.signal(signal.SIGCONT)
        until(lambda: victim.ask(what="used_bytes") == 0, "the stopped receiver gives its bytes back")
        if state != "allocating":
            again = sender.begin(sent, [0, LONG], TransferTicket("t", address, 20.0))
            again.wrote_all()
            assert again.finish(10.0).epoch > 1
            assert victim.ask(what="compare", key="a", length=LONG, seed=3)


def test_a_restart_on_the_same_address(peers):
    first = peers("receiver")
    old = first.hello["address"]
    first.ask(what="expect", transfer_id="t", key="a")
    sender = KVSender("prefill-0", TransportConfig(kind="gloo", **SHORT))
    try:
        sent = make_prefix("a", 1000, 3)
        transfer = sender.begin(sent, [0, 500, 1000], TransferTicket("t", old, 20.0))
        transfer.wrote(0, 0, 500)
        until(lambda: any(lane["transfers"] for lane in sender.info()["lanes"]), "it was offered")
        first.close()
        second = peers("receiver", old.port)
        new = second.hello["address"]
        assert (new.host, new.port) == (old.host, old.port) and new.token != old.token
        with pytest.raises(LaneLost):
            transfer.finish(5.0)
        late = sender.begin(sent, [0, 1000], TransferTicket("t", old, 20.0))
        with pytest.raises(LaneLost, match="does not know the token of decode-0"):
            late.finish(5.0)
        second.ask(what="expect", transfer_id="t", key="a")
        again = sender.begin(sent, [0, 1000], TransferTicket("t", new, 20.0))
        again.wrote_all()
        again.finish(5.0)
        assert second.ask(what="compare", key="a", length=1000, seed=3)
    finally:
        sender.close()


def test_connections_without_the_token(pair):
    """Whatever comes in without the token is shown out, and the receiver goes on."""
    address = pair.receiver.address
    for raw in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x05\0\0\0hello", b"\xff\xff\xff\xff", b"\x01\0\0\0\xc0", b"\0" * 500):
        with socket.create_connection((address.host, address.port), 2) as stranger:
            with suppress(OSError):  # it may have been shown out already
                stranger.sendall(raw)
                stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(3)
            try:
                answer = stranger.recv(100)
            except ConnectionResetError:
                answer = b""
            assert answer in (b"", b"\x01\0\0\0\xc2")  # nothing, or: no
    pair.send(make_prefix())
    pair.settle(make_prefix().kv_bytes)
