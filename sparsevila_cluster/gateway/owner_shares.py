"""How much of the server one owner of keys may take, so that there is something left for the others."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import QueueFull
from sparsevila_cluster.core.lru_dict import LRUDict

# Owners whose buckets are remembered.
MAX_OWNERS = 10_000
# Less than this of a token is an error of rounding.
NOTHING = 1e-6


class TokenBucket:
    """`per_s` tokens come in each second, up to `most`. What is taken may be more than what is there: then the next one waits."""

    def __init__(self, per_s: float, most: float, clock: Callable[[], float] = time.monotonic):
        self._per_s, self._most, self._clock = per_s, most, clock
        self._level, self._at_s = most, clock()

    def wait_s(self, num: float) -> float:
        """Seconds until `num` tokens are there, in whole milliseconds, 0 if they are; `num` is at most `most`."""
        now_s = self._clock()
        self._level = min(self._most, self._level + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        missing = num - self._level
        return 0.0 if missing < NOTHING else math.ceil(1000 * missing / self._per_s) / 1000

    def take(self, num: float) -> None:
        """Take them, whether they are there or not."""
        self._level -= num


class OwnerShares:
    """Calls in progress and rates, by owner. Used within one event loop."""

    def __init__(self, config: GatewayConfig, has_several: Callable[[], bool], clock: Callable[[], float] = time.monotonic):
        """has_several: whether there is anybody to leave something for."""
        self._config, self._has_several, self._clock = config, has_several, clock
        self._calls: Counter[str] = Counter()
        self._requests: LRUDict[TokenBucket] = LRUDict(MAX_OWNERS)
        self._visual: LRUDict[TokenBucket] = LRUDict(MAX_OWNERS)

    @property
    def num_calls(self) -> int:
        """Calls in progress, of all owners."""
        return self._calls.total()

    def num_calls_of(self, owner: str) -> int:
        """Calls of one owner in progress."""
        return self._calls[owner]

    def charged(self, owner: str) -> str:
        """Whose share the engines take it from: "", which has none, where there is nobody else."""
        return owner if self._has_several() else ""

    def share_of(self, budget: int) -> int:
        """What one owner may take of a budget of all: at least 1, and all of it where there is nobody else."""
        return max(1, int(budget * self._config.max_share)) if self._has_several() else budget

    @contextmanager
    def call(self, owner: str) -> Iterator[None]:
        """A call of this owner is in progress for the length of the block. Raises QueueFull: one too many."""
        self._check_rate(owner)
        most, share = self._config.max_streams, self.share_of(self._config.max_streams)
        if self.num_calls >= most:
            raise QueueFull(f"{self.num_calls} calls are in progress; the limit is max_streams={most}")
        if self._calls[owner] >= share:
            limit = f"max_share={self._config.max_share:g} of max_streams={most}"
            raise QueueFull(f"{self._calls[owner]} calls of {owner!r} are in progress; the limit is {limit}, which is {share}")
        self._calls[owner] += 1
        try:
            yield
        finally:
            self._calls[owner] -= 1
            if not self._calls[owner]:
                del self._calls[owner]

    def _check_rate(self, owner: str) -> None:
        per_s = self._config.requests_per_s
        if per_s is None:
            return
        bucket = self._bucket(self._requests, owner, per_s, max(1.0, per_s))
        if wait_s := bucket.wait_s(1.0):
            raise QueueFull(f"{owner!r} has made more than requests_per_s={per_s:g} calls", retry_after_s=wait_s)
        bucket.take(1.0)

    def check_visual_tokens(self, owner: str) -> None:
        """To be asked before media are made. Raises QueueFull: those that were made before have used up the rate."""
        per_minute = self._config.visual_tokens_per_minute
        if per_minute is None:
            return
        if wait_s := self._bucket(self._visual, owner, per_minute / 60, per_minute).wait_s(1.0):
            limit = f"visual_tokens_per_minute={per_minute}"
            raise QueueFull(f"media of {owner!r} have taken more than {limit}", retry_after_s=wait_s)

    def count_visual_tokens(self, owner: str, num: int) -> None:
        """Media were made. How large they are is known only now: what is over the rate is waited for by those that come next."""
        per_minute = self._config.visual_tokens_per_minute
        if per_minute is not None:
            self._bucket(self._visual, owner, per_minute / 60, per_minute).take(num)

    def _bucket(self, buckets: LRUDict[TokenBucket], owner: str, per_s: float, most: float) -> TokenBucket:
        bucket = buckets.use(owner)
        if bucket is None:
            bucket = TokenBucket(per_s, most, self._clock)
            buckets.put(owner, bucket)
        return bucket
