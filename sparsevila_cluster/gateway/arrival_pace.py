"""Calls of one owner that come all at once begin one after the other, so that calls of others begin between them.

What a call costs before it waits for something takes a router about a millisecond, in small pieces. A thousand that begin at once
take a second of every processor that they reach, and each round of the event loop gets as long as a piece of all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparsevila_cluster.core.fair_sharing import RecentOwners
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.gateway.owner_shares import MAX_OWNERS, TokenBucket

# Calls of one owner that begin at once, and how much later than at once others begin at most: other limits refuse what comes then.
BURST, MAX_WAIT_S = 20.0, 30.0


class ArrivalPace:
    """Used within one event loop."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic):
        """per_s: calls of one owner that begin in each second beyond the first few, while others have calls here."""
        self._per_s, self._clock = per_s, clock
        self._buckets: LRUDict[TokenBucket] = LRUDict(MAX_OWNERS)
        self._owners = RecentOwners(clock)

    @contextmanager
    def call(self, owner: str) -> Iterator[None]:
        """A call of this owner lasts as long as the block."""
        with self._owners.active(owner):
            yield

    async def turn(self, owner: str) -> None:
        """Return when a call of this owner may begin, in the order in which they came: at once where nobody else has any."""
        bucket = self._buckets.use(owner)
        if bucket is None:
            bucket = TokenBucket(self._per_s, BURST, self._clock)
            self._buckets.put(owner, bucket)
        wait_s = bucket.wait_s(1.0)
        if wait_s >= MAX_WAIT_S or not self._owners.has_others(owner):
            return
        bucket.take(1.0)
        if wait_s > 0:
            try:
                await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                bucket.take(-1.0)  # who is taken back takes nobody's turn
                raise
