"""KV between workers: a dock receives, a shipper sends, over links of several kinds."""

from sparsevila_cluster.docks import DockAddress, Ticket
from sparsevila_cluster.transport.dock import Dock
from sparsevila_cluster.transport.link import Courier, Landing, TransferReport, TransferState
from sparsevila_cluster.transport.shipment import Shipment
from sparsevila_cluster.transport.shipper import Shipper

__all__ = ["Courier", "Dock", "DockAddress", "Landing", "Shipment", "Shipper", "Ticket", "TransferReport", "TransferState"]
