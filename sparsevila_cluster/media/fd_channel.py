"""Messages with open files between the sandbox and its decoding processes, over a pair of sockets."""

from __future__ import annotations

import os
import socket
import struct
import time
from typing import Any

import msgpack

LENGTH = struct.Struct("<I")
MAX_MESSAGE_BYTES = 64 << 20
LONGEST_WAIT_S = 7 * 86400.0  # sockets know no infinity

Message = dict[str, Any]


def send(sock: socket.socket, message: Message, fd: int | None = None) -> None:
    """Raises OSError: nobody listens any more."""
    body = msgpack.packb(message)
    data = LENGTH.pack(len(body)) + body
    if fd is None:
        sock.sendall(data)
    else:
        sock.sendall(data[socket.send_fds(sock, [data], [fd]) :])


def receive(sock: socket.socket, timeout_s: float | None = None) -> tuple[Message, int | None]:
    """The next message, and its descriptor, which is now the caller's to close.

    Raises:
        TimeoutError: not whole within `timeout_s`. EOFError: the other side is gone. ValueError: no message of ours.
    """
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    _wait_until(sock, until_s)
    head, fds, _, _ = socket.recv_fds(sock, LENGTH.size, 1, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    fd = fds[0] if fds else None
    try:
        head += _exactly(sock, LENGTH.size - len(head), until_s) if head else b""
        if not head:
            raise EOFError("the other side closed the channel")
        (size,) = LENGTH.unpack(head)
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {size} bytes")
        message = msgpack.unpackb(_exactly(sock, size, until_s))
        if not isinstance(message, dict):
            raise ValueError(f"a message that is a {type(message).__name__}")
        return message, fd
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise


def _exactly(sock: socket.socket, num_bytes: int, until_s: float | None) -> bytes:
    data = bytearray()
    while len(data) < num_bytes:
        _wait_until(sock, until_s)
        block = sock.recv(min(num_bytes - len(data), 1 << 20))
        if not block:
            raise EOFError("the other side went away in mid-message")
        data += block
    return bytes(data)


def _wait_until(sock: socket.socket, until_s: float | None) -> None:
    sock.settimeout(None if until_s is None else min(max(until_s - time.monotonic(), 1e-3), LONGEST_WAIT_S))
