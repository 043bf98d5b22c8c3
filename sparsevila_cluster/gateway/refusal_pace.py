"""Who is refused again and again is told later and later: so it asks less often, and its refusals take less from the others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.gateway.owner_shares import MAX_OWNERS, TokenBucket

# Refusals of one subject that are told at once, how many more in each second, and how much later than at once at most.
BURST, PER_S, MAX_HOLD_S = 50.0, 10.0, 5.0
# Refusals that are held back at one time; what is beyond is told at once.
MAX_HELD = 2_000


class RefusalPace:
    """Used within one event loop. `close` lets go of what is held back."""

    def __init__(self, applies: Callable[[], bool], clock: Callable[[], float] = time.monotonic):
        """applies: whether there is anybody to spare."""
        self._applies, self._clock = applies, clock
        self._buckets: LRUDict[TokenBucket] = LRUDict(MAX_OWNERS)
        self._closed = asyncio.Event()
        self.num_held = 0

    def close(self) -> None:
        """Idempotent."""
        self._closed.set()

    def hold_s(self, subject: str) -> float:
        """Count a refusal of this subject: seconds after which it may be told."""
        bucket = self._buckets.use(subject)
        if bucket is None:
            bucket = TokenBucket(PER_S, BURST, self._clock)
            self._buckets.put(subject, bucket)
        wait_s = bucket.wait_s(1.0)
        if wait_s < MAX_HOLD_S:  # else nobody could ever make good for it
            bucket.take(1.0)
        return min(wait_s, MAX_HOLD_S)

    async def hold(self, subject: str, most_s: float = MAX_HOLD_S) -> None:
        """Wait until a refusal of this subject may be told, at most `most_s`."""
        if not self._applies() or self._closed.is_set() or self.num_held >= MAX_HELD:
            return
        hold_s = min(self.hold_s(subject), most_s)
        if hold_s > 0:
            self.num_held += 1
            try:
                async with asyncio.timeout(hold_s):
                    await self._closed.wait()
            except TimeoutError:
                pass
            finally:
                self.num_held -= 1
