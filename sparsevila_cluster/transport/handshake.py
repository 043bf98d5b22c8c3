"""One socket between two processes: the token, the keys that a group of two is built with, then messages.

    sender                                  receiver
    token, kind of link           ->        accepted, or closed
    keys of the group             <->       keys of the group          until it is built
    messages                      <->       messages                   until either side closes

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

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)
HEAD = struct.Struct("<I")
MAX_BYTES = 64 * 1024
BACKLOG = 128


class PairStore(dist.Store):
    """The store of a group of two while it is built: what one side sets, the other one gets. `connection` belongs to the caller."""

    def __init__(self, connection: socket.socket):
        super().__init__()
        self.connection = connection
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: Any) -> None:
        """Send it to the other side. Raises LaneLost."""
        value = value.encode() if isinstance(value, str) else bytes(value)
        self._values[key] = value
        send_frame(self.connection, [key, value])

    def get(self, key: str) -> bytes:
        """What either side has set. Raises LaneLost."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout_s: timedelta | None = None) -> None:
        """Until the other side has set all `keys`, within the socket's own timeout. Raises LaneLost."""
        with self._lock:
            while not all(key in self._values for key in keys):
                key, value = receive_frame(self.connection)
                self._values[str(key)] = bytes(value)

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are set."""
        return all(key in self._values for key in keys)


class MessageSocket:
    """Messages over a socket that is used for nothing else any more. Owns it. See `Link` for who may call what.

    Beside a group's bulk, not within it: there a message waits for megabytes to pass, and for the lock that is held meanwhile.
    """

    def __init__(self, connection: socket.socket, within_s: float):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(within_s)
        self._out = connection
        self._in = connection.dup()  # with deadlines of its own
        self._lock = threading.Lock()
        self.closed = False

    def send(self, message: bytes) -> None:
        """See `Link`."""
        assert len(message) <= MAX_MESSAGE_BYTES, len(message)
        with self._lock:
            if self.closed:
                raise LaneLost("the link is closed")
            try:
                self._out.sendall(HEAD.pack(len(message)) + message)
            except OSError as error:
                self.close()  # half a message may have left: nothing can follow it
                raise LaneLost(f"cannot send to the peer: {error}") from error

    def receive(self, within_s: float) -> bytes:
        """See `Link`."""
        if self.closed:
            raise LaneLost("the link is closed")
        self._in.settimeout(max(0.001, within_s))
        (num,) = HEAD.unpack(_receive(self._in, HEAD.size))
        if num > MAX_MESSAGE_BYTES:
            raise LaneLost(f"received a message of {num} bytes; the limit is {MAX_MESSAGE_BYTES}")
        return _receive(self._in, num)

    def close(self) -> None:
        """End both directions. Idempotent."""
        self.closed = True
        try:
            self._out.shutdown(socket.SHUT_RDWR)  # of both ends; wakes whoever waits
        except OSError:
            pass

    def __del__(self) -> None:
        # Not in `close`: a reader that has not woken yet would go on with a number that is another socket's by then.
        self._out.close()
        self._in.close()


class Handshake:
    """Listens on a free port of `host`. Hands the store of every peer that knows the token to `accept`, each in its own thread."""

    def __init__(self, host: str, token: str, within_s: float, accept: Callable[[dict[str, Any], PairStore], None]):
        self._token, self._within_s, self._accept = token, within_s, accept
        self._socket = socket.create_server((host, 0), family=_family(host), backlog=BACKLOG)
        self.host, self.port = self._socket.getsockname()[:2]
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="lane-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more connections. Idempotent."""
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
            threading.Thread(target=self._greet, args=(connection,), name="lane-accept", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(self._within_s)
            hello = receive_frame(connection)
            known = hmac.compare_digest(str(hello.get("token")).encode(), self._token.encode())
            send_frame(connection, known)
            if not known:
                raise LaneLost("the peer does not know the token")
            self._accept(hello, PairStore(connection))
        except Exception as error:  # whatever an unknown peer sends
            connection.close()
            log.warning("refused a connection: %s", error)


def connect(address: ReceiverAddress, within_s: float, **hello: Any) -> tuple[PairStore, str]:
    """The store towards a receiver, and this side's own address on the way there. Raises LaneLost."""
    worker, host, port = address.worker, address.host, address.port
    try:
        connection = socket.create_connection((host, port), within_s)
    except OSError as error:
        raise LaneLost(f"the receiver of {worker} does not answer at {host}:{port}: {error}", worker) from error
    try:
        send_frame(connection, {"token": address.token, **hello})
        if receive_frame(connection) is not True:
            raise LaneLost(f"{host}:{port} does not know the token of {worker}: another receiver listens there", worker)
    except LaneLost:
        connection.close()
        raise
    return PairStore(connection), connection.getsockname()[0]


def send_frame(connection: socket.socket, content: Any) -> None:
    """Send one msgpack value. Raises LaneLost."""
    packed = msgpack.packb(content)
    try:
        connection.sendall(HEAD.pack(len(packed)) + packed)
    except OSError as error:
        raise LaneLost(f"cannot send to the peer: {error}") from error


def receive_frame(connection: socket.socket) -> Any:
    """One msgpack value. Raises LaneLost: closed, too slow, too large, or no msgpack."""
    (num,) = HEAD.unpack(_receive(connection, HEAD.size))
    if num > MAX_BYTES:
        raise LaneLost(f"received a frame of {num} bytes; the limit is {MAX_BYTES}")
    try:
        return msgpack.unpackb(_receive(connection, num))
    except ValueError as error:
        raise LaneLost(f"received a frame that is no msgpack: {error}") from error


def _receive(connection: socket.socket, num: int) -> bytes:
    data = bytearray(num)
    view, got = memoryview(data), 0
    while got < num:
        try:
            came = connection.recv_into(view[got:])
        except TimeoutError as error:
            raise LaneLost(f"nothing was received for {connection.gettimeout() or 0.0:g} s") from error
        except OSError as error:
            raise LaneLost(f"connection lost: {error}") from error
        if not came:
            raise LaneLost("the peer closed the connection")
        got += came
    return bytes(data)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
