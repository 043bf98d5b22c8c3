"""The other process of a transfer: a receiver in front of an arena, and a bare gloo group to compare it with."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from benchmarks.lib.stopwatch import once_ms
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.kvcache.arena import Arena, Extent, KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata
from sparsevila_cluster.transport import KVReceiver, KVSender, ReceiverAddress, TransferTicket
from sparsevila_cluster.transport.backends.gloo import build_group
from sparsevila_cluster.transport.handshake import Handshake, PairStore, connect
from sparsevila_cluster.transport.manifest import Manifest

WAIT_S = 120.0
HOST = "127.0.0.1"


class DroppingSink:
    """A prefix sink that takes every prefix and drops it again."""

    def __init__(self, spec: KVSpec, num_slots: int):
        self.arena = Arena(spec, num_slots)
        for tensor in self.arena.k + self.arena.v:
            tensor.zero_()  # memory that was never touched would be paid for by the first transfer

    def allocate(self, manifest: Manifest, deadline_s: float) -> Extent:
        extent = self.arena.alloc(manifest.metadata.length)
        assert extent is not None, "one transfer at a time"
        return extent

    def publish(self, manifest: Manifest, extent: Extent) -> None:
        self.arena.free(extent)

    def cancel(self, extent: Extent) -> None:
        self.arena.free(extent)


def serve(pipe: Connection, spec: KVSpec, num_slots: int, config: TransportConfig) -> None:
    """The far process: obeys (what, argument) until None."""
    torch.set_num_threads(1)
    receiver = KVReceiver("far", DroppingSink(spec, num_slots), spec, config)
    # The near side may have its end of the group, and ask, before the thread of the handshake has handed ours over.
    made: SimpleQueue[Any] = SimpleQueue()
    handshake = Handshake(HOST, "raw", WAIT_S, lambda hello, store: made.put(build_group(store, 0, HOST, WAIT_S)))
    group: Any = None
    target = torch.zeros(num_slots * spec.bytes_per_token, dtype=torch.uint8)
    pipe.send((receiver.address, handshake.port))
    while (order := pipe.recv()) is not None:
        what, given = order
        if what == "expect":
            receiver.expect(given, "k", WAIT_S)
            pipe.send(True)
        elif what == "receive":
            group = made.get(timeout=WAIT_S) if group is None else group
            work = group.recv([target[:given]], 1, 1)
            pipe.send(True)
            work.wait()
            group.send([target[:1]], 1, 2).wait()
    receiver.close()
    handshake.close()


class Near:
    """This process: sends prefixes of random KV by lane, and the same number of bytes by a bare group."""

    def __init__(self, spec: KVSpec, num_slots: int, config: TransportConfig):
        self.spec, self.num_slots = spec, num_slots
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, spec, num_slots, config), daemon=True)
        self._process.start()
        self.address, port = self._pipe.recv()
        store: PairStore
        store, here = connect(ReceiverAddress("far", "gloo", HOST, port, "raw"), WAIT_S)
        self._group = build_group(store, 1, here, WAIT_S)
        self._sender = KVSender("near", config)
        self._number = 0

    def ticket(self) -> TransferTicket:
        """Of a transfer that the far side expects."""
        self._number += 1
        self._ask("expect", f"transfer-{self._number}")
        return TransferTicket(f"transfer-{self._number}", self.address, WAIT_S)

    def begin(self, prefix: MediaPrefix, bounds: Any, ticket: TransferTicket) -> Any:
        return self._sender.begin(prefix, bounds, ticket)

    def lane_ms(self, prefix: MediaPrefix) -> float:
        """Offer, send, verify, publish. The ticket is had before the clock starts, as from a router."""
        ticket = self.ticket()
        return once_ms(lambda: self._send(prefix, ticket))

    def raw_ms(self, source: torch.Tensor) -> float:
        """One send into a receive that is posted, one byte back."""
        self._ask("receive", source.numel())
        return once_ms(lambda: self._send_raw(source))

    def _send(self, prefix: MediaPrefix, ticket: TransferTicket) -> None:
        transfer = self._sender.begin(prefix, (0, prefix.length), ticket)
        transfer.wrote_all()
        transfer.finish(WAIT_S)

    def _send_raw(self, source: torch.Tensor) -> None:
        self._group.send([source], 0, 1).wait()
        self._group.recv([torch.empty(1, dtype=torch.uint8)], 0, 2).wait()

    def close(self) -> None:
        self._pipe.send(None)
        self._sender.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, what: str, given: Any) -> None:
        self._pipe.send((what, given))
        assert self._pipe.recv() is True


def make_prefix(spec: KVSpec, num_bytes: int) -> MediaPrefix:
    """A prefix of about `num_bytes` of random KV, all of it text."""
    length = num_bytes // spec.bytes_per_token
    arena = Arena(spec, length)
    extent = arena.alloc(length)
    assert extent is not None
    for tensor in arena.k + arena.v:
        tensor.normal_()
    metadata = PrefixMetadata(
        key="k",
        spec=spec,
        is_visual=torch.zeros(length, dtype=torch.bool),
        positions=torch.arange(length)[None].repeat(3, 1),
        token_map=torch.full((length, 3), -1, dtype=torch.int32),
        next_pos=length,
        generation_floor=0,
        grids=(),
        media=(),
        frames=(),
        times_s=(),
        kind="video",
        num_frames=0,
        duration_s=0.0,
        num_visual=0,
    )
    return MediaPrefix(metadata, extent)
