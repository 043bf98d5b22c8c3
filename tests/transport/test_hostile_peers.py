"""Peers that break the protocol on purpose: the lane ends with a typed error, nobody else notices, nothing waits for ever."""

import errno
import logging
import math
import socket
import struct
import threading
import time
import tracemalloc
from dataclasses import replace

import msgpack
import pytest

from sparsevila_cluster.core.errors import Internal, LaneLost, SparseVilaError, TooLarge
from sparsevila_cluster.transport import TRANSPORTS
from sparsevila_cluster.transport import handshake as handshakes
from sparsevila_cluster.transport.backends.inproc import InprocListener, dial_inproc
from sparsevila_cluster.transport.channel import Channel
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.handshake import Handshake, MessageSocket, PairStore, receive_frame
from sparsevila_cluster.transport.link import Endpoint
from sparsevila_cluster.transport.manifest import VERSION, Manifest
from tests.transport.fuzz_wire import RawLink
from tests.transport.transport_fixtures import BOUNDS, Pair, make_prefix, rows_equal, until
from tests.transport.wire_scripts import CPU, ScriptedPeer, Step, packed_message, receiver_script, sealed, sender_script

QUICK = {"chunk_bytes": 65536, "silence_s": 3.0, "op_timeout_s": 3.0, "dial_timeout_s": 1.0}


@pytest.fixture
def quick():
    one = Pair("inproc", **QUICK)
    yield one
    one.close()


@pytest.fixture
def escaped(monkeypatch, caplog):
    """Errors that ended a thread or reached a last resort."""
    found = []
    monkeypatch.setattr(threading, "excepthook", lambda args: found.append(args.exc_value))
    yield found
    found += [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not found


# ---- messages ---------------------------------------------------------------------------------------------------------------


def received(raw):
    return Channel(RawLink([raw])).receive(1.0)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("beat", {}),
        ("beat", {"transfers": "t"}),
        ("beat", {"transfers": [1]}),
        ("chunk", {"transfer": ["t"], "index": 0}),
        ("chunk", {"transfer": "t", "index": 0.0}),
        ("chunk", {"transfer": "t", "index": True}),
        ("chunk", {"transfer": "t", "index": -1}),
        ("commit", {"transfer": "t" * 5000}),
        ("commit", ["t"]),
        ("commit", None),
        ("grant", {"transfer": "t", "upto": math.nan, "landed": 0}),
        ("grant", {"transfer": "t", "upto": 1}),
        ("offer", {"transfer": "t", "key": "k", "attempt": "1", "manifest": b""}),
        ("offer", {"transfer": "t", "key": "k", "attempt": 1, "manifest": "text"}),
        ("refused", {"transfer": "t", "failure": "no"}),
        ("refused", {"transfer": "t", "failure": {"error": "QueueFull"}}),
        ("refused", {"transfer": "t", "failure": {"error": "QueueFull", "message": "", "retry_after_s": "soon"}}),
        ("refused", {"transfer": "t", "failure": {"error": "LaneLost", "message": "", "worker": 7}}),
        ("bye", {"failure": [1]}),
        ("hello", {"lane": "l", "worker": "w", "epoch": math.inf, "token": "t", "version": VERSION}),
        ("hello", {"worker": "w", "epoch": 1, "token": "t", "version": VERSION}),
        ("sung", {}),
        (["beat"], {}),
        (None, {}),
    ],
)
def test_a_malformed_message_breaks_the_lane(name, body):
    with pytest.raises(LaneLost) as caught:
        received(packed_message(0, name, body))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x93\x00",
        b"\x93\x00\xa1\xff\x80",
        b"\x92\x00\xa4beat",
        b"\x93\x00\xa4beat\x81\x01\x02",
        b"\xc7\xff\x01",
    ],
)
def test_what_is_no_message_breaks_the_lane(packed):
    with pytest.raises(LaneLost):
        received(sealed(packed))


def test_fields_that_nobody_knows_are_ignored():
    assert received(packed_message(0, "commit", {"transfer": "t", "colour": [1]})).body == {"transfer": "t"}


# ---- a sender ---------------------------------------------------------------------------------------------------------------


