"""Calls of one owner that come all at once begin one after the other, so that calls of others begin between them.

What a call costs before it waits for something takes a router about a millisecond, in small pieces. A thousand that begin at once
take a second of every processor that they reach, and each round of the event loop gets as long as a piece of all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from sparsevila_cluster.core.config import KIB
from sparsevila_cluster.core.errors import QueueFull
from sparsevila_cluster.core.fair_sharing import RecentOwners
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.gateway.owner_shares import MAX_OWNERS, TokenBucket

# Calls of one owner that begin at once, and how much later than at once others begin at most: what comes then is refused.
BURST, MAX_WAIT_S = 20.0, 30.0
# What a message that nobody should have sent counts for, by its length, and how long at most its owner's next call waits for that.
BYTES_PER_CALL, MAX_OWED_S = 64 * KIB, 5.0


class ArrivalPace:
    """Used within one event loop."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic):
        """per_s: calls of one owner that begin in each second beyond the first few, while others have calls."""
        self._per_s, self._clock = per_s, clock
        self._buckets: LRUDict[TokenBucket] = LRUDict(MAX_OWNERS)
        self._here, self._elsewhere = RecentOwners(clock), RecentOwners(clock)

    @contextmanager
    def call(self, owner: str) -> Iterator[None]:
        """A call of this owner lasts as long as the block."""
        with self._here.active(owner):
            yield

    @property
    def owners(self) -> frozenset[str]:
        """Who has calls here, or had some a moment ago."""
        return self._here.names()

    def note_elsewhere(self, owners: Iterable[str]) -> None:
        """They have calls at other routers, which may share processors with this one."""
        self._elsewhere.note(owners)

    async def turn(self, owner: str) -> None:
        """Return when a call of this owner may begin, in the order in which they came: at once where nobody else has any.

        Raises:
            QueueFull: it could not begin within MAX_WAIT_S.
        """
        if not (self._here.has_others(owner) or self._elsewhere.has_others(owner)):
            return
        bucket = self._bucket(owner)
        wait_s = bucket.wait_s(1.0)
        if wait_s >= MAX_WAIT_S:
            limit = f"of others too, {self._per_s:g} of them begin in a second (paced_calls_per_s)"
            raise QueueFull(f"{owner!r} has more than {wait_s:.0f} s of calls waiting; while there are calls {limit}", wait_s / 2)
        bucket.take(1.0)
        if wait_s > 0:
            try:
                await asyncio.sleep(wait_s)
            except asyncio.CancelledError:
                bucket.take(-1.0)  # who is taken back takes nobody's turn
                raise

    def charge(self, owner: str, num_bytes: int) -> None:
        """A message of this owner was read, and was too long: it counts as further calls."""
        bucket = self._bucket(owner)
        owed = max(0.0, MAX_OWED_S - bucket.wait_s(1.0)) * self._per_s
        bucket.take(min(num_bytes / BYTES_PER_CALL, owed))

    def _bucket(self, owner: str) -> TokenBucket:
        bucket = self._buckets.use(owner)
        if bucket is None:
            bucket = TokenBucket(self._per_s, BURST, self._clock)
            self._buckets.put(owner, bucket)
        return bucket
