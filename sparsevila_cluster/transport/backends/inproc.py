"""Links between threads of one process: a copy from one arena to the other. Receivers are found by their token."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import Accept, Endpoint

_LISTENERS: dict[str, InprocListener] = {}


@dataclass(eq=False)
class _Shared:
    """What both ends share."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    copying: threading.Lock = field(default_factory=threading.Lock)
    messages: tuple[deque[bytes], deque[bytes]] = field(default_factory=lambda: (deque(), deque()))
    bulk: deque[_SentBulk] = field(default_factory=deque)
    closed: str = ""


@dataclass(eq=False)
class _SentBulk:
    """Bulk tensors on their way, as the sender sees them."""

    shared: _Shared
    parts: list[Tensor]
    taken: bool = False

    def wait(self, within_s: float, num: int | None = None) -> None:
        shared = self.shared
        with shared.changed:
            shared.changed.wait_for(lambda: self.taken or shared.closed, within_s)
        if not self.taken:
            _give_up(shared, f"bulk was not taken within {within_s:g} s")


@dataclass(eq=False)
class _ReceivedBulk:
    """Bulk tensors on their way, as the receiver sees them: it copies when it waits."""

    shared: _Shared
    parts: list[Tensor]
    done: bool = False

    def wait(self, within_s: float, num: int | None = None) -> None:
        if not self.done:
            self._take(within_s)
            self.done = True

    def _take(self, within_s: float) -> None:
        shared = self.shared
        with shared.changed:
            shared.changed.wait_for(lambda: shared.bulk or shared.closed, within_s)
            if shared.closed or not shared.bulk:
                sent = None
            else:
                sent = shared.bulk.popleft()
        if sent is None:
            _give_up(shared, f"no bulk within {within_s:g} s")
            return
        with shared.copying:
            came, expected = [t.numel() for t in sent.parts], [t.numel() for t in self.parts]
            if came == expected and not shared.closed:
                for source, target in zip(sent.parts, self.parts, strict=True):
                    target.copy_(source)
        if came != expected:
            _give_up(shared, f"received bulk of {came} bytes, expected {expected}")
        with shared.changed:
            sent.taken = True
            shared.changed.notify_all()


class InprocLink:
    """One end. side 0: the sender, 1: the receiver."""

    kind = "inproc"
    straight = True
    can_send = True

    def __init__(self, shared: _Shared, side: int):
        self._shared = shared
        self._outbox, self._inbox = shared.messages[side], shared.messages[1 - side]

    def device_for(self, device: torch.device) -> torch.device:
        """See `Link`."""
        return device

    def send(self, message: bytes) -> None:
        """See `Link`."""
        shared = self._shared
        with shared.changed:
            if shared.closed:
                raise LaneLost(shared.closed)
            self._outbox.append(message)
            shared.changed.notify_all()

    def receive(self, within_s: float) -> bytes:
        """See `Link`."""
        shared = self._shared
        with shared.changed:
            shared.changed.wait_for(lambda: self._inbox or shared.closed, within_s)
            if self._inbox:
                return self._inbox.popleft()
        _give_up(shared, f"nothing was received for {within_s:g} s")
        raise LaneLost(shared.closed)

    def send_bulk(self, parts: Sequence[Tensor]) -> _SentBulk:
        """See `Link`."""
        shared = self._shared
        sent = _SentBulk(shared, list(parts))
        with shared.changed:
            if shared.closed:
                raise LaneLost(shared.closed)
            shared.bulk.append(sent)
            shared.changed.notify_all()
        return sent

    def receive_bulk(self, parts: Sequence[Tensor]) -> _ReceivedBulk:
        """See `Link`."""
        return _ReceivedBulk(self._shared, list(parts))

    def close(self) -> None:
        """See `Link`."""
        _end(self._shared, "the link is closed")


def _end(shared: _Shared, why: str) -> None:
    with shared.copying, shared.changed:
        shared.closed = shared.closed or why
        shared.bulk.clear()
        shared.changed.notify_all()


def _give_up(shared: _Shared, why: str) -> None:
    """A wait that failed ends the link, as it does where a socket is behind it."""
    _end(shared, why)
    raise LaneLost(shared.closed)


class InprocListener:
    """A receiver of this process."""

    host = ""
    port = 0

    def __init__(self, token: str, endpoint: Endpoint, accept: Accept):
        self._token = token
        self.accept = accept
        _LISTENERS[token] = self

    def close(self) -> None:
        """See `Listener`."""
        if _LISTENERS.get(self._token) is self:
            del _LISTENERS[self._token]


def dial_inproc(address: ReceiverAddress, lane_id: str, endpoint: Endpoint) -> InprocLink:
    """Raises LaneLost when no receiver of this process has that token."""
    listener = _LISTENERS.get(address.token)
    if listener is None:
        raise LaneLost(f"no receiver of {address.worker} in this process", address.worker)
    shared = _Shared()
    threading.Thread(target=listener.accept, args=(InprocLink(shared, 1),), name="inproc-accept", daemon=True).start()
    return InprocLink(shared, 0)