def scripted_sender(pair, key="a"):
    """The steps of a sound transfer of several chunks, and the peer that plays them."""
    prefix = make_prefix(key)
    ticket = pair.ticket(key)
    manifest = replace(Manifest.of(prefix, ticket.transfer_id, BOUNDS, pair.config), straight_bytes=64)
    link = dial_inproc(ticket.receiver, "lane", Endpoint(pair.config, CPU))
    return prefix, ticket, sender_script(prefix, manifest, ticket.receiver.token, "prefill-9"), ScriptedPeer(link, patience_s=2.0)


def test_a_script_is_a_sound_transfer(quick):
    prefix, _, steps, peer = scripted_sender(quick)
    peer.play(steps)
    assert rows_equal(prefix, quick.resident("a"))
    quick.settle(prefix.kv_bytes)


def test_chunks_after_an_abort_reach_no_extent(quick, escaped):
    """The extent is somebody else's as soon as the abort has been answered."""
    _, ticket, steps, peer = scripted_sender(quick)
    hello, offer, granted, chunk, bulk, checksum, _, next_chunk, next_bulk, next_sum = steps[:10]
    abort = Step("abort", {"transfer": ticket.transfer_id, "reason": "or not"})
    # The receiver waits for the first bulk, so that it reads the second announcement before it has acted on the abort.
    peer.play([hello, offer, granted, chunk, abort, next_chunk, bulk, checksum, next_bulk, next_sum, steps[-1]])
    until(lambda: not quick.receiver.info()["lanes"], "the lane is closed")
    quick.settle()
    arena = quick.prefix_sink.store.arena
    assert bool((arena.k_all[:, :1500] == 7.0).all() and (arena.v_all[:, :1500] == 7.0).all())


# ---- a receiver -------------------------------------------------------------------------------------------------------------


def answered(pair, change, monkeypatch):
    """What becomes of a transfer whose receiver follows a script with `change` made to it."""
    prefix, ticket = make_prefix(), pair.ticket("a")
    manifest = Manifest.of(prefix, ticket.transfer_id, BOUNDS, pair.config)
    steps = change(receiver_script(manifest, 4), ticket.transfer_id)
    buffers = ChunkBuffers(manifest, make_prefix(seed=1).extent, CPU)
    address = replace(ticket.receiver, token="scripted")
    listener = InprocListener("scripted", Endpoint(pair.config, CPU), lambda link: ScriptedPeer(link, buffers).play(steps))
    try:
        transfer = pair.sender.begin(prefix, BOUNDS, replace(ticket, receiver=address))
        transfer.wrote_all()
        begun_s = time.monotonic()
        with pytest.raises(SparseVilaError) as caught:
            transfer.finish(6.0)
        assert time.monotonic() - begun_s < 4.0
        pair.sender.forget(address)
        return caught.value
    finally:
        listener.close()


@pytest.mark.parametrize("grant", [{"upto": 10**6, "landed": 0}, {"upto": 4, "landed": 10**6}])
def test_a_grant_of_more_than_there_is_breaks_the_lane(quick, escaped, monkeypatch, grant):
    def change(steps, transfer):
        return [*steps[:3], Step("grant", {"transfer": transfer, **grant}), *steps[4:]]

    assert isinstance(answered(quick, change, monkeypatch), LaneLost)


@pytest.mark.parametrize("name", ["ended", "acked"])
def test_an_end_that_nobody_asked_for_breaks_the_lane(quick, escaped, monkeypatch, name):
    def change(steps, transfer):
        return [*steps[:6], Step(name, {"transfer": transfer}), Step("wait", until=lambda *message: False), *steps[6:]]

    assert isinstance(answered(quick, change, monkeypatch), LaneLost)


@pytest.mark.parametrize(
    "raw", [sealed(b"\xc1"), sealed(msgpack.packb([1, "grant", {}])), sealed(msgpack.packb([1, ["bye"], 7])), b""]
)
def test_a_sender_whose_receiver_talks_nonsense_learns_of_it_at_once(quick, escaped, monkeypatch, raw):
    def change(steps, transfer):
        return [*steps[:3], Step("grant", raw=raw), *steps[4:]]

    assert isinstance(answered(quick, change, monkeypatch), LaneLost)


def test_a_refusal_to_open_a_lane_may_be_nonsense(quick, escaped, monkeypatch):
    def change(steps, transfer):
        return [steps[0], Step("bye", {"failure": "no"})]

    assert isinstance(answered(quick, change, monkeypatch), LaneLost)


