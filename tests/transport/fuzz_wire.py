"""What crosses lanes, broken a hundred thousand times: `python -m tests.transport.fuzz_wire --cases 100000 --seed 0`.

manifest     bytes of a manifest are decoded
message      bytes of lane messages are decoded
frame        bytes of a handshake or of a message socket are read from a socket
inproc, gloo, objectstore    a peer that breaks one step of a transfer, against a real receiver
replies      one that breaks a step of what a receiver says, against a real sender
handshake    strangers and friends at a real port

Each case must end as what was sent or as a typed error, in time and within bounds of memory, and leave nothing behind: no byte,
lease, lane, thread or open file. Whatever does not is named with its number; `--seed SEED --only NUMBER` tries one again.
"""

from __future__ import annotations

import argparse
import gc
import logging
import math
import os
import random
import resource
import signal
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import torch

from sparsevila_cluster.core.addresses import ReceiverAddress, TransferTicket
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import DataLoss, Incompatible, Internal, LaneLost, SparseVilaError
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata
from sparsevila_cluster.transport import KVReceiver, KVSender, OutgoingTransfer, TransferState
from sparsevila_cluster.transport.backends.inproc import InprocListener
from sparsevila_cluster.transport.channel import MESSAGES, Channel
from sparsevila_cluster.transport.chunks import ChunkBuffers
from sparsevila_cluster.transport.handshake import MessageSocket, PairStore, receive_frame
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES, Endpoint
from sparsevila_cluster.transport.manifest import Manifest
from sparsevila_cluster.transport.transports import TRANSPORTS
from tests.transport.transport_fixtures import (
    SPEC,
    DictObjectStore,
    StoreSink,
    assert_same_metadata,
    make_prefix,
    rows_equal,
    until,
)
from tests.transport.wire_mutants import broken_bytes, broken_map, mutated, odd_value
from tests.transport.wire_scripts import (
    CPU,
    ScriptedPeer,
    Step,
    broken_script,
    packed_message,
    receiver_script,
    sealed,
    sender_script,
    stray_messages,
)

MIB = 2**20
BOUNDS = (0, 5, 9, 14, 24)
NUM_SLOTS = 320
FREE = 7.0  # what a sink writes where nothing lies
SHORT = {"beat_s": 0.1, "silence_s": 10.0, "op_timeout_s": 4.0, "dial_timeout_s": 2.0, "lease_s": 20.0, "credits": 2}
GREET_S = 0.5  # deadline of a handshake
SLACK_S = 4.0  # time in which a busy machine may bring what is due
# Of what is decoded: bytes beside a multiple of those that came. Lists that claim to be long, one within the other, are what costs.
MEMORY_BYTES = {"manifest": 96 * MIB, "message": 40 * MIB, "frame": 2 * MIB}
BYTES_PER_BYTE = 100
ADDRESS_SPACE_BYTES = 3 << 30  # more than this run has: what would take the machine down ends in MemoryError
CHECKED_EVERY = 50  # cases with a real peer, until everything is looked at


class Violation(Exception):
    """A promise that a case found broken."""


def require(truth: bool, what: str) -> None:
    if not truth:
        raise Violation(what)


@dataclass
class Tally:
    outcomes: dict[str, Counter] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def add(self, kind: str, outcome: str, took_s: float, label: str) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        self.slowest = max(self.slowest, (took_s, label))

    def line(self, num: int, seed: int, took_s: float) -> str:
        total: Counter = sum(self.outcomes.values(), Counter())
        counts = ", ".join(f"{count} {outcome}" for outcome, count in total.most_common(8))
        return (
            f"fuzz-wire: {num} cases, seed {seed}, {took_s:.0f} s: {counts}; slowest {self.slowest[0]:.2f} s "
            f"({self.slowest[1]}); {len(self.violations)} violations"
        )


# ---- decoding alone ---------------------------------------------------------------------------------------------------------


