"""Keeps a replica's port on the loopback interface when its node is there.

Serve listens on every interface, whatever the address of the node, and unpickles what it receives. On a node of one machine's own
cluster nobody else is to reach it.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import ray
from ray.serve._private import replica


def node_address() -> str:
    """The address of this process's node as Ray was told it. `ray.util` would answer with that of the route to the internet."""
    here = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if node["NodeID"] == here)


def stay_on_loopback() -> bool:
    """To be called while a replica is constructed, before Serve binds its port. False on a node with another address."""
    host = node_address()
    if not ipaddress.ip_address(host).is_loopback:
        return False
    bind = replica.add_port_to_grpc_server

    def bind_on_loopback(server: Any, address: str) -> int:
        port: int = bind(server, f"{host}:{address.rpartition(':')[2]}")
        return port

    replica.add_port_to_grpc_server = bind_on_loopback
    return True
