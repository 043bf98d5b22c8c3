"""A receiver and a sender in this process, prefixes to send, an object store in memory, and what must be true at rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.kvcache.arena import Arena, Extent, KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata
from sparsevila_cluster.kvcache.prefix_store import PrefixStore
from sparsevila_cluster.transport import KVReceiver, KVSender, OutgoingTransfer, ReceiverAddress, TransferReport, TransferTicket
from sparsevila_cluster.transport.manifest import Manifest

SPEC = KVSpec(num_layers=3, num_kv_heads=2, head_dim=16, dtype=torch.float32, fingerprint="model-a")
KINDS = ("inproc", "gloo", "objectstore")
# The first piece is long enough to travel straight from row to row, the second is packed.
BOUNDS = (0, 1100, 1500)
FINE = {"chunk_bytes": 65536}  # 256 rows of a layer: many chunks


def make_prefix(key: str = "a", length: int = 1500, seed: int = 0, spec: KVSpec = SPEC) -> MediaPrefix:
    """A prefix of random KV, in an arena of its own, not at its beginning."""
    random = torch.Generator().manual_seed(seed)
    arena = Arena(spec, length + 7)
    arena.alloc(5)
    extent = arena.alloc(length)
    assert extent is not None
    for tensor in arena.k + arena.v:
        tensor.copy_(torch.randn(tensor.shape, generator=random))
    is_visual = torch.arange(length) % 5 != 0
    token_map = torch.where(is_visual[:, None], torch.randint(0, 2, (length, 3), generator=random), -1).to(torch.int32)
    metadata = PrefixMetadata(
        key=key,
        spec=spec,
        is_visual=is_visual,
        positions=torch.randint(0, 99, (3, length), generator=random),
        token_map=token_map,
        next_pos=77,
        generation_floor=3,
        grids=((4, 6), (2, 3)),
        media=(0, 1),
        frames=(0, 9),
        times_s=(0.0, 4.5),
        kind="video",
        num_frames=16,
        duration_s=8.0,
        num_visual=4 * length,
        tenant="someone",
    )
    return MediaPrefix(metadata, extent)


def rows_equal(one: MediaPrefix, other: MediaPrefix) -> bool:
    layers = range(one.spec.num_layers)
    return all(torch.equal(a, b) for i in layers for a, b in zip(one.extent.rows(i), other.extent.rows(i), strict=True))


def assert_same_metadata(one: PrefixMetadata, other: PrefixMetadata) -> None:
    for field in fields(PrefixMetadata):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


class StoreSink:
    """A prefix sink over a prefix store. `gate` holds allocations up while it is clear; `refusal` is raised by them."""

    def __init__(self, num_slots: int = 6000, spec: KVSpec = SPEC):
        self.store = PrefixStore(Arena(spec, num_slots))
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.refusal: Exception | None = None
        self.num_cancelled = 0

    def allocate(self, manifest: Manifest, deadline_s: float) -> Extent:
        assert self.gate.wait(20)
        if self.refusal is not None:
            raise self.refusal
        with self.lock:
            return self.store.reserve(manifest.metadata.length)

    def publish(self, manifest: Manifest, extent: Extent) -> None:
        with self.lock:
            self.store.publish(manifest.prefix(extent))

    def cancel(self, extent: Extent) -> None:
        with self.lock:
            self.num_cancelled += 1
            # What is cancelled may be somebody else's in a moment: a late write would show there.
            for tensor in extent.arena.k + extent.arena.v:
                tensor[extent.start : extent.stop] = 7.0
            self.store.cancel(extent)

    @property
    def used_bytes(self) -> int:
        with self.lock:
            return self.store.arena.used_bytes


class DictObjectStore:
    """An object store between threads. `broken` makes every call fail, as after the death of the other worker."""

    def __init__(self) -> None:
        self.receivers: dict[str, KVReceiver] = {}
        self.broken = False
        self.num_stored = 0

    def put(self, array: np.ndarray) -> list[np.ndarray]:
        self._check()
        self.num_stored += 1
        return [array.copy()]

    def get(self, token: list[np.ndarray], within_s: float) -> np.ndarray:
        self._check()
        return token[0]

    def exchange(self, address: ReceiverAddress, lane_id: str, messages: list[Any], wait_s: float) -> list[Any]:
        self._check()
        return self.receivers[address.worker].exchange(lane_id, messages, wait_s)

    def _check(self) -> None:
        if self.broken:
            raise LaneLost("the object store is gone")


class Pair:
    """One receiver, one sender. Deadlines are short, so that tests of silence are."""

    def __init__(
        self, kind: str, object_store: DictObjectStore | None = None, spec: KVSpec = SPEC, num_slots: int = 6000, **fields: Any
    ):
        object_store = object_store or (DictObjectStore() if kind == "objectstore" else None)
        short = {"beat_s": 0.1, "silence_s": 3.0, "op_timeout_s": 5.0, "dial_timeout_s": 5.0, "lease_s": 5.0}
        self.config = TransportConfig(kind=kind, **{**short, **fields})
        self.prefix_sink = StoreSink(num_slots)
        self.tally = Tally()
        self.object_store = object_store
        self.receiver = KVReceiver("decode-0", self.prefix_sink, SPEC, self.config, object_store=object_store, sink=self.tally)
        self.sender = KVSender("prefill-0", self.config, object_store=object_store, sink=self.tally)
        if object_store is not None:
            object_store.receivers["decode-0"] = self.receiver
        self._num = 0

    def ticket(self, key: str, deadline_s: float = 10.0, expected: bool = True) -> TransferTicket:
        self._num += 1
        transfer_id = f"transfer-{self._num}"
        if expected:
            self.receiver.expect(transfer_id, key, 5.0)
        return TransferTicket(transfer_id, self.receiver.address, deadline_s)

    def begin(self, prefix: MediaPrefix, bounds: Sequence[int] | None = None, **ticket: Any) -> OutgoingTransfer:
        return self.sender.begin(prefix, bounds or (0, prefix.length), self.ticket(prefix.key, **ticket))

    def send(self, prefix: MediaPrefix, bounds: Sequence[int] | None = None, **ticket: Any) -> TransferReport:
        transfer = self.begin(prefix, bounds, **ticket)
        transfer.wrote_all()
        return transfer.finish(10.0)

    def resident(self, key: str) -> MediaPrefix | None:
        with self.prefix_sink.lock:
            return self.prefix_sink.store.get(key)

    def settle(self, used_bytes: int = 0) -> None:
        """Wait until nothing is under way, then check that every byte has an owner."""
        until(lambda: self.receiver.info()["bytes_in_flight"] == 0 and self.prefix_sink.used_bytes == used_bytes, "bytes come back")
        until(lambda: not any(lane["transfers"] for lane in self.receiver.info()["lanes"]), "no transfer is left on a lane")
        until(lambda: not any(lane["transfers"] for lane in self.sender.info()["lanes"]), "the sender is idle")
        with self.prefix_sink.lock:
            self.prefix_sink.store.check_integrity()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def until(truth: Callable[[], bool], what: str, within_s: float = 8.0) -> float:
    """Seconds until it holds."""
    start_s = time.monotonic()
    while not truth():
        assert time.monotonic() - start_s < within_s, f"never: {what}"
        time.sleep(0.005)
    return time.monotonic() - start_s


def other_model(spec: KVSpec = SPEC) -> KVSpec:
    return replace(spec, fingerprint="model-b")
