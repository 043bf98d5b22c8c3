"""The table of kinds: how each listens and how each dials.

Knows: which kind serves which device. Does not know: lanes. Kinds that need torch.distributed are imported when first used.
"""

from __future__ import annotations

import torch

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import BadConfig, LaneLost
from sparsevila_cluster.transport.backends.inproc import InprocListener, dial_inproc
from sparsevila_cluster.transport.backends.objectstore import dial_objectstore
from sparsevila_cluster.transport.link import Accept, Link, Listener, ObjectStore, ReceiverAddress


def resolve(kind: str, device: torch.device, courier: ObjectStore | None) -> str:
    """The kind that a dock serves first. Raises BadConfig when it cannot."""
    from sparsevila_cluster.transport.backends.nccl import nccl_is_here

    if kind == "auto":
        return "nccl" if device.type == "cuda" and nccl_is_here() else "gloo"
    if kind == "nccl" and not (device.type == "cuda" and nccl_is_here()):
        raise BadConfig(f"transport nccl needs KV on a GPU and a torch with NCCL; this worker has {device}")
    if kind == "objectstore" and courier is None:
        raise BadConfig("transport objectstore needs an object store; outside a cluster there is none")
    return kind


def listen(kind: str, token: str, config: TransportConfig, device: torch.device, accept: Accept) -> Listener | None:
    """A listener that hands links to `accept`; None where links come through `Dock.exchange`."""
    if kind == "objectstore":
        return None
    if kind == "inproc":
        return InprocListener(token, accept)
    from sparsevila_cluster.transport.backends.gloo import GlooListener

    return GlooListener(token, config, device, accept)


def dial(
    kind: str, address: ReceiverAddress, lane_id: str, config: TransportConfig, device: torch.device, courier: ObjectStore | None
) -> Link:
    """A new link to a dock. Raises LaneLost. Blocks for up to config.dial_timeout_s."""
    if kind == "inproc":
        return dial_inproc(address, config.dial_timeout_s)
    if kind == "objectstore":
        if courier is None:
            raise LaneLost("no object store")
        return dial_objectstore(address, lane_id, courier, config)
    from sparsevila_cluster.transport.backends.gloo import dial_gloo

    return dial_gloo(kind, address, config, device)


def kind_towards(address: ReceiverAddress, device: torch.device) -> str:
    """How a sender whose KV is on `device` reaches a dock: a dock of GPUs takes gloo as well."""
    from sparsevila_cluster.transport.backends.nccl import nccl_is_here

    if address.kind == "nccl" and not (device.type == "cuda" and nccl_is_here()):
        return "gloo"
    return address.kind
