"""Links through an object store: bulk is put there and fetched by token, messages travel in calls to the receiver.

It needs no port of its own, which is why it is the fallback of every other kind.

    sender   send thread      exchange(messages, 0)        ->   receiver   inbox, tokens
             receive thread   exchange([], beat_s)         <-              outbox
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import Accept, Endpoint, ObjectStore

MAX_CLOSED = 64  # lanes whose last replies are kept for a sender that may still ask


class ObjectStoreLink:
    """One end. Whoever holds it moves what `take` gives to the other end's `deliver`."""

    kind = "objectstore"
    straight = False
    can_send = True

    def __init__(self, object_store: ObjectStore):
        self._object_store = object_store
        self._changed = threading.Condition()
        self._copying = threading.Lock()
        self._inbox: deque[bytes] = deque()
        self._tokens: deque[Any] = deque()
        self._outbox: list[tuple[str, Any]] = []
        self.why_closed = ""

    def device_for(self, device: torch.device) -> torch.device:
        """See `Link`."""
        return torch.device("cpu")

    def send(self, message: bytes) -> None:
        """See `Link`."""
        self._post(("message", message))

    def receive(self, within_s: float) -> bytes:
        """See `Link`."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self.why_closed, within_s)
            if self._inbox:
                return self._inbox.popleft()
        self.end(f"nothing was received for {within_s:g} s")
        raise LaneLost(self.why_closed)

    def send_bulk(self, parts: Sequence[Tensor]) -> _StoredBulk:
        """See `Link`."""
        tokens = [self._ask(self._object_store.put, part.numpy()) for part in parts]
        for token in tokens:
            self._post(("bulk", token))
        return _StoredBulk(tokens)

    def receive_bulk(self, parts: Sequence[Tensor]) -> _FetchedBulk:
        """See `Link`."""
        return _FetchedBulk(self, parts)

    def fetch(self, parts: Sequence[Tensor], within_s: float) -> None:
        """Copy the next bulk tensors into `parts`."""
        for part in parts:
            with self._changed:
                self._changed.wait_for(lambda: self._tokens or self.why_closed, within_s)
                token = None if self.why_closed or not self._tokens else self._tokens.popleft()
            if token is None:
                self.end(f"no bulk within {within_s:g} s")
                raise LaneLost(self.why_closed)
            came = self._ask(self._object_store.get, token, within_s)
            if came.dtype != np.uint8 or came.shape != tuple(part.shape):
                self.end(f"received bulk of {came.nbytes} bytes, expected {part.numel()}")
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
        """What the other end's `take` gave."""
        with self._changed:
            for what, load in messages:
                (self._inbox if what == "message" else self._tokens).append(load)
            self._changed.notify_all()

    def close(self) -> None:
        """See `Link`."""
        self.end("the link is closed")

    def end(self, why: str) -> None:
        """Close this end; every call raises LaneLost(why) from here on. Idempotent: the first reason stays."""
        with self._copying, self._changed:
            self.why_closed = self.why_closed or why
            self._tokens.clear()
            self._changed.notify_all()

    def _ask(self, call: Callable[..., Any], *given: Any) -> Any:
        """Call the object store; whatever error it raises ends the link."""
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


class _StoredBulk:
    """Bulk on its way, as the sender sees it: keeps the objects until they have arrived."""

    def __init__(self, tokens: list[Any]):
        self._tokens = tokens

    def wait(self, within_s: float, num: int | None = None) -> None:
        self._tokens.clear()


class _FetchedBulk:
    """Bulk on its way, as the receiver sees it: it fetches when it waits."""

    def __init__(self, link: ObjectStoreLink, parts: Sequence[Tensor]):
        self._link, self._parts = link, parts
        self._fetched = False

    def wait(self, within_s: float, num: int | None = None) -> None:
        if not self._fetched:
            self._link.fetch(self._parts, within_s)
            self._fetched = True


class ObjectStoreLanes:
    """The receiver's ends of all such lanes, by lane id."""

    def __init__(self, object_store: ObjectStore, accept: Accept):
        self._object_store, self._accept = object_store, accept
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
                end = new = self._ends[lane_id] = ObjectStoreLink(self._object_store)
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


def lacks_for_objectstore(endpoint: Endpoint) -> str:
    """See `Transport.lacks`."""
    return "" if endpoint.object_store is not None else "an object store; outside a cluster there is none"


def listen_objectstore(token: str, endpoint: Endpoint, accept: Accept) -> None:
    """Links come through `KVReceiver.exchange`."""


def dial_objectstore(address: ReceiverAddress, lane_id: str, endpoint: Endpoint) -> ObjectStoreLink:
    """A link whose two threads call the receiver until it is closed. Raises LaneLost: there is no object store."""
    store, beat_s = endpoint.object_store, endpoint.config.beat_s
    if store is None:
        raise LaneLost("no object store", address.worker)
    link = ObjectStoreLink(store)

    def send() -> None:
        first = True
        while True:
            messages = link.take(beat_s)
            if messages:
                store.exchange(address, lane_id, messages, 0.0)
                if first:
                    first = False
                    _start(lambda: _until_lost(link, receive), f"objectstore-receive-{address.worker}")

    def receive() -> None:
        while not link.why_closed:
            link.deliver(store.exchange(address, lane_id, [], beat_s))

    _start(lambda: _until_lost(link, send), f"objectstore-send-{address.worker}")
    return link


def _until_lost(link: ObjectStoreLink, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # whatever a call to another process raises
        link.end(f"{type(error).__name__}: {error}")


def _start(work: Callable[[], None], name: str) -> None:
    threading.Thread(target=work, name=name, daemon=True).start()
