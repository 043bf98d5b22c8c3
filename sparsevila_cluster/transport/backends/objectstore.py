"""Links through an object store: bulk is put there and fetched by token, messages ride on calls to the dock.

Knows: how messages queue between calls. Does not know: whose object store it is; a `ObjectStore` is handed in. It needs no port of its
own, which is why it is the fallback of every other kind.

    dialer   speaker thread   exchange(messages, 0)        ->   dock   inbox, parcels
             listener thread  exchange([], beat_s)         <-          outbox
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import Accept, ObjectStore, ReceiverAddress

MAX_CLOSED = 64  # lanes whose last replies are kept for a dialer that may still ask


class ObjectStoreLink:
    """One end. Whoever holds it moves what `take` gives to the other end's `deliver`."""

    kind = "objectstore"
    straight = False

    def __init__(self, courier: ObjectStore):
        self._courier = courier
        self._changed = threading.Condition()
        self._copying = threading.Lock()
        self._inbox: deque[bytes] = deque()
        self._parcels: deque[Any] = deque()
        self._outbox: list[tuple[str, Any]] = []
        self.why_closed = ""

    def device_for(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def send(self, message: bytes) -> None:
        self._post(("message", message))

    def receive(self, within_s: float) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self.why_closed, within_s)
            if self._inbox:
                return self._inbox.popleft()
        self.end(f"silence of {within_s:g} s")
        raise LaneLost(self.why_closed)

    def ship(self, parts: Sequence[Tensor]) -> _Stored:
        tokens = [self._ask(self._courier.put, part.numpy()) for part in parts]
        for token in tokens:
            self._post(("bulk", token))
        return _Stored(tokens)

    def land(self, parts: Sequence[Tensor]) -> _Fetch:
        return _Fetch(self, parts)

    def fetch(self, parts: Sequence[Tensor], within_s: float) -> None:
        """Copy the next bulk tensors into `parts`."""
        for part in parts:
            with self._changed:
                self._changed.wait_for(lambda: self._parcels or self.why_closed, within_s)
                token = None if self.why_closed or not self._parcels else self._parcels.popleft()
            if token is None:
                self.end(f"no bulk within {within_s:g} s")
                raise LaneLost(self.why_closed)
            came = self._ask(self._courier.get, token, within_s)
            if came.dtype != np.uint8 or came.shape != tuple(part.shape):
                self.end(f"bulk of {came.nbytes} bytes came where {part.numel()} were due")
                raise LaneLost(self.why_closed)
            with self._copying:
                if self.why_closed:
                    raise LaneLost(self.why_closed)
                np.copyto(part.numpy(), came)  # what the store gives may be read-only, which torch does not take

    def take(self, wait_s: float) -> list[tuple[str, Any]]:
        """What waits to go out, once there is something. Raises LaneLost when there is nothing and never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self.why_closed, wait_s)
            taken, self._outbox = self._outbox, []
            if not taken and self.why_closed:
                raise LaneLost(self.why_closed)
            return taken

    def deliver(self, messages: Sequence[tuple[str, Any]]) -> None:
        with self._changed:
            for what, load in messages:
                (self._inbox if what == "message" else self._parcels).append(load)
            self._changed.notify_all()

    def close(self) -> None:
        self.end("the link is closed")

    def end(self, why: str) -> None:
        with self._copying, self._changed:
            self.why_closed = self.why_closed or why
            self._parcels.clear()
            self._changed.notify_all()

    def _ask(self, call: Callable[..., Any], *given: Any) -> Any:
        """Whatever the object store ends with, the link ends with."""
        try:
            return call(*given)
        except Exception as error:
            self.end(f"{type(error).__name__}: {error}")
            raise LaneLost(self.why_closed) from error

    def _post(self, item: tuple[str, Any]) -> None:
        with self._changed:
            if self.why_closed:
                raise LaneLost(self.why_closed)
            self._outbox.append(item)
            self._changed.notify_all()


class _Stored:
    """The sender's handle: keeps the objects until they have landed."""

    def __init__(self, tokens: list[Any]):
        self._tokens = tokens

    def wait(self, within_s: float, num: int | None = None) -> None:
        self._tokens.clear()


class _Fetch:
    def __init__(self, link: ObjectStoreLink, parts: Sequence[Tensor]):
        self._link, self._parts = link, parts
        self._fetched = False

    def wait(self, within_s: float, num: int | None = None) -> None:
        if not self._fetched:
            self._link.fetch(self._parts, within_s)
            self._fetched = True


class ObjectStoreReceiver:
    """The dock's ends of all such lanes, by lane id."""

    def __init__(self, courier: ObjectStore, accept: Accept):
        self._courier, self._accept = courier, accept
        self._lock = threading.Lock()
        self._ends: OrderedDict[str, ObjectStoreLink] = OrderedDict()

    def exchange(self, lane_id: str, messages: list[tuple[str, Any]], wait_s: float) -> list[tuple[str, Any]]:
        """Deliver, then wait up to `wait_s` > 0 for replies; with 0, take none. Raises LaneLost for a lane that is over."""
        new = None
        with self._lock:
            end = self._ends.get(lane_id)
            if end is None:
                if not messages:
                    raise LaneLost(f"no lane {lane_id}")
                closed = [key for key, one in self._ends.items() if one.why_closed]
                for key in closed[: max(0, len(closed) - MAX_CLOSED)]:
                    del self._ends[key]
                end = new = self._ends[lane_id] = ObjectStoreLink(self._courier)
        end.deliver(messages)
        if new is not None:
            self._accept(new)
        if wait_s <= 0:
            return []
        try:
            return end.take(wait_s)
        except LaneLost:
            with self._lock:
                self._ends.pop(lane_id, None)
            raise


def dial_objectstore(address: ReceiverAddress, lane_id: str, courier: ObjectStore, config: TransportConfig) -> ObjectStoreLink:
    """A link whose two threads call the dock until it is closed."""
    link = ObjectStoreLink(courier)

    def speak() -> None:
        first = True
        while True:
            messages = link.take(config.beat_s)
            if messages:
                courier.exchange(address, lane_id, messages, 0.0)
                if first:
                    first = False
                    _start(lambda: _until_lost(link, listen), f"listen-{address.worker}")

    def listen() -> None:
        while not link.why_closed:
            link.deliver(courier.exchange(address, lane_id, [], config.beat_s))

    _start(lambda: _until_lost(link, speak), f"speak-{address.worker}")
    return link


def _until_lost(link: ObjectStoreLink, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # whatever a call to another process ends with
        link.end(f"{type(error).__name__}: {error}")


def _start(work: Callable[[], None], name: str) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()