def is_sound(metadata: PrefixMetadata) -> str:
    """What is wrong with metadata that a decode engine would be given, "" = nothing. Written from what the fields mean."""
    n, grids = metadata.length, metadata.grids
    if metadata.positions.dim() != 2 or metadata.positions.shape[1] != n or not 1 <= metadata.positions.shape[0] <= 4:
        return f"positions {tuple(metadata.positions.shape)} for {n} rows"
    if not 0 <= int(metadata.positions.min()) <= int(metadata.positions.max()) < 2**31 or not 0 <= metadata.next_pos < 2**31:
        return "positions that no model has"
    if not all(math.isfinite(t) and t >= 0 for t in (*metadata.times_s, metadata.duration_s)):
        return f"times {metadata.times_s}, duration {metadata.duration_s}"
    if not all(type(t) is float for t in (*metadata.times_s, metadata.duration_s)):
        return "times that are no numbers"
    if not all(1 <= side <= 2**14 for grid in grids for side in grid):
        return f"grids {grids}"
    for visual, (group, row, col) in zip(metadata.is_visual.tolist(), metadata.token_map.tolist(), strict=True):
        if not visual and group >= len(grids):
            return f"a token of group {group}"
        if visual and not (0 <= group < len(grids) and 0 <= row < grids[group][0] and 0 <= col < grids[group][1]):
            return f"a visual token at {group, row, col} of grids {grids}"
    counts = (metadata.num_frames, metadata.num_visual, *metadata.media, *metadata.frames)
    return "" if all(0 <= count < 2**40 for count in counts) else f"counts {counts}"


def manifests() -> list[dict[str, Any]]:
    """Fields of sound manifests."""
    found = []
    for number, config in enumerate((TransportConfig(), TransportConfig(quantization="int8"), TransportConfig(checksum=False))):
        prefix = make_prefix(length=(24, 1, 7)[number], seed=number)
        bounds = BOUNDS if prefix.length == 24 else (0, prefix.length)
        found.append(msgpack.unpackb(Manifest.of(prefix, f"transfer-{number}", bounds, config).pack()))
    return found


def manifest_case(dice: random.Random, world: World) -> tuple[str, str]:
    fields = dice.choice(world.manifests)
    raw, how = broken_map(dice, fields)
    with bounded("manifest", len(raw)):
        try:
            manifest = Manifest.unpack(raw)
        except (DataLoss, Incompatible) as error:
            require(0 < len(str(error)) < 2000, f"an error of {len(str(error))} characters")
            return type(error).__name__, how
    wrong = is_sound(manifest.metadata)
    require(not wrong, f"accepted {wrong} ({how})")
    again = Manifest.unpack(manifest.pack())
    assert_same_metadata(again.metadata, manifest.metadata)
    require({**vars(again), "metadata": 0} == {**vars(manifest), "metadata": 0}, f"not the same when packed again ({how})")
    covered = Counter(
        (layer, row) for c in manifest.chunks for layer in range(c.first_layer, c.stop_layer) for row in range(c.start, c.stop)
    )
    every = manifest.metadata.length * manifest.metadata.spec.num_layers
    require(len(covered) == every and set(covered.values()) == {1}, f"chunks do not tile ({how})")
    try:
        manifest.check(SPEC)
    except Incompatible as error:
        require(len(str(error)) < 2000, f"an error of {len(str(error))} characters")
        return "Incompatible", how
    return "manifest", how


class RawLink:
    """Gives a channel what it is to receive."""

    kind = "raw"
    straight = True

    def __init__(self, raw: list[bytes]):
        self.raw = raw

    def receive(self, within_s: float) -> bytes:
        if not self.raw:
            raise LaneLost("the end")
        return self.raw.pop(0)


