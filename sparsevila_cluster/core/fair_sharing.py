"""Who is served next where several owners want the same: start-time fair queueing (Goyal, Vin and Cheng, 1996), equal weights.

Owners that want more than they get are served the same cost from the moment on that they ask, up to one piece of each. An owner
that did not ask for a while has saved up nothing.
"""

from __future__ import annotations


class FairClock:
    """Virtual time: an owner's start is when, in units of cost, its next piece begins; the least start is served next.

    Not thread-safe. It remembers only owners that are ahead of the others.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._finished: dict[str, float] = {}

    def start(self, owner: str) -> float:
        """The start of this owner's next piece."""
        return max(self._now, self._finished.get(owner, 0.0))

    def charge(self, owner: str, cost: float) -> None:
        """A piece of this owner, the least of all that want one, was served at this cost."""
        start = self.start(owner)
        self._now = max(self._now, start)
        self._finished[owner] = start + cost
        if len(self._finished) > 1:
            self._finished = {name: at for name, at in self._finished.items() if at > self._now}


def owner_bound(owner: str, total: int, max_share: float) -> int:
    """Most of `total` that one owner may have, at least 1. Owner "" is everybody: all of it."""
    return total if not owner else max(1, int(total * max_share))
