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
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgpack
import torch.distributed as dist

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost, SparseVilaError
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)
HEAD = struct.Struct("<I")
MAX_BYTES = 64 * 1024
MAX_ITEMS = 16  # of a list or a map in a frame
MAX_KEYS = 64  # of a group
BACKLOG = 128
MAX_GREETED = 64  # connections that have not shown the token, or whose group is being built
PIECE_BYTES = 2**20  # memory that is taken before more of a message has come
RETRY_S = 0.05


class PairStore(dist.Store):
    """The store of a group of two while it is built: what one side sets, the other one gets. `connection` belongs to the caller."""

    def __init__(self, connection: socket.socket, until_s: float):
        """until_s: on the monotonic clock, when waiting for the other side ends."""
        super().__init__()
        self.connection, self._until_s = connection, until_s
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
        """Until the other side has set all `keys`. Raises LaneLost, also for what is no key and its value."""
        with self._lock:
            while not all(key in self._values for key in keys):
                match receive_frame(self.connection, self._until_s):
                    case [str(key), bytes(value)] if len(self._values) < MAX_KEYS:
                        self._values[key] = value
                    case _:
                        raise LaneLost("received a frame that is no key of a group")

    def check(self, keys: list[str]) -> bool:
        """Whether all of them are set."""
        return all(key in self._values for key in keys)


class MessageSocket:
    """Messages over a socket that is used for nothing else any more. Owns it. See `Link` for who may call what.

    Beside a group's bulk, not within it: there a message waits for megabytes to pass, and for the lock that is held meanwhile.
    """

    def __init__(self, connection: socket.socket, within_s: float):
        """Raises LaneLost: it is closed already, or there are too many open files."""
        self._out = self._in = connection
        self._lock = threading.Lock()
        self.closed = False
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(within_s)
            self._in = connection.dup()  # with deadlines of its own
        except OSError as error:
            raise LaneLost(f"the connection is of no use: {error}") from error

    @property
    def can_send(self) -> bool:
        """See `Link`."""
        poll = select.poll()
        poll.register(self._out, select.POLLOUT)
        return bool(poll.poll(0))

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
        (num,) = HEAD.unpack(_receive(self._in, HEAD.size, time.monotonic() + within_s))
        if num > MAX_MESSAGE_BYTES:
            raise LaneLost(f"received a message of {num} bytes; the limit is {MAX_MESSAGE_BYTES}")
        return _receive(self._in, num, time.monotonic() + within_s)

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
        self._greeting = threading.BoundedSemaphore(MAX_GREETED)
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
            connection = None
            try:
                connection, _ = self._socket.accept()
                if not self._greeting.acquire(blocking=False):
                    raise LaneLost(f"{MAX_GREETED} connections are being greeted already")
                self._start_greeting(connection)
            except Exception as error:  # no more files or threads, or a peer that left: the next one may be luckier
                if connection is not None:
                    connection.close()
                if not self._closed:
                    log.warning("took no connection: %s", error)
                    time.sleep(RETRY_S)

    def _start_greeting(self, connection: socket.socket) -> None:
        try:
            threading.Thread(target=self._greet, args=(connection,), name="lane-accept", daemon=True).start()
        except BaseException:
            self._greeting.release()
            raise

    def _greet(self, connection: socket.socket) -> None:
        until_s = time.monotonic() + self._within_s
        try:
            connection.settimeout(self._within_s)
            hello = receive_frame(connection, until_s)
            if not isinstance(hello, dict) or not isinstance(hello.get("token"), str):
                raise LaneLost("the peer shows no token")
            known = hmac.compare_digest(hello["token"].encode(), self._token.encode())
            send_frame(connection, known)
            if not known:
                raise LaneLost("the peer does not know the token")
            self._accept(hello, PairStore(connection, until_s))
        except SparseVilaError as error:
            connection.close()
            log.warning("refused a connection: %s", error)
        except Exception:
            connection.close()
            log.exception("greeting a connection failed")
        finally:
            self._greeting.release()


def connect(address: ReceiverAddress, within_s: float, **hello: Any) -> tuple[PairStore, str]:
    """The store towards a receiver, and this side's own address on the way there. Raises LaneLost."""
    worker, host, port = address.worker, address.host, address.port
    try:
        connection = socket.create_connection((host, port), within_s)
    except OSError as error:
        raise LaneLost(f"the receiver of {worker} does not answer at {host}:{port}: {error}", worker) from error
    until_s = time.monotonic() + within_s
    try:
        send_frame(connection, {"token": address.token, **hello})
        if receive_frame(connection, until_s) is not True:
            raise LaneLost(f"{host}:{port} does not know the token of {worker}: another receiver listens there", worker)
    except LaneLost:
        connection.close()
        raise
    return PairStore(connection, until_s), connection.getsockname()[0]


def send_frame(connection: socket.socket, content: Any) -> None:
    """Send one msgpack value. Raises LaneLost."""
    packed = msgpack.packb(content)
    try:
        connection.sendall(HEAD.pack(len(packed)) + packed)
    except OSError as error:
        raise LaneLost(f"cannot send to the peer: {error}") from error


def receive_frame(connection: socket.socket, until_s: float) -> Any:
    """One msgpack value. Raises LaneLost: closed, not here by `until_s` on the monotonic clock, too large, or no msgpack."""
    (num,) = HEAD.unpack(_receive(connection, HEAD.size, until_s))
    if num > MAX_BYTES:
        raise LaneLost(f"received a frame of {num} bytes; the limit is {MAX_BYTES}")
    packed = _receive(connection, num, until_s)
    try:
        return msgpack.unpackb(packed, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
    except (ValueError, MemoryError) as error:
        raise LaneLost(f"received a frame that is no msgpack: {str(error)[:100]}") from error


def _receive(connection: socket.socket, num: int, until_s: float) -> bytes:
    """`num` bytes, whole by `until_s`: a peer that sends them one by one gets no more time. Raises LaneLost."""
    data = bytearray()
    begun_s = time.monotonic()
    while len(data) < num:
        left_s = until_s - time.monotonic()
        try:
            if left_s <= 0 and data:
                raise TimeoutError
            connection.settimeout(max(0.001, left_s))
            came = connection.recv(min(num - len(data), PIECE_BYTES))
        except TimeoutError as error:
            text = f"{len(data)} of {num} bytes" if data else "nothing"
            raise LaneLost(f"{text} came within {max(0.0, until_s - begun_s):.3g} s") from error
        except OSError as error:
            raise LaneLost(f"connection lost: {error}") from error
        if not came:
            raise LaneLost("the peer closed the connection")
        data += came
    return bytes(data)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
