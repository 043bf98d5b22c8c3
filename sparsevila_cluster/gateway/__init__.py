"""Doors: how clients of one protocol reach a `Pipeline`."""

from sparsevila_cluster.gateway.grpc.grpc_server import GrpcServer

__all__ = ["GrpcServer"]
