"""The receiving side of a worker: who may send what, over which lanes, and what became of it."""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import Incompatible, LaneLost, NotFound, PermissionDenied, QueueFull, Unavailable
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.transport.backends.objectstore import ObjectStoreLanes
from sparsevila_cluster.transport.incoming_transfer import TransferState
from sparsevila_cluster.transport.link import Endpoint, Link, ObjectStore
from sparsevila_cluster.transport.manifest import VERSION
from sparsevila_cluster.transport.receive_lane import PrefixSink, ReceiveLane
from sparsevila_cluster.transport.transports import TRANSPORTS, kind_of_receiver

log = logging.getLogger(__name__)
MAX_REMEMBERED = 4096  # transfers that are over


@dataclass(eq=False)
class _Reservation:
    key: str
    lease_s: float
    until_s: float
    state: TransferState = TransferState.RESERVED
    lane: ReceiveLane | None = None
    attempt: int = 0


class KVReceiver:
    """Receives media prefixes into extents of its `PrefixSink`. Owns a listener, a monitor thread and the lanes.

    A transfer is expected before it may come; what nobody expects is refused with NotFound. Every public method may be called from
    any thread, and none but `close` and `exchange` waits. config.host "auto" listens on loopback.
    """

    def __init__(
        self,
        worker: str,
        prefix_sink: PrefixSink,
        spec: KVSpec,
        config: TransportConfig,
        *,
        device: torch.device | str = "cpu",
        object_store: ObjectStore | None = None,
        sink: MetricsSink | None = None,
    ):
        """worker: whose receiver this is; spec, device: of its KV; sink: of metrics. Raises BadConfig: see `kind_of_receiver`."""
        self._worker, self._prefix_sink, self._spec, self._config, self._sink = worker, prefix_sink, spec, config, sink
        self._lock = threading.Lock()
        self._transfers: OrderedDict[str, _Reservation] = OrderedDict()
        self._lanes: list[ReceiveLane] = []
        self._ending: list[ReceiveLane] = []  # closed, but with threads that may not have noticed
        self._num_bytes = 0
        self._closed = threading.Event()
        self._token = secrets.token_hex(16)
        endpoint = Endpoint(config, torch.device(device), object_store)
        kind = kind_of_receiver(endpoint)
        # Whatever its kind, a receiver takes lanes through the object store as well: its senders fall back to them.
        self._store_lanes = None if object_store is None else ObjectStoreLanes(object_store, self._accept)
        self._listener = TRANSPORTS[kind].listen(self._token, endpoint, self._accept)
        host, port = ("", 0) if self._listener is None else (self._listener.host, self._listener.port)
        self.address = ReceiverAddress(worker, kind, host, port, self._token)
        self._monitor = threading.Thread(target=self._watch, name=f"kv-receiver-{worker}", daemon=True)
        self._monitor.start()

    # ---- what the worker asks for ----------------------------------------------------------------------------------------------

    def expect(self, transfer_id: str, key: str, lease_s: float) -> None:
        """Let a transfer of this prefix begin within `lease_s`. Raises Unavailable once the receiver is closed."""
        if self._closed.is_set():
            raise Unavailable(f"the KV receiver of {self._worker} is closed")
        with self._lock:
            assert transfer_id not in self._transfers, f"transfer {transfer_id} was expected before"
            self._transfers[transfer_id] = _Reservation(key, lease_s, time.monotonic() + lease_s)
            self._forget_the_oldest()

    def forget(self, transfer_id: str) -> None:
        """Nobody waits for this transfer any more: refuse it, or end it. Idempotent; unknown transfers are no error."""
        with self._lock:
            one = self._transfers.get(transfer_id)
            lane = None if one is None else one.lane
            if one is not None and lane is None and not one.state.terminal:
                one.state = TransferState.ABORTED
        if lane is not None:
            lane.drop(transfer_id, f"transfer {transfer_id} is not wanted any more")

    def state(self, transfer_id: str) -> TransferState:
        """How far it is. Raises NotFound when it was never expected, or so long ago that it is forgotten."""
        with self._lock:
            one = self._transfers.get(transfer_id)
            if one is None:
                raise NotFound(f"no transfer {transfer_id!r} is known to {self._worker}")
            return one.state

    def check(self) -> None:
        """Raises Unavailable: it is closed, or its monitor thread has ended."""
        if self._closed.is_set() or not self._monitor.is_alive():
            raise Unavailable(f"the KV receiver of {self._worker} is closed")

    def info(self) -> dict[str, Any]:
        """Lanes, transfers by state, KV bytes that have arrived, and those of extents that are being filled. Plain data."""
        with self._lock:
            lanes, num_bytes = list(self._lanes), self._num_bytes
            states = Counter(one.state.value for one in self._transfers.values())
        in_flight = sum(lane.bytes_in_flight for lane in lanes)
        facts = {"transfers": dict(states), "bytes_received": num_bytes, "bytes_in_flight": in_flight}
        return {"kind": self.address.kind, "lanes": [lane.info() for lane in lanes], **facts}

    def exchange(self, lane_id: str, messages: list[tuple[str, Any]], wait_s: float) -> list[tuple[str, Any]]:
        """The receiving end of `ObjectStore.exchange`: take messages of a lane, wait up to `wait_s` for replies. Blocks.

        Raises LaneLost: this lane is closed, or the receiver takes none of this kind.
        """
        if self._store_lanes is None or self._closed.is_set():
            raise LaneLost(f"{self._worker} takes no objectstore lanes", self._worker)
        return self._store_lanes.exchange(lane_id, messages, wait_s)

    def close(self) -> None:
        """End every lane; extents that are not published are cancelled. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._listener is not None:
            self._listener.close()
        lanes = self._all_lanes()
        for lane in lanes:
            lane.fail(Unavailable(f"{self._worker} is closing"), quiet=True)
        for lane in [*lanes, *self._ending]:
            lane.join(self._config.op_timeout_s)
        self._monitor.join(self._config.op_timeout_s)

    # ---- lanes -----------------------------------------------------------------------------------------------------------------

    def _accept(self, link: Link) -> None:
        lane = ReceiveLane(link, self, self._prefix_sink, self._spec, self._config)
        with self._lock:
            self._lanes.append(lane)
        if self._closed.is_set():
            return lane.fail(Unavailable(f"{self._worker} is closing"), quiet=True)
        try:
            lane.start()
        except RuntimeError as error:  # no more threads
            return lane.fail(Unavailable(f"{self._worker} takes no lane: {error}"))
        self._count_lanes()

    def _all_lanes(self) -> list[ReceiveLane]:
        with self._lock:
            return list(self._lanes)

    def _count_lanes(self) -> None:
        if self._sink is not None:
            self._sink.set("lanes", len(self._lanes), direction="in")

    def _watch(self) -> None:
        while not self._closed.wait(self._config.beat_s):
            for lane in self._all_lanes():
                lane.beat()
            now_s = time.monotonic()
            with self._lock:
                for one in self._transfers.values():
                    if one.lane is None and one.state is TransferState.RESERVED and now_s > one.until_s:
                        one.state = TransferState.EXPIRED
                        if self._sink is not None:
                            self._sink.count("kv_lease_expired_total")

    def _forget_the_oldest(self) -> None:
        over = [key for key, one in self._transfers.items() if one.state.terminal]
        for transfer_id in over[: max(0, len(over) - MAX_REMEMBERED)]:
            del self._transfers[transfer_id]

    # ---- TransferRegistry ----------------------------------------------------------------------------------------------------

    def open_lane(self, lane: ReceiveLane, hello: dict[str, Any]) -> None:
        """See `TransferRegistry`."""
        if not hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode()):
            raise PermissionDenied("a lane without the token of this receiver")
        if hello.get("version") != VERSION:
            raise Incompatible(f"a lane of version {hello.get('version')!r}; this worker speaks {VERSION}")
        with self._lock:
            crowded = len(self._lanes) > self._config.max_lanes
            idle = [one for one in self._lanes if one is not lane and one.lane_id and one.idle]
        if crowded and not idle:
            raise QueueFull(f"{self._worker} has {self._config.max_lanes} lanes, none of them idle")
        if crowded:
            min(idle, key=lambda one: one.used_s).fail(QueueFull("an idle lane was closed for another one"), quiet=True)
        lane.lane_id, lane.worker, lane.epoch = str(hello["lane"]), str(hello["worker"]), int(hello["epoch"])
        log.info("lane up", extra={"lane": lane.lane_id, "worker": lane.worker, "epoch": lane.epoch})

    def open_transfer(self, lane: ReceiveLane, transfer_id: str, key: str, attempt: int) -> float | None:
        """See `TransferRegistry`."""
        for _ in range(3):
            with self._lock:
                one = self._transfers.get(transfer_id)
                if one is None or one.key != key:
                    raise NotFound(f"{self._worker} does not expect transfer {transfer_id!r} of this media prefix")
                if one.state is TransferState.ACKED:
                    return None
                if one.state.terminal:
                    raise NotFound(f"transfer {transfer_id} is over: {one.state.value}")
                if attempt < one.attempt:  # it lay unread in a lane that the sender has given up
                    raise LaneLost(f"attempt {attempt} of transfer {transfer_id} came after attempt {one.attempt}", lane.worker)
                one.attempt = attempt
                if one.lane is None or one.lane is lane:
                    one.lane = lane
                    return one.lease_s
                before = one.lane
            if before.worker != lane.worker:
                raise NotFound(f"transfer {transfer_id} is under way from {before.worker}")
            # The sender gave that lane up before this side noticed.
            before.fail(LaneLost(f"transfer {transfer_id} came again over a newer lane", before.worker))
            if one.lane is before:  # it is being published
                before.join(self._config.op_timeout_s)
        raise LaneLost(f"transfer {transfer_id} is still being published", self._worker)

    def state_changed(self, lane: ReceiveLane, transfer_id: str, state: TransferState) -> None:
        """See `TransferRegistry`."""
        with self._lock:
            one = self._transfers.get(transfer_id)
            if one is None or one.lane is not lane or one.state.terminal:
                return
            one.state = state
            if state is TransferState.RESERVED:
                one.until_s = time.monotonic() + one.lease_s
            if state is TransferState.RESERVED or state.terminal:
                one.lane = None
        if state is TransferState.EXPIRED and self._sink is not None:
            self._sink.count("kv_lease_expired_total")

    def received(self, num_bytes: int, kind: str) -> None:
        """See `TransferRegistry`."""
        with self._lock:
            self._num_bytes += num_bytes
        if self._sink is not None:
            self._sink.count("kv_transfer_bytes_total", num_bytes, direction="in", transport=kind)

    def lane_closed(self, lane: ReceiveLane) -> None:
        """See `TransferRegistry`."""
        with self._lock:
            if lane in self._lanes:
                self._lanes.remove(lane)
            self._ending = [*(one for one in self._ending if one.has_threads), lane]
        self._count_lanes()
