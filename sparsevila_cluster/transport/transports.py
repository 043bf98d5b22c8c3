"""The kinds of links, and which of them a worker uses."""

from __future__ import annotations

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.transport.backends.gloo import dial_gloo, listen_gloo
from sparsevila_cluster.transport.backends.inproc import InprocListener, dial_inproc
from sparsevila_cluster.transport.backends.nccl import dial_nccl, lacks_for_nccl, listen_nccl
from sparsevila_cluster.transport.backends.objectstore import dial_objectstore, lacks_for_objectstore, listen_objectstore
from sparsevila_cluster.transport.link import Endpoint, Transport

# The legal values of `transport.kind`, beside "auto".
TRANSPORTS: dict[str, Transport] = {
    "inproc": Transport(InprocListener, dial_inproc),
    "gloo": Transport(listen_gloo, dial_gloo),
    "nccl": Transport(listen_nccl, dial_nccl, lacks_for_nccl, instead="gloo"),
    "objectstore": Transport(listen_objectstore, dial_objectstore, lacks_for_objectstore),
}
AUTO = ("nccl", "gloo")  # "auto" is the first of these that a worker lacks nothing for


def check_transport(config: TransportConfig) -> None:
    """Raises BadConfig: a kind that is not in the table."""
    *others, last = [repr(kind) for kind in ("auto", *TRANSPORTS)]
    if config.kind != "auto" and config.kind not in TRANSPORTS:
        raise BadConfig(f"transport.kind: input should be {', '.join(others)} or {last}, got {config.kind!r}")


def kind_of_receiver(endpoint: Endpoint) -> str:
    """The kind by which a receiver is reached. Raises BadConfig: unknown, or the worker lacks what it needs."""
    check_transport(endpoint.config)
    kind = endpoint.config.kind
    if kind == "auto":
        return next(one for one in AUTO if not TRANSPORTS[one].lacks(endpoint))
    if lacking := TRANSPORTS[kind].lacks(endpoint):
        raise BadConfig(f"transport {kind} needs {lacking}")
    return kind


def kind_towards(address: ReceiverAddress, endpoint: Endpoint) -> str:
    """The kind by which a sender reaches a receiver."""
    transport = TRANSPORTS[address.kind]
    return transport.instead if transport.instead and transport.lacks(endpoint) else address.kind
