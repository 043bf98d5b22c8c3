"""The sending side of a worker: one route per dock and kind, and what happens when a lane breaks.

Knows: the ladder (a new lane of the same kind, then the object store, then an error), metrics. Does not know: chunks or messages.
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
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport import transports
from sparsevila_cluster.transport.link import ObjectStore
from sparsevila_cluster.transport.manifest import Manifest
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer
from sparsevila_cluster.transport.send_lane import SendRoute

log = logging.getLogger(__name__)
BREAKS_OF_A_KIND = 2  # lanes of one kind that may break under a shipment before another kind is tried


class KVSender:
    """Sends media prefixes to docks. Owns a route, with a thread and a lane, for every dock that it sends to.

    Every public method may be called from any thread; `begin` does not wait.
    """

    def __init__(
        self,
        worker: str,
        spec: KVSpec,
        config: TransportConfig,
        *,
        device: torch.device | str = "cpu",
        courier: ObjectStore | None = None,
        sink: MetricsSink | None = None,
    ):
        self._worker, self._spec, self._config, self._courier, self._sink = worker, spec, config, courier, sink
        self._device = torch.device(device)
        self._lock = threading.Lock()
        self._routes: dict[tuple[ReceiverAddress, str], SendRoute] = {}
        self._num_lanes = 0
        self._closed = False

    def begin(self, prefix: MediaPrefix, bounds: Sequence[int], ticket: TransferTicket) -> OutgoingTransfer:
        """Offer a prefix whose rows become final between `bounds` [0, ..., length], one piece after the other.

        Chunks leave as `OutgoingTransfer.wrote` tells of them. Raises Unavailable once the shipper is closed.
        """
        manifest = Manifest.of(prefix, ticket.transfer_id, bounds, self._config)
        route = self._route(ticket.receiver, transports.kind_towards(ticket.receiver, self._device))
        shipment = OutgoingTransfer(prefix, manifest, ticket, route.wake)
        route.submit(shipment)
        return shipment

    def warm(self, address: ReceiverAddress, deadline_s: float) -> None:
        """Build a lane ahead. Raises LaneLost, DeadlineExceeded, Unavailable."""
        route = self._route(address, transports.kind_towards(address, self._device))
        if not route.warm().wait(deadline_s):
            raise DeadlineExceeded(f"no lane to {address.worker} within {deadline_s:g} s")
        if not route.stands:
            raise LaneLost(f"no lane to {address.worker}")

    def forget(self, address: ReceiverAddress) -> None:
        """This dock is gone: close the routes to it. What is under way fails."""
        with self._lock:
            gone = [self._routes.pop(key) for key in list(self._routes) if key[0] == address]
        for route in gone:
            route.close()

    def info(self) -> dict[str, Any]:
        """Routes and what is under way on them. Plain data."""
        with self._lock:
            routes = list(self._routes.values())
        return {"lanes": [route.info() for route in routes]}

    def close(self) -> None:
        """Fail what is under way, close every lane. Idempotent."""
        with self._lock:
            self._closed = True
            routes, self._routes = list(self._routes.values()), {}
        for route in routes:
            route.close()

    def _route(self, address: ReceiverAddress, kind: str) -> SendRoute:
        with self._lock:
            if self._closed:
                raise Unavailable(f"the shipper of {self._worker} is closed")
            route = self._routes.get((address, kind))
            idle = None
            if route is None:
                if len(self._routes) >= self._config.max_lanes:
                    idle = self._pop_idle()
                dial = partial(self._dial, address, kind)
                route = self._routes[address, kind] = SendRoute(self._worker, address, kind, self._config, dial, self)
        if idle is not None:
            idle.close()
        return route

    def _pop_idle(self) -> SendRoute | None:
        idle = [(one.used_s, key) for key, one in self._routes.items() if one.idle]
        return self._routes.pop(min(idle, key=lambda pair: pair[0])[1]) if idle else None

    def _dial(self, address: ReceiverAddress, kind: str, lane_id: str):
        return transports.dial(kind, address, lane_id, self._config, self._device, self._courier)

    # ---- Told ------------------------------------------------------------------------------------------------------------------

    def broken(self, route: SendRoute, shipment: OutgoingTransfer, error: SparseVilaError) -> None:
        if not isinstance(error, Unavailable):
            return self.ended(shipment, error)
        shipment.num_breaks += 1
        self._count("kv_lane_rebuild_total")
        facts = {"transfer": shipment.transfer_id, "dock": route.address.worker}
        if shipment.num_breaks < BREAKS_OF_A_KIND:
            log.info("sending again over a new lane", extra=facts)
            return route.submit(shipment)
        if self._config.fallback and self._courier is not None and route.kind != "objectstore":
            log.info("sending again through the object store", extra=facts)
            try:
                return self._route(route.address, "objectstore").submit(shipment)
            except Unavailable as closed:
                error = closed
        self.ended(shipment, LaneLost(f"no lane to {route.address.worker} held: {error}"))

    def refused(self, shipment: OutgoingTransfer, error: SparseVilaError) -> bool:
        if isinstance(error, DataLoss) and not shipment.num_damaged:
            shipment.num_damaged += 1
            return True
        self.ended(shipment, error)
        return False

    def acked(self, shipment: OutgoingTransfer, num_bytes: int, transfer_s: float, kind: str, epoch: int) -> None:
        if shipment.succeed(num_bytes, transfer_s, kind, epoch):
            self._count("kv_transfers_total", outcome="acked")
            if self._sink is not None:
                self._sink.observe("kv_transfer_seconds", transfer_s, transport=kind)

    def ended(self, shipment: OutgoingTransfer, error: SparseVilaError) -> None:
        if shipment.fail(error):
            facts = {"transfer": shipment.transfer_id, "dock": shipment.ticket.receiver.worker}
            log.info("transfer failed: %s", error, extra=facts)
            self._count("kv_transfers_total", outcome="failed")

    def sent(self, num_bytes: int, kind: str) -> None:
        self._count("kv_transfer_bytes_total", num_bytes, direction="out", transport=kind)

    def lanes(self, change: int) -> None:
        with self._lock:
            self._num_lanes += change
        if self._sink is not None:
            self._sink.set("lanes", self._num_lanes, direction="out")

    def expired(self) -> None:
        self._count("kv_lease_expired_total")

    def _count(self, name: str, value: float = 1.0, **labels: str) -> None:
        if self._sink is not None:
            self._sink.count(name, value, **labels)
