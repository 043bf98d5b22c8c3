"""KV between workers: a receiver and a sender for media prefixes, over links of several kinds."""

from sparsevila_cluster.core.addresses import ReceiverAddress, TransferTicket
from sparsevila_cluster.transport.incoming_transfer import TransferState
from sparsevila_cluster.transport.kv_receiver import KVReceiver
from sparsevila_cluster.transport.kv_sender import KVSender
from sparsevila_cluster.transport.link import ObjectStore
from sparsevila_cluster.transport.outgoing_transfer import OutgoingTransfer, TransferReport
from sparsevila_cluster.transport.receive_lane import PrefixSink
from sparsevila_cluster.transport.transports import TRANSPORTS, check_transport

__all__ = [
    "TRANSPORTS",
    "KVReceiver",
    "KVSender",
    "ObjectStore",
    "OutgoingTransfer",
    "PrefixSink",
    "ReceiverAddress",
    "TransferReport",
    "TransferState",
    "TransferTicket",
    "check_transport",
]