def test_a_dialer_that_fails_in_an_unknown_way_ends_the_transfer(quick, monkeypatch):
    def fail(*given):
        raise RuntimeError("no such device")

    monkeypatch.setitem(TRANSPORTS, "inproc", replace(TRANSPORTS["inproc"], dial=fail))
    begun_s = time.monotonic()
    with pytest.raises(Internal, match="no such device"):
        quick.send(make_prefix())
    assert time.monotonic() - begun_s < 3.0


def test_a_manifest_that_no_message_holds_costs_only_its_own_transfer(quick, monkeypatch):
    neighbour = quick.begin(make_prefix("b"), BOUNDS)
    neighbour.wrote(0, 0, 1500)
    until(lambda: neighbour.received_bytes > 0, "some of it has arrived")
    with monkeypatch.context() as small:
        small.setattr("sparsevila_cluster.transport.send_lane.MAX_MANIFEST_BYTES", 1000)
        with pytest.raises(TooLarge, match="1000 may cross a lane"):
            quick.send(make_prefix())
    neighbour.wrote_all()
    assert neighbour.finish(5.0).attempts == 1


# ---- sockets ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sockets():
    ours, theirs = socket.socketpair()
    ours.settimeout(5.0)
    yield ours, theirs
    ours.close()
    theirs.close()


def drip(connection, data, every_s, num=200):
    def work():
        try:
            for byte in data[:num]:
                connection.sendall(bytes([byte]))
                time.sleep(every_s)
        except OSError:
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("what", ["frame", "store"])
def test_a_peer_that_sends_byte_by_byte_gets_no_more_time(sockets, what):
    ours, theirs = sockets
    dripping = drip(theirs, struct.pack("<I", 1000) + bytes(1000), 0.02)
    begun_s = time.monotonic()
    with pytest.raises(LaneLost, match="of 1000 bytes came"):
        if what == "frame":
            receive_frame(ours, begun_s + 0.2)
        else:
            PairStore(ours, begun_s + 0.2).get("key")
    assert time.monotonic() - begun_s < 1.5
    ours.close()
    dripping.join(5)


def test_half_a_message_ends_the_wait(sockets):
    ours, theirs = socket.create_server(("127.0.0.1", 0)), None
    with ours:
        theirs = socket.create_connection(ours.getsockname()[:2])
        connection, _ = ours.accept()
        link = MessageSocket(connection, 5.0)
        dripping = drip(theirs, struct.pack("<I", 1000) + bytes(1000), 0.02)
        begun_s = time.monotonic()
        with pytest.raises(LaneLost):
            link.receive(0.2)
        assert time.monotonic() - begun_s < 2.0
        theirs.close()
        dripping.join(5)


def test_a_length_is_no_reason_to_take_memory(sockets):
    ours, theirs = sockets
    theirs.sendall(struct.pack("<I", 60 * 2**20) + b"x")
    theirs.shutdown(socket.SHUT_WR)
    link = MessageSocket.__new__(MessageSocket)
    link._out, link._in, link.closed = ours, ours, False
    tracemalloc.start()
    try:
        with pytest.raises(LaneLost, match="closed the connection"):
            link.receive(1.0)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_lists_that_claim_to_be_long_take_no_memory(sockets):
    ours, theirs = sockets
    claims = (b"\xdd" + struct.pack(">I", 16_000)) * 1000
    theirs.sendall(struct.pack("<I", 20_000) + claims + bytes(20_000 - len(claims)))
    tracemalloc.start()
    try:
        with pytest.raises(LaneLost, match="no msgpack"):
            receive_frame(ours, time.monotonic() + 1.0)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("frame", [["key", 10**9], ["key", None], ["key"], "key", 7, {"key": b"value"}, [1, b"value"]])
def test_what_is_no_key_of_a_group_breaks_the_lane(sockets, frame):
    ours, theirs = sockets
    packed = msgpack.packb(frame)
    theirs.sendall(struct.pack("<I", len(packed)) + packed)
    tracemalloc.start()
    try:
        with pytest.raises(LaneLost):
            PairStore(ours, time.monotonic() + 1.0).get("key")
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_group_has_few_keys(sockets):
    ours, theirs = sockets
    frames = [msgpack.packb([str(i), b"x"]) for i in range(200)]
    theirs.sendall(b"".join(struct.pack("<I", len(one)) + one for one in frames))
    with pytest.raises(LaneLost, match="no key of a group"):
        PairStore(ours, time.monotonic() + 1.0).get("199")


