"""A link with scripted faults: what a network, a bug or a hostile peer does to messages and bulk, at a chosen operation.

Fault("drop", "send", at=3)    the fourth message towards the receiver never leaves
Fault("flip", "send_bulk", at=0)    one bit of the first bulk changes on its way
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport import TRANSPORTS

# What can happen to a message (send: to the receiver, receive: from it) and to bulk (send_bulk).
OF_MESSAGES = ("drop", "duplicate", "reorder", "truncate", "flip", "delay", "break")
OF_BULK = ("flip", "garbage", "delay", "break")


@dataclass(frozen=True)
class Fault:
    what: str
    op: str
    at: int
    delay_s: float = 0.3


@dataclass
class Script:
    """Faults by the number of an operation, counted over all links, or on each link anew."""

    faults: list[Fault]
    every_link: bool = False
    spared: str = ""  # a kind whose links are sound
    counts: Counter = field(default_factory=Counter)
    num_links: int = 0
    num_done: int = 0
    kinds: list[str] = field(default_factory=list)

    def due(self, op: str) -> Fault | None:
        number = self.counts[op]
        self.counts[op] += 1
        found = next((one for one in self.faults if one.op == op and one.at == number), None)
        self.num_done += found is not None
        return found

    def install(self, monkeypatch: Any) -> Script:
        """Every link dialed from here on has these faults."""
        for kind, transport in list(TRANSPORTS.items()):
            monkeypatch.setitem(TRANSPORTS, kind, replace(transport, dial=partial(self._dial, kind, transport.dial)))
        return self

    def _dial(self, kind: str, dial: Any, *given: Any) -> Any:
        self.num_links += 1
        self.kinds.append(kind)
        if self.every_link:
            self.counts.clear()
        link = dial(*given)
        return link if kind == self.spared else FaultyLink(link, self)


class FaultyLink:
    """The dialer's end of a link, with a script in between."""

    def __init__(self, link: Any, script: Script, seed: int = 0):
        self._link, self._script = link, script
        self._dice = random.Random(seed)
        self._held: dict[str, list[bytes]] = {"send": [], "receive": []}
        self.kind, self.straight, self.can_send = link.kind, link.straight, True

    def device_for(self, device: torch.device) -> torch.device:
        return self._link.device_for(device)

    def send(self, message: bytes) -> None:
        for one in self._through("send", message):
            self._link.send(one)

    def receive(self, within_s: float) -> bytes:
        while True:
            if self._held["receive"]:
                return self._held["receive"].pop(0)
            came = self._through("receive", self._link.receive(within_s))
            if came:
                self._held["receive"].extend(came[1:])
                return came[0]

    def send_bulk(self, parts: Any) -> Any:
        fault = self._script.due("send_bulk")
        if fault is None:
            return self._link.send_bulk(parts)
        if fault.what == "delay":
            time.sleep(fault.delay_s)
        elif fault.what == "break":
            self._link.close()
            raise LaneLost("scripted")
        else:
            parts = [part.clone() for part in parts]
            if fault.what == "flip":
                parts[-1][self._dice.randrange(parts[-1].numel())] ^= 4
            else:
                parts[0].random_(0, 256)
        return self._link.send_bulk(parts)

    def receive_bulk(self, parts: Any) -> Any:
        return self._link.receive_bulk(parts)

    def close(self) -> None:
        self._link.close()

    def _through(self, op: str, message: bytes) -> list[bytes]:
        fault = self._script.due(op)
        what = fault.what if fault else ""
        if what == "reorder":  # it comes behind the next one
            self._late = (op, message)
            return []
        if fault and what == "delay":
            time.sleep(fault.delay_s)
        if what == "break":
            self._link.close()
            raise LaneLost("scripted")
        if what == "truncate":
            message = message[: len(message) // 2]
        if what == "flip":
            broken = bytearray(message)
            broken[self._dice.randrange(len(broken))] ^= 1 << self._dice.randrange(8)
            message = bytes(broken)
        out = [message] * {"drop": 0, "duplicate": 2}.get(what, 1)
        late = getattr(self, "_late", None)
        if late is not None and late[0] == op and out:
            del self._late
            out.append(late[1])
        return out
