"""What links over a group of torch.distributed share: messages over a socket, bulk over a group of two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.handshake import Handshake, MessageSocket, PairStore, connect
from sparsevila_cluster.transport.link import Accept, Endpoint, Link, PendingBulk

# Builds one end over a store of two: rank 0 is the receiver; the last argument is this side's own address.
BuildLink = Callable[[PairStore, int, Endpoint, str], Link]


class GroupLink:
    """One end of a link whose bulk goes through a group of two, of which this end is `rank`."""

    straight = True

    def __init__(self, messages: MessageSocket, group: Any, rank: int):
        self._messages, self._group, self._peer = messages, group, 1 - rank
        self._lock = threading.Lock()
        self._closed = False
        self.send, self.receive = messages.send, messages.receive

    @property
    def closed(self) -> bool:
        """Whether it is of no use any more."""
        return self._closed

    @property
    def can_send(self) -> bool:
        """See `Link`."""
        return self._messages.can_send

    def send_bulk(self, parts: Sequence[Tensor]) -> PendingBulk:
        """See `Link`."""
        return self._post(self._group.send, parts)

    def receive_bulk(self, parts: Sequence[Tensor]) -> PendingBulk:
        """See `Link`."""
        return self._post(self._group.recv, parts)

    def close(self) -> None:
        """See `Link`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._messages.close()
        self._end_bulk()

    def _post(self, op: Any, parts: Sequence[Tensor]) -> PendingBulk:
        if self._closed:
            raise LaneLost("the link is closed")
        try:
            works = [op([part], self._peer, self._tag()) for part in parts]
        except RuntimeError as error:
            raise LaneLost(brief(error)) from error
        return self._pending(works, parts)

    def _pending(self, works: Sequence[Any], parts: Sequence[Tensor]) -> PendingBulk:
        raise NotImplementedError

    def _tag(self) -> int:
        raise NotImplementedError

    def _end_bulk(self) -> None:
        """Return once nothing is read from or written to posted tensors any more."""
        raise NotImplementedError


class GroupListener:
    """Builds a group with everybody who knows the token, and on it a link of the kind that they ask for."""

    def __init__(self, builders: Mapping[str, BuildLink], token: str, endpoint: Endpoint, accept: Accept):
        self._builders, self._endpoint, self._accept = builders, endpoint, accept
        config = endpoint.config
        host = "127.0.0.1" if config.host == "auto" else config.host
        self._handshake = Handshake(host, token, config.dial_timeout_s, self._build)
        self.host, self.port = self._handshake.host, self._handshake.port

    def close(self) -> None:
        """See `Listener`."""
        self._handshake.close()

    def _build(self, hello: dict[str, Any], store: PairStore) -> None:
        build = self._builders.get(str(hello.get("kind")))
        if build is None:
            raise LaneLost(f"a link of another kind than {', '.join(self._builders)}")
        self._accept(build(store, 0, self._endpoint, self.host))


def dial_group(kind: str, build: BuildLink, address: ReceiverAddress, endpoint: Endpoint) -> Link:
    """Raises LaneLost: nobody listens, or the receiver does not come within config.dial_timeout_s."""
    store, here = connect(address, endpoint.config.dial_timeout_s, kind=kind)
    try:
        return build(store, 1, endpoint, here)
    except LaneLost:
        store.connection.close()
        raise


def to_timedelta(seconds: float) -> timedelta:
    """At least a millisecond: torch takes 0 for no deadline at all."""
    return timedelta(milliseconds=max(1, round(seconds * 1000)))


def brief(error: Exception) -> str:
    """What torch says, without where in its sources it says it."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rsplit("] ", 1)[-1].split(". This is typically")[0][:200]