def message_case(dice: random.Random, world: World) -> tuple[str, str]:
    bodies = [*stray_messages("transfer-1", ()), *world.messages]
    chosen = [dice.choice(bodies) for _ in range(3)]
    raw = [packed_message(number, name, body) for number, (name, body) in enumerate(chosen)]
    at = dice.randrange(3)
    name, body = chosen[at]
    what = dice.randrange(8)
    if what < 4:
        changed, how = mutated(dice, body)
        raw[at] = packed_message(at, name, changed)
    elif what == 4:
        whole, how = mutated(dice, [at, name, body])
        raw[at] = sealed(msgpack.packb(whole))
    elif what == 5:
        changed_bytes, how = broken_bytes(dice, msgpack.packb([at, name, body]))
        raw[at] = sealed(changed_bytes)
    elif what == 6:
        raw[at], how = broken_bytes(dice, raw[at])
    else:
        changed_bytes, how = broken_map(dice, body or {"a": 1})
        raw[at] = sealed(b"\x93" + msgpack.packb(at) + msgpack.packb(name) + changed_bytes)
    how = f"{name}: {how}"
    size = sum(map(len, raw))
    channel = Channel(RawLink(raw))  # type: ignore[arg-type]
    with bounded("message", size):
        try:
            while True:
                message = channel.receive(1.0)
                require(message.name in MESSAGES and isinstance(message.body, dict), f"received {message} ({how})")
        except LaneLost as error:
            require(len(str(error)) < 2000, f"an error of {len(str(error))} characters ({how})")
            return "all read" if str(error) == "the end" else "LaneLost", how