@pytest.fixture
def listener():
    came = []
    one = Handshake("127.0.0.1", "secret", 1.0, lambda hello, store: came.append((hello, store)))
    yield one, came
    one.close()
    for _, store in came:
        store.connection.close()


def greeted(one, hello):
    with socket.create_connection((one.host, one.port), 5.0) as peer:
        packed = msgpack.packb(hello)
        peer.sendall(struct.pack("<I", len(packed)) + packed)
        peer.settimeout(5.0)
        try:
            return peer.recv(100)
        except ConnectionResetError:
            return b""


YES, NO = b"\x01\0\0\0\xc3", b"\x01\0\0\0\xc2"


@pytest.mark.parametrize("hello", [None, 7, [], "secret", {}, {"token": None}, {"token": ["secret"]}, {"token": b"secret"}])
def test_a_hello_without_a_token_is_shown_out(listener, escaped, hello):
    one, came = listener
    assert greeted(one, hello) == b"" and not came
    assert greeted(one, {"token": "guessed"}) == NO
    assert greeted(one, {"token": "secret"}) == YES


def test_a_link_of_an_unknown_kind_is_refused(escaped):
    pair = Pair("gloo", **QUICK)
    try:
        address = pair.receiver.address
        for kind in (None, ["gloo"], "pigeon", 7):
            assert greeted(address, {"token": address.token, "kind": kind}) == YES
        sent = make_prefix()
        pair.send(sent)
        assert rows_equal(sent, pair.resident("a"))
    finally:
        pair.close()


class FlakySocket:
    """Has no file left for the first connections."""

    def __init__(self, real, num):
        self._real, self.num = real, num

    def accept(self):
        if self.num:
            self.num -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._real.accept()

    def __getattr__(self, name):
        return getattr(self._real, name)


def test_a_listener_outlives_a_lack_of_files(monkeypatch):
    create = handshakes.socket.create_server
    flaky = []

    def create_flaky(*given, **more):
        flaky.append(FlakySocket(create(*given, **more), 3))
        return flaky[-1]

    monkeypatch.setattr(handshakes.socket, "create_server", create_flaky)
    one = Handshake("127.0.0.1", "secret", 1.0, lambda hello, store: store.connection.close())
    try:
        assert greeted(one, {"token": "secret"}) == YES and flaky[0].num == 0
    finally:
        one.close()


def test_few_strangers_are_greeted_at_once(listener, monkeypatch):
    one, came = listener
    before = threading.active_count()
    strangers = [socket.create_connection((one.host, one.port), 5.0) for _ in range(handshakes.MAX_GREETED + 4)]
    try:
        until(lambda: threading.active_count() >= before + handshakes.MAX_GREETED, "as many as may are greeted")
        time.sleep(0.2)
        assert threading.active_count() == before + handshakes.MAX_GREETED
        until(lambda: threading.active_count() == before, "those who say nothing are shown out", 5.0)
        assert greeted(one, {"token": "secret"}) == YES
    finally:
        for stranger in strangers:
            stranger.close()


def test_a_peer_that_does_not_read_keeps_no_heartbeat_from_the_others():
    """One thread beats for all lanes of a receiver; a lane whose socket is full must not hold it."""
    pair = Pair("gloo", **{**QUICK, "op_timeout_s": 6.0, "silence_s": 1.5, "beat_s": 0.1})
    deaf = None
    try:
        address = pair.receiver.address
        deaf = TRANSPORTS["gloo"].dial(address, "deaf", Endpoint(pair.config, CPU))
        hello = {"lane": "deaf", "worker": "prefill-9", "epoch": 1, "token": address.token, "version": VERSION}
        deaf.send(packed_message(0, "hello", hello))
        transfer = pair.begin(make_prefix(), BOUNDS)
        transfer.wrote(0, 0, 1500)
        until(lambda: transfer.received_bytes > 0, "a neighbour is under way")

        def flood():
            try:
                for number in range(1, 200_000):  # each is answered
                    deaf.send(packed_message(number, "abort", {"transfer": "x" * 4000, "reason": ""}))
            except LaneLost:
                pass

        flooding = threading.Thread(target=flood, daemon=True)
        flooding.start()
        time.sleep(3.0)  # longer than a lane may be silent
        transfer.wrote_all()
        assert transfer.finish(5.0).attempts == 1
        deaf.close()
        flooding.join(8)
    finally:
        if deaf is not None:
            deaf.close()
        pair.close()
