"""`sparsevila_cluster.app:build`: the application for `serve run` and Serve files."""

from sparsevila_cluster.serve.application import build as build
