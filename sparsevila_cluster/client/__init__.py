"""Clients of a server, blocking and for event loops; importing them imports no tensor library."""

from sparsevila_cluster.client.async_client import AsyncChat, AsyncClient
from sparsevila_cluster.client.blocking_client import Chat, Client
from sparsevila_cluster.client.connection import Tls
from sparsevila_cluster.client.media_upload import Upload

__all__ = ["AsyncChat", "AsyncClient", "Chat", "Client", "Tls", "Upload"]
