"""Links between threads of one process: a copy from one arena to the other.

Knows: queues and locks. Does not know: processes, or what is sent. Docks of this process are found by their token.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import Accept, ReceiverAddress

_LISTENERS: dict[str, InprocListener] = {}


@dataclass(eq=False)
class _Wire:
    """What both ends share."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    copying: threading.Lock = field(default_factory=threading.Lock)
    messages: tuple[deque[bytes], deque[bytes]] = field(default_factory=lambda: (deque(), deque()))
    parcels: deque[_Parcel] = field(default_factory=deque)
    closed: str = ""


@dataclass(eq=False)
class _Parcel:
    """Bulk tensors on the way; as a handle, those of the sender."""

    wire: _Wire
    parts: list[Tensor]
    taken: bool = False

    def wait(self, within_s: float, num: int | None = None) -> None:
        wire = self.wire
        with wire.changed:
            wire.changed.wait_for(lambda: self.taken or wire.closed, within_s)
        if not self.taken:
            _give_up(wire, f"bulk was not taken within {within_s:g} s")


@dataclass(eq=False)
class _Berth:
    """The handle of the receiver, which copies when it is waited for."""

    wire: _Wire
    parts: list[Tensor]
    landed: bool = False

    def wait(self, within_s: float, num: int | None = None) -> None:
        if not self.landed:
            self._take(within_s)
            self.landed = True

    def _take(self, within_s: float) -> None:
        wire = self.wire
        with wire.changed:
            wire.changed.wait_for(lambda: wire.parcels or wire.closed, within_s)
            if wire.closed or not wire.parcels:
                parcel = None
            else:
                parcel = wire.parcels.popleft()
        if parcel is None:
            _give_up(wire, f"no bulk within {within_s:g} s")
            return
        with wire.copying:
            came, due = [t.numel() for t in parcel.parts], [t.numel() for t in self.parts]
            if came == due and not wire.closed:
                for source, target in zip(parcel.parts, self.parts, strict=True):
                    target.copy_(source)
        if came != due:
            _give_up(wire, f"bulk of {came} bytes came where {due} were due")
        with wire.changed:
            parcel.taken = True
            wire.changed.notify_all()


class InprocLink:
    kind = "inproc"
    straight = True

    def __init__(self, wire: _Wire, side: int):
        self._wire = wire
        self._outbox, self._inbox = wire.messages[side], wire.messages[1 - side]

    def device_for(self, device: torch.device) -> torch.device:
        return device

    def send(self, message: bytes) -> None:
        wire = self._wire
        with wire.changed:
            if wire.closed:
                raise LaneLost(wire.closed)
            self._outbox.append(message)
            wire.changed.notify_all()

    def receive(self, within_s: float) -> bytes:
        wire = self._wire
        with wire.changed:
            wire.changed.wait_for(lambda: self._inbox or wire.closed, within_s)
            if self._inbox:
                return self._inbox.popleft()
        _give_up(wire, f"silence of {within_s:g} s")
        raise LaneLost(wire.closed)

    def ship(self, parts: Sequence[Tensor]) -> _Parcel:
        wire = self._wire
        parcel = _Parcel(wire, list(parts))
        with wire.changed:
            if wire.closed:
                raise LaneLost(wire.closed)
            wire.parcels.append(parcel)
            wire.changed.notify_all()
        return parcel

    def land(self, parts: Sequence[Tensor]) -> _Berth:
        return _Berth(self._wire, list(parts))

    def close(self) -> None:
        _end(self._wire, "the link is closed")


def _end(wire: _Wire, why: str) -> None:
    with wire.copying, wire.changed:
        wire.closed = wire.closed or why
        wire.parcels.clear()
        wire.changed.notify_all()


def _give_up(wire: _Wire, why: str) -> None:
    """A wait that failed ends the link, as it does where a socket is behind it."""
    _end(wire, why)
    raise LaneLost(wire.closed)


class InprocListener:
    """Docks of this process."""

    host = ""
    port = 0

    def __init__(self, token: str, accept: Accept):
        self._token = token
        self.accept = accept
        _LISTENERS[token] = self

    def close(self) -> None:
        if _LISTENERS.get(self._token) is self:
            del _LISTENERS[self._token]


def dial_inproc(address: ReceiverAddress, within_s: float) -> InprocLink:
    """Raises LaneLost when no dock of this process has that token."""
    listener = _LISTENERS.get(address.token)
    if listener is None:
        raise LaneLost(f"no dock of {address.worker} in this process")
    wire = _Wire()
    threading.Thread(target=listener.accept, args=(InprocLink(wire, 1),), name="inproc-accept", daemon=True).start()
    return InprocLink(wire, 0)
