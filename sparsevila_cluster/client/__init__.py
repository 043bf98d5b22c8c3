"""Clients of a server, blocking and for event loops; importing them imports no tensor library."""

from sparsevila_cluster.client.async_client import AsyncClient
from sparsevila_cluster.client.blocking_client import Client
from sparsevila_cluster.client.connection import Tls
from sparsevila_cluster.client.media_upload import Upload
from sparsevila_cluster.core.conversation import AsyncChat, Chat

__all__ = ["AsyncChat", "AsyncClient", "Chat", "Client", "Tls", "Upload"]
