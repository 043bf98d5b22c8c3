"""KV between workers: a dock receives, a shipper sends, over links of several kinds."""

from sparsevila_cluster.core.addresses import ReceiverAddress, TransferTicket
from sparsevila_cluster.transport.kv_receiver import KVReceiver
from sparsevila_cluster.transport.kv_sender import KVSender
from sparsevila_cluster.transport.link import ObjectStore, PrefixSink, TransferReport, TransferState
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer

__all__ = [
    "ObjectStore",
    "KVReceiver",
    "ReceiverAddress",
    "PrefixSink",
    "OutgoingTransfer",
    "KVSender",
    "TransferTicket",
    "TransferReport",
    "TransferState",
]