def frame_case(dice: random.Random, world: World) -> tuple[str, str]:
    """Frames of a handshake, of a store of two, or messages, through a socket."""
    reader = dice.choice(("frame", "store", "messages"))
    content: Any = {"token": "secret", "kind": "gloo"} if reader == "frame" else ["key", b"value" * 4]
    if dice.random() < 0.5:
        changed, how = mutated(dice, content)
        raw = msgpack.packb(changed)
    else:
        raw, how = broken_bytes(dice, msgpack.packb(content))
    head = struct.pack("<I", len(raw))
    cut = dice.randrange(6)
    if cut == 0:
        head, how = (
            struct.pack("<I", dice.choice((2**32 - 1, 64 * MIB, 64 * MIB + 1, 65536, 65537, len(raw) + 1, 0))),
            "wrong length",
        )
    elif cut == 1:
        raw, how = raw[: len(raw) // 2], "half a frame"
    elif cut == 2:
        head, how = head[: dice.randrange(4)], "half a length"
    data = (head + raw) * dice.choice((1, 1, 3))
    ours, theirs = socket.socketpair()
    how = f"{reader}: {how}"
    try:
        ours.settimeout(2.0)
        pushing = threading.Thread(target=_push, args=(theirs, data), daemon=True)
        pushing.start() if len(data) > 100_000 else _push(theirs, data)
        with bounded("frame", len(data)):
            try:
                if reader == "frame":
                    receive_frame(ours, time.monotonic() + 2.0)
                elif reader == "store":
                    value = PairStore(ours, time.monotonic() + 2.0).get("key")
                    require(isinstance(value, bytes) and len(value) <= len(data), f"a value of {len(value)} bytes ({how})")
                else:
                    link = MessageSocket.__new__(MessageSocket)
                    link._out, link._in, link.closed = ours, ours, False
                    require(len(link.receive(2.0)) <= MAX_MESSAGE_BYTES, "a long message")
            except LaneLost as error:
                require(len(str(error)) < 2000, f"an error of {len(str(error))} characters ({how})")
                return "LaneLost", how
        return "read", how
    finally:
        ours.close()
        theirs.close()
        if pushing.ident:
            pushing.join(5)


def _push(connection: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


@contextmanager
def bounded(kind: str, num_bytes: int) -> Iterator[None]:
    """Within it no more memory may be taken than what came can need."""
    gc.disable()  # a collection in between would be counted
    tracemalloc.start()
    try:
        yield
    finally:
        took = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
        allowed = MEMORY_BYTES[kind] + BYTES_PER_BYTE * num_bytes
        require(took <= allowed, f"took {took} bytes to read {num_bytes}; {allowed} are allowed")


# ---- real peers -------------------------------------------------------------------------------------------------------------


class CountingReceiver(KVReceiver):
    """Counts the lanes that it took: a peer may have left before its lane is there."""

    num_taken = 0

    def _accept(self, link: Any) -> None:
        super()._accept(link)
        self.num_taken += 1


class Site:
    """A receiver with a prefix that stays, and a sender with a transfer that is under way all the time: both are bystanders."""

    def __init__(self, kind: str):
        self.kind = kind
        self.store = DictObjectStore()
        self.config = TransportConfig(kind=kind, **SHORT)
        self.sink = StoreSink(NUM_SLOTS)
        for tensor in self.sink.store.arena.k + self.sink.store.arena.v:
            tensor.fill_(FREE)
        self.receiver = CountingReceiver("decode-0", self.sink, SPEC, self.config, object_store=self.store)
        self.store.receivers["decode-0"] = self.receiver
        self.sender = KVSender("prefill-0", self.config, object_store=self.store)
        self.kept = make_prefix("kept", length=40, seed=3)
        self._num = 0
        self.control(self.kept, stays=True)
        self.under_way, self.transfer = self._begin()

    def _begin(self) -> tuple[MediaPrefix, OutgoingTransfer]:
        prefix = make_prefix("under way", length=24, seed=4)
        transfer = self.sender.begin(prefix, BOUNDS, self.ticket("under way", 600.0))
        for layer in range(SPEC.num_layers):
            transfer.wrote(layer, 0, 9)
        until(lambda: transfer.received_bytes > 0, "half of it has arrived")
        return prefix, transfer

    def ticket(self, key: str, deadline_s: float = 10.0) -> TransferTicket:
        self._num += 1
        self.receiver.expect(f"transfer-{self._num}", key, 600.0)
        return TransferTicket(f"transfer-{self._num}", self.receiver.address, deadline_s)

    def control(self, prefix: MediaPrefix, stays: bool = False) -> None:
        """A sound transfer must arrive as it is."""
        transfer = self.sender.begin(prefix, (0, prefix.length), self.ticket(prefix.key))
        transfer.wrote_all()
        transfer.finish(10.0)
        self.compare(prefix)
        if not stays:
            self.remove(prefix.key)

    def resident(self, key: str) -> MediaPrefix | None:
        with self.sink.lock:
            return self.sink.store.get(key)

    def compare(self, prefix: MediaPrefix) -> None:
        came = self.resident(prefix.key)
        require(came is not None, f"{prefix.key} is not resident")
        assert came is not None
        require(rows_equal(prefix, came), f"rows of {prefix.key} are not those that were sent")
        assert_same_metadata(came.metadata, prefix.metadata)

    def remove(self, key: str) -> None:
        with self.sink.lock:
            prefix = self.sink.store.get(key)
            if prefix is not None:
                self.sink.store.remove(key)
                for tensor in prefix.extent.arena.k + prefix.extent.arena.v:
                    tensor[prefix.extent.start : prefix.extent.stop] = FREE

    def is_left_alone(self) -> bool:
        """Whether nobody but the bystander has a lane."""
        return all(lane["transfers"] == [self.transfer.transfer_id] for lane in self.receiver.info()["lanes"])

    def check(self, key: str) -> str:
        """After a case: how its transfer ended. Only bystanders may hold bytes."""
        others = self.under_way.kv_bytes
        came = self.resident(key)
        self.remove(key)
        wait_for(lambda: self.receiver.info()["bytes_in_flight"] == others, "bytes in flight come back")
        wait_for(lambda: self.sink.used_bytes == others + self.kept.kv_bytes, "extents come back")
        with self.sink.lock:
            self.sink.store.check_integrity()
            arena = self.sink.store.arena
            for start, stop in arena._free:
                require(
                    bool((arena.k_all[:, start:stop] == FREE).all() and (arena.v_all[:, start:stop] == FREE).all()),
                    "wrote to free rows",
                )
        return "resident" if came is not None else "not resident"

    def check_bystanders(self) -> None:
        self.compare(self.kept)
        self.transfer.wrote_all()
        self.transfer.finish(10.0)
        require(self.transfer.num_attempts == 1, f"the transfer of a bystander on {self.kind} was begun again")
        self.compare(self.under_way)
        self.remove(self.under_way.key)
        self.control(make_prefix("control", length=30, seed=5))
        require(self.sink.used_bytes == self.kept.kv_bytes, "bytes are left")
        self.under_way, self.transfer = self._begin()

    def close(self) -> None:
        self.transfer.abort("the end")
        self.sender.close()
        self.receiver.close()


def wait_for(truth: Callable[[], bool], what: str) -> None:
    until_s = time.monotonic() + SHORT["op_timeout_s"] + SLACK_S
    while not truth():
        require(time.monotonic() < until_s, f"never: {what}")
        time.sleep(0.0005)


class World:
    """What cases need, made when they first need it."""

    def __init__(self) -> None:
        self.manifests = manifests()
        prefix = make_prefix("m", length=24)
        manifest = Manifest.of(prefix, "transfer-1", BOUNDS, TransportConfig())
        steps = [*sender_script(prefix, manifest, "secret", "prefill-9"), *receiver_script(manifest, 2)]
        self.messages = [(step.name, step.body) for step in steps if step.name in MESSAGES]
        self.sites: dict[str, Site] = {}
        self.replies: Replies | None = None
        self._prefixes: dict[int, MediaPrefix] = {}

    def site(self, kind: str) -> Site:
        if kind not in self.sites:
            self.sites[kind] = Site(kind)
        return self.sites[kind]

    def prefix(self, key: str, seed: int) -> MediaPrefix:
        """One of few, under a key of its own."""
        if seed not in self._prefixes:
            self._prefixes[seed] = make_prefix("", length=24, seed=seed)
        made = self._prefixes[seed]
        return MediaPrefix(replace(made.metadata, key=key), made.extent)

    def check(self) -> None:
        for site in self.sites.values():
            site.check_bystanders()
        if self.replies is not None:
            self.replies.check()

    def close(self) -> None:
        for site in self.sites.values():
            site.close()
        if self.replies is not None:
            self.replies.close()


def delivered(prefix: MediaPrefix, manifest: Manifest) -> MediaPrefix:
    """What a prefix is once it has been received: itself, or what int8 makes of it."""
    target = make_prefix("target", length=prefix.length, seed=99)
    source, sink = ChunkBuffers(manifest, prefix.extent, CPU), ChunkBuffers(manifest, target.extent, CPU)
    for chunk in manifest.chunks:
        sink.scatter(chunk, source.gather(chunk))
    return target


def same_bits(one: MediaPrefix, other: MediaPrefix) -> bool:
    pairs = zip(one.extent.all_rows(), other.extent.all_rows(), strict=True)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)


def lane_case(kind: str, dice: random.Random, world: World) -> tuple[str, str]:
    """A sender that breaks its part."""
    site = world.site(kind)
    config = TransportConfig(quantization=dice.choice(("none", "none", "int8")), checksum=dice.random() < 0.8)
    ticket = site.ticket(f"case {site._num}")
    prefix = world.prefix(f"case {site._num - 1}", dice.randrange(4))
    manifest = Manifest.of(prefix, ticket.transfer_id, BOUNDS, config)
    manifest = replace(manifest, straight_bytes=dice.choice((0, 64)) if kind != "objectstore" else 0)
    steps = sender_script(prefix, manifest, site.receiver.address.token, dice.choice(("prefill-9", "prefill-9", "prefill-0")))
    others = (site.transfer.transfer_id, "transfer-1")
    steps, how, touched = broken_script(dice, steps, others, any_bulk=kind != "gloo")
    num_taken = site.receiver.num_taken
    link = TRANSPORTS[kind].dial(ticket.receiver, f"fuzz-{site._num}", Endpoint(site.config, CPU, site.store))
    peer = ScriptedPeer(link)
    peer.play(steps)
    wait_for(lambda: site.receiver.num_taken > num_taken, "the lane of the case is taken")
    wait_for(site.is_left_alone, f"the lane of the case is closed ({how})")
    came, state = site.resident(prefix.key), site.receiver.state(ticket.transfer_id)
    sound = "" if came is None else is_sound(came.metadata)
    require(not sound, f"published {sound} ({how})")
    require(came is not None or state is not TransferState.ACKED, f"acknowledged, and not resident ({how})")
    # KV that has no checksum, or was changed before it was reckoned, and rows in another order, are what was sent, whatever it is.
    told = [
        step.body["manifest"] for step in steps if step.name == "offer" and isinstance(step.body, dict) and "manifest" in step.body
    ]
    as_told = (
        touched
        and (not config.checksum or "scales" in how)
        or told != [manifest.pack()]
        or any(step.name == "offer" and step.raw is not None for step in steps)
    )
    if came is not None and not as_told:
        require(same_bits(came, delivered(prefix, manifest)), f"published what was not sent ({how})")
        assert_same_metadata(came.metadata, prefix.metadata)
    outcome = site.check(prefix.key)
    site.receiver.forget(ticket.transfer_id)
    require(site.receiver.state(ticket.transfer_id).terminal, f"{state} after it was forgotten ({how})")
    return outcome, how


class Replies:
    """A real sender, and receivers that follow a script, reached in process."""

    def __init__(self) -> None:
        self.config = TransportConfig(kind="inproc", **SHORT)
        self.sender = KVSender("prefill-0", self.config)
        self.address = ReceiverAddress("decode-9", "inproc", "", 0, "scripted")
        self._listener = InprocListener("scripted", Endpoint(self.config, CPU), self._accept)
        self._steps: list[Step] = []
        self._buffers: ChunkBuffers | None = None
        self._peers: list[ScriptedPeer] = []
        self.num = 0

    def _accept(self, link: Any) -> None:
        peer = ScriptedPeer(link, self._buffers)
        self._peers.append(peer)
        peer.play(self._steps)

    def case(self, dice: random.Random, world: World) -> tuple[str, str]:
        self.num += 1
        prefix = world.prefix(f"reply {self.num}", dice.randrange(4))
        ticket = TransferTicket(f"reply-{self.num}", self.address, 5.0)
        manifest = Manifest.of(prefix, ticket.transfer_id, BOUNDS, self.config)
        target = make_prefix("target", length=24)
        self._buffers = ChunkBuffers(manifest, target.extent, CPU)
        self._peers = []
        self._steps, how, _ = broken_script(dice, receiver_script(manifest, 2), (), any_bulk=True)
        transfer = self.sender.begin(prefix, BOUNDS, ticket)
        transfer.wrote_all()
        begun_s = time.monotonic()
        try:
            transfer.finish(1.0)
            outcome = "acked"
            acked = [step for step in self._steps if step.name == "acked" or step.raw is not None]
            require(bool(acked), f"succeeded without an acknowledgement ({how})")
        except SparseVilaError as error:
            require(not isinstance(error, Internal), f"Internal: {error} ({how})")
            require(len(str(error)) < 4000, f"an error of {len(str(error))} characters ({how})")
            outcome = type(error).__name__
        require(time.monotonic() - begun_s < 1.0 + SLACK_S, f"finish took {time.monotonic() - begun_s:.2f} s ({how})")
        wait_for(lambda: not any(lane["transfers"] for lane in self.sender.info()["lanes"]), f"the lane lets go of it ({how})")
        return outcome, how

    def check(self) -> None:
        """The same sender still serves a real receiver."""
        sink = StoreSink(64)
        receiver = KVReceiver("decode-8", sink, SPEC, self.config)
        prefix = make_prefix("control", length=30, seed=6)
        receiver.expect("control", "control", 10.0)
        try:
            transfer = self.sender.begin(prefix, (0, 30), TransferTicket("control", receiver.address, 10.0))
            transfer.wrote_all()
            transfer.finish(10.0)
            came = sink.store.get("control")
            require(came is not None and rows_equal(prefix, came), "a control transfer of the sender did not arrive")
        finally:
            self.sender.forget(receiver.address)
            receiver.close()

    def close(self) -> None:
        self._listener.close()
        self.sender.close()


def reply_case(dice: random.Random, world: World) -> tuple[str, str]:
    if world.replies is None:
        world.replies = Replies()
    return world.replies.case(dice, world)


def handshake_case(dice: random.Random, world: World) -> tuple[str, str]:
    """Whoever connects to a port."""
    site = world.site("gloo")
    address = site.receiver.address
    hello: Any = {"token": address.token, "kind": "gloo"}
    how = dice.choice(("hello", "hello", "bytes", "length", "half", "keys", "keys", "slow", "messages"))
    raw = msgpack.packb(hello)
    if how == "hello":
        hello, what = mutated(dice, hello)
        raw, how = msgpack.packb(hello), f"hello: {what}"
    elif how == "bytes":
        raw, how = broken_bytes(dice, raw)
    head = struct.pack("<I", len(raw))
    if how == "length":
        head = struct.pack("<I", dice.choice((2**32 - 1, 65536, 65537, len(raw) + 5, 0)))
    begun_s = time.monotonic()
    with socket.create_connection((address.host, address.port), 5.0) as stranger:
        stranger.settimeout(SHORT["dial_timeout_s"] + SLACK_S)
        with suppress(OSError):
            if how == "slow":
                data = dice.choice((head + raw, head + raw + b"\xff" * 40, struct.pack("<I", 1000) + b"\x81" * 50))
                for one in data[:60]:
                    stranger.sendall(bytes([one]))
                    time.sleep(0.002)
            elif how == "half":
                stranger.sendall((head + raw)[: dice.randrange(1, len(head + raw))])
            else:
                stranger.sendall(head + raw)
            if how in ("keys", "messages"):
                for _ in range(dice.randrange(1, 5)):
                    frame = msgpack.packb(
                        odd_value(dice) if dice.random() < 0.4 else [dice.choice(("0", "rank_1", "x")), odd_value(dice)]
                    )
                    stranger.sendall(struct.pack("<I", len(frame)) + frame)
            stranger.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            while stranger.recv(4096):
                pass
    took_s = time.monotonic() - begun_s
    require(took_s < SHORT["dial_timeout_s"] + SLACK_S, f"held a connection for {took_s:.1f} s ({how})")
    return "shown out", how


# Kind -> how many of 1,000 cases, and what a case does.
KINDS: dict[str, tuple[int, Callable[[random.Random, World], tuple[str, str]]]] = {
    "manifest": (580, manifest_case),
    "message": (250, message_case),
    "frame": (90, frame_case),
    "inproc": (40, lambda dice, world: lane_case("inproc", dice, world)),
    "replies": (25, reply_case),
    "objectstore": (5, lambda dice, world: lane_case("objectstore", dice, world)),
    "gloo": (5, lambda dice, world: lane_case("gloo", dice, world)),
    "handshake": (5, handshake_case),
}
DECODING = ("manifest", "message", "frame")


class Watch(logging.Handler):
    """Errors that escaped: of threads, and those that a last resort caught and logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        self._hook = threading.excepthook

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else ""
        self.found.append(f"{record.getMessage()}: {type(cause).__name__}: {str(cause)[:200]}")

    def __enter__(self) -> Watch:
        def hook(args: threading.ExceptHookArgs) -> None:
            name = args.thread.name if args.thread else "?"
            self.found.append(f"thread {name} ended by {args.exc_type.__name__}: {str(args.exc_value)[:200]}")

        threading.excepthook = hook
        self._logger = logging.getLogger("sparsevila_cluster.transport")
        self._logger.addHandler(self)
        self._before = self._logger.level, self._logger.propagate
        self._logger.propagate = False
        return self

    def __exit__(self, *error: object) -> None:
        threading.excepthook = self._hook
        self._logger.removeHandler(self)
        self._logger.propagate = self._before[1]

    def take(self) -> None:
        found, self.found = self.found, []
        require(not found, "; ".join(found[:3]))


@contextmanager
def limits() -> Iterator[None]:
    """Within it a case that takes memory or time without end fails instead of the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE_BYTES, hard))
    main = threading.current_thread() is threading.main_thread()

    def stuck(*_: object) -> None:
        raise Violation("stuck")

    before = signal.signal(signal.SIGALRM, stuck) if main else None
    try:
        yield
    finally:
        if main:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def kind_of(dice: random.Random) -> str:
    return dice.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def fuzz(
    numbers: Sequence[int], seed: int, advance: Callable[[Tally], None] = lambda tally: None, kinds: Sequence[str] = ()
) -> tuple[Tally, str]:
    """Try cases; the tally and its summary line. kinds: of cases, none = all."""
    tally, begun_s = Tally(), time.monotonic()
    threads, files = set(threading.enumerate()), open_files()
    with limits(), Watch() as watch:
        world, unchecked = World(), []
        for number in numbers:
            dice = random.Random(f"{seed}-{number}")
            kind = kind_of(dice)
            if kinds and kind not in kinds:
                continue
            label = f"{kind}, seed {seed} number {number}"
            if threading.current_thread() is threading.main_thread():
                signal.setitimer(signal.ITIMER_REAL, 30)
            case_s = time.monotonic()
            wrong = ""
            try:
                outcome, _ = KINDS[kind][1](dice, world)
                watch.take()
                if kind not in DECODING:
                    unchecked.append(number)
                    if len(unchecked) >= CHECKED_EVERY or number == numbers[-1]:
                        label, unchecked = f"{label} or one since {unchecked[0]}", []
                        world.check()
                        watch.take()
            except SparseVilaError as error:
                outcome, wrong = "violation", f"unexpected {type(error).__name__}: {str(error)[:300]}"
            except (Violation, AssertionError) as error:
                outcome, wrong = "violation", str(error)[:500] or "assertion failed"
            except Exception as error:
                outcome, wrong = "violation", f"{type(error).__name__}: {str(error)[:300]}"
            took_s = time.monotonic() - case_s
            if not wrong and kind in DECODING and took_s > SLACK_S:
                wrong = f"took {took_s:.1f} s"
            if wrong:
                tally.violations.append(f"{label}: {wrong}")
                if kind not in DECODING:  # what is broken must not be blamed on the next one
                    broken, world = world, World()
                    unchecked = []
                    with suppress(Exception):
                        broken.close()
                    del broken  # and the sockets that it holds
                    watch.found.clear()
            tally.add(kind, outcome, took_s, label)
            advance(tally)
        try:
            world.check()
            world.close()
            del world, dice  # sockets are closed when nobody holds them any more
            wait_for(lambda: not set(threading.enumerate()) - threads, f"threads end: {set(threading.enumerate()) - threads}")
            gc.collect()
            wait_for(lambda: open_files() <= files, f"{open_files()} files are open, {files} before")
            watch.take()
        except Exception as error:
            tally.violations.append(f"after the last case: {type(error).__name__}: {str(error)[:300]}")
    return tally, tally.line(sum(sum(one.values()) for one in tally.outcomes.values()), seed, time.monotonic() - begun_s)


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m tests.transport.fuzz_wire", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000, help="how many (default 100000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--kind", action="append", default=[], choices=list(KINDS), help="only cases of this kind")
    options = parser.parse_args(argv)
    numbers = range(options.cases) if options.only is None else [options.only]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("0 violations", total=len(numbers))

        def advance(tally: Tally) -> None:
            progress.update(task, advance=1, description=f"{len(tally.violations)} violations")

        tally, line = fuzz(numbers, options.seed, advance, options.kind)
    for kind, counts in sorted(tally.outcomes.items()):
        print(f"{kind:<12} " + ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    for violation in tally.violations:
        print(f"VIOLATION {violation}")
    print(line)
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())
