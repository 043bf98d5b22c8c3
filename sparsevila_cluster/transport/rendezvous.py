"""How two processes that want a group of two find each other: one socket, a token, and a store over that socket.

Knows: who may come in, and the few keys that a process group exchanges. Does not know: groups.

torch's own TCPStore is not used: it asks the resolver for the name of every peer, which stalls for seconds where there is none, it
lets anybody who reaches its port read and write, and its client tries for its whole deadline where nobody listens.
"""

from __future__ import annotations

import hmac
import logging
import socket
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgpack
import torch.distributed as dist

from sparsevila_cluster.errors import LaneLost
from sparsevila_cluster.transport.link import DockAddress

log = logging.getLogger(__name__)
HEAD = struct.Struct("<I")
MAX_BYTES = 64 * 1024
BACKLOG = 128


class PairStore(dist.Store):
    """The store of a group of two: what one side sets, the other one gets. Owns the socket, until `close`."""

    def __init__(self, connection: socket.socket):
        super().__init__()
        self._connection = connection
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: Any) -> None:
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = value
        send_frame(self._connection, [key, value])

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout_s: timedelta | None = None) -> None:
        """Until the other side has set all `keys`; its deadline is that of the socket."""
        with self._lock:
            while not all(key in self._values for key in keys):
                key, value = receive_frame(self._connection)
                self._values[str(key)] = bytes(value)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def close(self) -> None:
        self._connection.close()


class Door:
    """Listens on a free port of `host`. Hands the store of everybody who knows the token to `welcome`, each in its own thread."""

    def __init__(self, host: str, token: str, within_s: float, welcome: Callable[[dict[str, Any], PairStore], None]):
        self._token, self._within_s, self._welcome = token, within_s, welcome
        self._socket = socket.create_server((host, 0), family=_family(host), backlog=BACKLOG)
        self.host, self.port = self._socket.getsockname()[:2]
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="lane-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        except OSError:
            pass
        self._thread.join(self._within_s)
        self._socket.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._meet, args=(connection,), name="lane-accept", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(self._within_s)
            hello = receive_frame(connection)
            known = hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode())
            send_frame(connection, known)
            if not known:
                raise LaneLost("a visitor without the token")
            self._welcome(hello, PairStore(connection))
        except Exception as error:  # whatever a stranger sends
            connection.close()
            log.warning("no lane was built: %s", error)


def knock(address: DockAddress, within_s: float, **hello: Any) -> tuple[PairStore, str]:
    """The store towards a dock, and this side's own address on the way there. Raises LaneLost."""
    try:
        connection = socket.create_connection((address.host, address.port), within_s)
    except OSError as error:
        raise LaneLost(f"the dock of {address.worker} does not answer: {error}") from error
    try:
        send_frame(connection, {"token": address.token, **hello})
        if receive_frame(connection) is not True:
            raise LaneLost(f"another dock than that of {address.worker} listens on {address.host}:{address.port}")
    except LaneLost:
        connection.close()
        raise
    return PairStore(connection), connection.getsockname()[0]


def send_frame(connection: socket.socket, content: Any) -> None:
    packed = msgpack.packb(content)
    try:
        connection.sendall(HEAD.pack(len(packed)) + packed)
    except OSError as error:
        raise LaneLost(f"the way to the other side: {error}") from error


def receive_frame(connection: socket.socket) -> Any:
    """Raises LaneLost: closed, too slow, too large, or no msgpack."""
    (num,) = HEAD.unpack(_receive(connection, HEAD.size))
    if num > MAX_BYTES:
        raise LaneLost(f"a frame of {num} bytes; the limit is {MAX_BYTES}")
    try:
        return msgpack.unpackb(_receive(connection, num))
    except ValueError as error:
        raise LaneLost(f"a frame that is no msgpack: {error}") from error


def _receive(connection: socket.socket, num: int) -> bytes:
    data = b""
    while len(data) < num:
        try:
            piece = connection.recv(num - len(data))
        except OSError as error:
            raise LaneLost(f"the way to the other side: {error}") from error
        if not piece:
            raise LaneLost("the other side closed the way")
        data += piece
    return data


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
