"""The sending side of a worker: one lane per receiver and kind, and what happens when a connection breaks.

The first break of a transfer leads to a new connection of the same kind, the second to the object store, the next to an error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from sparsevila_cluster.core.addresses import ReceiverAddress, TransferTicket
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import DataLoss, DeadlineExceeded, LaneLost, SparseVilaError, Unavailable
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport.link import Endpoint, Link, ObjectStore
from sparsevila_cluster.transport.manifest import Manifest
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer
from sparsevila_cluster.transport.send_lane import SendLane
from sparsevila_cluster.transport.transports import TRANSPORTS, check_transport, kind_towards

log = logging.getLogger(__name__)
BREAKS_OF_A_KIND = 2  # connections of one kind that may break under a transfer before another kind is tried


class KVSender:
    """Sends media prefixes to receivers. Owns a lane for every receiver that it sends to.

    Every public method may be called from any thread; `begin` does not wait.
    """

    def __init__(
        self,
        worker: str,
        config: TransportConfig,
        *,
        device: torch.device | str = "cpu",
        object_store: ObjectStore | None = None,
        sink: MetricsSink | None = None,
    ):
        """worker: whose sender this is; device: of its KV; sink: of metrics. Raises BadConfig: see `check_transport`."""
        check_transport(config)
        self._worker, self._config, self._sink = worker, config, sink
        self._endpoint = Endpoint(config, torch.device(device), object_store)
        self._lock = threading.Lock()
        self._lanes: dict[tuple[ReceiverAddress, str], SendLane] = {}
        self._num_connections = 0
        self._closed = False

    def begin(self, prefix: MediaPrefix, bounds: Sequence[int], ticket: TransferTicket) -> OutgoingTransfer:
        """Offer a prefix whose rows become final between `bounds` [0, ..., length], one piece after the other.

        Chunks leave as `OutgoingTransfer.wrote` tells of them. Raises Unavailable once the sender is closed.
        """
        manifest = Manifest.of(prefix, ticket.transfer_id, bounds, self._config)
        lane = self._lane(ticket.receiver, kind_towards(ticket.receiver, self._endpoint))
        transfer = OutgoingTransfer(prefix, manifest, ticket, lane.wake)
        lane.submit(transfer)
        return transfer

    def warm(self, address: ReceiverAddress, deadline_s: float) -> None:
        """Connect a lane ahead. Raises LaneLost, DeadlineExceeded, Unavailable."""
        lane = self._lane(address, kind_towards(address, self._endpoint))
        if not lane.connect().wait(deadline_s):
            raise DeadlineExceeded(f"no lane to {address.worker} within {deadline_s:g} s")
        if not lane.is_up:
            raise LaneLost(f"no lane to {address.worker}", address.worker)

    def forget(self, address: ReceiverAddress) -> None:
        """This receiver is gone: close the lanes to it. What is under way fails."""
        with self._lock:
            gone = [self._lanes.pop(key) for key in list(self._lanes) if key[0] == address]
        for lane in gone:
            lane.close()

    def info(self) -> dict[str, Any]:
        """Lanes and what is under way on them. Plain data."""
        with self._lock:
            lanes = list(self._lanes.values())
        return {"lanes": [lane.info() for lane in lanes]}

    def close(self) -> None:
        """Fail what is under way, close every lane. Idempotent."""
        with self._lock:
            self._closed = True
            lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            lane.close()

    def _lane(self, address: ReceiverAddress, kind: str) -> SendLane:
        with self._lock:
            if self._closed:
                raise Unavailable(f"the KV sender of {self._worker} is closed")
            lane = self._lanes.get((address, kind))
            idle = None
            if lane is None:
                if len(self._lanes) >= self._config.max_lanes:
                    idle = self._pop_idle()
                dial = partial(self._dial, address, kind)
                lane = self._lanes[address, kind] = SendLane(self._worker, address, kind, self._config, dial, self)
        if idle is not None:
            idle.close()
        return lane

    def _pop_idle(self) -> SendLane | None:
        idle = [(one.used_s, key) for key, one in self._lanes.items() if one.idle]
        return self._lanes.pop(min(idle, key=lambda pair: pair[0])[1]) if idle else None

    def _dial(self, address: ReceiverAddress, kind: str, lane_id: str) -> Link:
        return TRANSPORTS[kind].dial(address, lane_id, self._endpoint)

    # ---- SendLaneListener ------------------------------------------------------------------------------------------------------

    def broken(self, lane: SendLane, transfer: OutgoingTransfer, error: SparseVilaError) -> None:
        """See `SendLaneListener`."""
        if not isinstance(error, Unavailable):
            return self.ended(transfer, error)
        transfer.num_breaks += 1
        self._count("kv_lane_rebuild_total")
        worker = lane.address.worker
        facts = {"transfer": transfer.transfer_id, "receiver": worker}
        if transfer.num_breaks < BREAKS_OF_A_KIND:
            log.info("sending again over a new connection", extra=facts)
            return lane.submit(transfer)
        if self._config.fallback and self._endpoint.object_store is not None and lane.kind != "objectstore":
            log.info("sending again through the object store", extra=facts)
            try:
                return self._lane(lane.address, "objectstore").submit(transfer)
            except Unavailable as closed:
                error = closed
        self.ended(transfer, LaneLost(f"lost the lane to {worker}: {error}", worker))

    def refused(self, transfer: OutgoingTransfer, error: SparseVilaError) -> bool:
        """See `SendLaneListener`."""
        if isinstance(error, DataLoss) and not transfer.num_damaged:
            transfer.num_damaged += 1
            return True
        self.ended(transfer, error)
        return False

    def acked(self, transfer: OutgoingTransfer, num_bytes: int, transfer_s: float, kind: str, epoch: int) -> None:
        """See `SendLaneListener`."""
        if transfer.succeed(num_bytes, transfer_s, kind, epoch):
            self._count("kv_transfers_total", outcome="acked")
            if self._sink is not None:
                self._sink.observe("kv_transfer_seconds", transfer_s, transport=kind)

    def ended(self, transfer: OutgoingTransfer, error: SparseVilaError) -> None:
        """See `SendLaneListener`."""
        if transfer.fail(error):
            facts = {"transfer": transfer.transfer_id, "receiver": transfer.ticket.receiver.worker}
            log.info("transfer failed: %s", error, extra=facts)
            self._count("kv_transfers_total", outcome="failed")

    def sent(self, num_bytes: int, kind: str) -> None:
        """See `SendLaneListener`."""
        self._count("kv_transfer_bytes_total", num_bytes, direction="out", transport=kind)

    def connections_changed(self, by: int) -> None:
        """See `SendLaneListener`."""
        with self._lock:
            self._num_connections += by
        if self._sink is not None:
            self._sink.set("lanes", self._num_connections, direction="out")

    def expired(self) -> None:
        """See `SendLaneListener`."""
        self._count("kv_lease_expired_total")

    def _count(self, name: str, value: float = 1.0, **labels: str) -> None:
        if self._sink is not None:
            self._sink.count(name, value, **labels)
