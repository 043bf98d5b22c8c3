"""Kinds of links between workers: in process, gloo, NCCL, object store."""
