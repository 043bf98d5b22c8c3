"""Who was refused, who ran into a limit, what was deleted: one line each, with fields, in a log of its own.

Fields: event, owner, key (its name), method, peer, what. Events that a client causes for nothing are told MAX_LINES times a window
for each peer or owner, and then how many lines were left out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

NAME = "sparsevila_cluster.audit"
WINDOW_S = 60.0
MAX_LINES = 5
# Peers and owners told apart in a window; what further ones do is only counted.
MAX_SUBJECTS = 100
MAX_WHAT_CHARS = 300


class AuditLog:
    """Used within one event loop. `close` tells what was left out until then."""

    def __init__(self, window_s: float = WINDOW_S):
        self._log = logging.getLogger(NAME)
        self._log.setLevel(logging.INFO)  # whatever others are allowed to say
        self._window_s = window_s
        self._seen: Counter[tuple[str, str]] = Counter()
        self._ending: asyncio.TimerHandle | None = None

    def note(self, event: str, what: str, *, owner: str = "", key: str = "", method: str = "", peer: str = "") -> None:
        """Something that was done."""
        self._write(logging.INFO, event, what, owner, key, method, peer)

    def refusal(self, event: str, what: str, subject: str, *, owner: str = "", key: str = "", method: str, peer: str) -> None:
        """Something that was refused. subject: whose lines are counted."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().call_later(self._window_s, self._end_window)
        counted = (event, subject)
        if counted not in self._seen and len(self._seen) >= MAX_SUBJECTS:
            counted = (event, "others")
            self._seen[counted] += MAX_LINES * (counted not in self._seen)  # none of theirs is told
        self._seen[counted] += 1
        if self._seen[counted] <= MAX_LINES:
            self._write(logging.WARNING, event, what, owner, key, method, peer)

    def close(self) -> None:
        """Idempotent."""
        if self._ending is not None:
            self._ending.cancel()
            self._end_window()

    def _end_window(self) -> None:
        seen, self._seen, self._ending = self._seen, Counter(), None
        for (event, subject), num in seen.items():
            if num > MAX_LINES:
                left_out = num - MAX_LINES
                message = "%s: %d lines about %s were left out in %g s"
                extra = {"event": event, "subject": subject, "left_out": left_out}
                self._log.warning(message, event, left_out, subject, self._window_s, extra=extra)

    def _write(self, level: int, event: str, what: str, owner: str, key: str, method: str, peer: str) -> None:
        what = " ".join(what[:MAX_WHAT_CHARS].split())  # one line, whatever a client has sent
        extra = {"event": event, "owner": owner, "key": key, "method": method, "peer": peer, "what": what}
        self._log.log(level, "%s: %s", event, what, extra=extra)


def host_of(peer: str) -> str:
    """A peer as gRPC writes it ("ipv4:127.0.0.1:50000"), without its port, which is another one with each connection."""
    return peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer
