"""Doors: how clients of one protocol reach a `Pipeline`."""

from sparsevila_cluster.gateway.door import Door

__all__ = ["Door"]
