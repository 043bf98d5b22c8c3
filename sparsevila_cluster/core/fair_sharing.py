"""Who is served next where several owners want the same: start-time fair queueing (Goyal, Vin and Cheng, 1996), equal weights.

Owners that want more than they get are served the same cost from the moment on that they ask, up to one piece of each. An owner
that did not ask for a while has saved up nothing. Owner "" is everybody: a server without keys has this one, which is one queue.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from sparsevila_cluster.core.errors import QueueFull, SparseVilaError
from sparsevila_cluster.core.lru_dict import LRUDict

# How often somebody who waits in a thread looks whether anybody still waits for it.
CHECK_S = 0.05
# Who holds a lock keeps it this long, whoever waits: a change costs what the caches held.
SLICE_S = 0.01
# What a measured rate of work forgets with every piece.
FORGET = 0.3
MAX_RETRY_S = 300.0
# How long an owner counts as one that others leave something for, and of how many that is known.
RECENT_S = 2.0
MAX_RECENT = 256


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


class FairLock:
    """One holder at a time, from any thread; of those who wait, the one whose owner has held it for the least time is next."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._clock = FairClock()
        self._waiting: dict[int, str] = {}  # number -> owner
        self._next_number = 0
        self._holder: int | None = None  # thread
        self._since_s = 0.0

    def acquire(self, owner: str, check: Callable[[], object]) -> None:
        """Wait for it. check: called now and then; what it raises ends the waiting."""
        with self._changed:
            self._next_number += 1
            number = self._next_number
            self._waiting[number] = owner
            try:
                while self._holder is not None or min(self._waiting, key=self._rank) != number:
                    check()
                    self._changed.wait(CHECK_S)
                self._holder, self._since_s = threading.get_ident(), time.perf_counter()
            finally:
                del self._waiting[number]
                self._changed.notify_all()

    def release(self, owner: str) -> None:
        """Give it to the next. Harmless where a `pause` that was ended has given it away."""
        with self._changed:
            if self._holder != threading.get_ident():
                return
            self._clock.charge(owner, time.perf_counter() - self._since_s)
            self._holder = None
            self._changed.notify_all()

    def pause(self, owner: str, check: Callable[[], object]) -> None:
        """Between two pieces of work of who holds it: whoever should be next has it first. Raises as `acquire`, not holding it."""
        with self._changed:
            now_s = time.perf_counter()
            if not self._waiting or now_s - self._since_s < SLICE_S:
                return
            self._clock.charge(owner, now_s - self._since_s)
            self._since_s = now_s
            if all(self._clock.start(other) >= self._clock.start(owner) for other in self._waiting.values()):
                return
            self._holder = None
            self._changed.notify_all()
        self.acquire(owner, check)

    def _rank(self, number: int) -> tuple[float, int]:
        return self._clock.start(self._waiting[number]), number


class RecentOwners:
    """Owners that have work here, or had some less than RECENT_S ago. Used within one event loop. Owner "" does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._here: Counter[str] = Counter()
        self._until_s: LRUDict[float] = LRUDict(MAX_RECENT)

    @contextmanager
    def active(self, owner: str) -> Iterator[None]:
        """It has work for the length of the block."""
        self._here[owner] += 1
        try:
            yield
        finally:
            self._here[owner] -= 1
            if not self._here[owner]:
                del self._here[owner]
            self.note((owner,))

    def note(self, owners: Iterable[str]) -> None:
        """They have work, here or somewhere else."""
        for owner in owners:
            self._until_s.put(owner, self._clock() + RECENT_S)

    def names(self) -> frozenset[str]:
        """Who they are."""
        now_s = self._clock()
        for owner in [owner for owner, until_s in self._until_s.items() if until_s <= now_s]:
            del self._until_s[owner]
        return frozenset(self._here.keys() | self._until_s.keys()) - {""}

    def has_others(self, owner: str) -> bool:
        """Whether there are others than this one."""
        return bool(self.names() - {owner})


class OwnerPlaces:
    """At most `num_places` of one owner's work at the same time, in one event loop; the rest waits in order. Owner "" has no bound.

    What waits here costs nothing: no message, no place in a queue that others see.
    """

    def __init__(self, num_places: int, num_shared: int | None = None, recent: RecentOwners | None = None):
        """num_shared: places of one owner while others have work, by `recent`; as many as else if None."""
        self.recent = RecentOwners() if recent is None else recent
        self._num_places = num_places
        self._num_shared = num_places if num_shared is None else min(num_shared, num_places)
        self._num_taken: Counter[str] = Counter()
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}

    @property
    def num_waiting(self) -> int:
        """Work of all owners that waits for a place."""
        return sum(map(len, self._queues.values()))

    @asynccontextmanager
    async def place(self, owner: str) -> AsyncGenerator[None, None]:
        """A place for the length of an `async with` block, waited for without end: the caller has a deadline."""
        if not owner:
            yield
            return
        with self.recent.active(owner):
            await self._take(owner)
            try:
                yield
            finally:
                self._give_back(owner)

    async def _take(self, owner: str) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._queues.setdefault(owner, deque()).append(waiter)
        self._grant(owner)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self._give_back(owner)
            elif waiter in self._queues.get(owner, ()):
                self._queues[owner].remove(waiter)
                self._grant(owner)
            raise

    def _give_back(self, owner: str) -> None:
        self._num_taken[owner] -= 1
        if not self._num_taken[owner]:
            del self._num_taken[owner]
        self._grant(owner)

    def _grant(self, owner: str) -> None:
        """Whether others have work is looked at whenever a place is asked for or given back: while somebody waits, there is one."""
        queue = self._queues.get(owner)
        if not queue:
            self._queues.pop(owner, None)
            return
        most = self._num_shared if self.recent.has_others(owner) else self._num_places
        while queue and self._num_taken[owner] < most:
            waiter = queue.popleft()
            if not waiter.done():  # else whoever waited has been cancelled just now
                self._num_taken[owner] += 1
                waiter.set_result(None)
        if not queue:
            del self._queues[owner]


@dataclass(eq=False)
class _Waiter:
    cost: float
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairSlots:
    """Places for work of one event loop, at most one for each owner: its others wait in order, and owners by the time they had.

    cost: of a piece of work, in any unit, as far as it is known before.
    """

    def __init__(self, num_slots: int, max_waiting: int, max_share: float = 1.0, max_waiting_cost: float = float("inf")):
        """max_waiting: who waits at once; of that, max_share: one owner's. max_waiting_cost: what one owner may have waiting; these
        two are not for owner "".
        """
        self._num_slots, self._max_waiting, self._max_share = num_slots, max_waiting, max_share
        self._max_cost = max_waiting_cost
        self._clock = FairClock()
        self._busy: dict[str, tuple[float, float]] = {}  # owner -> since when, cost
        self._queues: dict[str, deque[_Waiter]] = {}
        self._cost_per_s: float | None = None
        self._closed: Callable[[], SparseVilaError] | None = None

    @property
    def num_waiting(self) -> int:
        """Who waits for a place."""
        return sum(map(len, self._queues.values()))

    def check_room(self, owner: str, cost: float = 0.0) -> None:
        """Raises QueueFull: this owner would have to wait, and too many do, or too much of its own."""
        queue = self._queues.get(owner, ())
        if owner not in self._busy and not queue and len(self._busy) < self._num_slots:
            return
        if self.num_waiting >= self._max_waiting:
            raise QueueFull(f"{self.num_waiting} wait already; the limit is {self._max_waiting}", self._retry_after_s(owner))
        most = owner_bound(owner, self._max_waiting, self._max_share)
        if len(queue) >= most:
            raise QueueFull(f"{len(queue)} of {owner!r} wait already; its share is {most}", self._retry_after_s(owner))
        waiting = sum(waiter.cost for waiter in queue)
        if owner and queue and waiting + cost > self._max_cost:
            asked = f"{owner!r} has work of cost {waiting:.3g} waiting, and asks for {cost:.3g} more"
            raise QueueFull(f"{asked}; the limit is {self._max_cost:.3g}", self._retry_after_s(owner))

    async def enter(self, owner: str, cost: float = 0.0) -> None:
        """Wait for a place; `leave` must follow. Raises QueueFull, and what `close` was told to."""
        if self._closed is not None:
            raise self._closed()
        self.check_room(owner, cost)
        waiter = _Waiter(cost)
        self._queues.setdefault(owner, deque()).append(waiter)
        self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self.leave(owner, worked=False)
            elif waiter in self._queues.get(owner, ()):
                self._remove(owner, waiter)
            raise

    def leave(self, owner: str, worked: bool = True) -> None:
        """Give the place back. worked: whether the time in it tells how long such work takes."""
        since_s, cost = self._busy.pop(owner)
        took_s = time.perf_counter() - since_s
        self._clock.charge(owner, took_s)
        if worked and cost and took_s > 0:
            known = cost / took_s if self._cost_per_s is None else self._cost_per_s
            self._cost_per_s = known + FORGET * (cost / took_s - known)
        self._grant()

    def close(self, error: Callable[[], SparseVilaError]) -> None:
        """Who waits, or comes later, gets this error."""
        self._closed = error
        queues, self._queues = self._queues, {}
        for waiter in (waiter for queue in queues.values() for waiter in queue):
            if not waiter.granted.done():
                waiter.granted.set_exception(error())

    def _grant(self) -> None:
        while len(self._busy) < self._num_slots:
            owner = min((owner for owner in self._queues if owner not in self._busy), key=self._clock.start, default=None)
            if owner is None:
                return
            waiter = self._queues[owner][0]
            self._remove(owner, waiter)
            if not waiter.granted.done():
                self._busy[owner] = time.perf_counter(), waiter.cost
                waiter.granted.set_result(None)

    def _remove(self, owner: str, waiter: _Waiter) -> None:
        self._queues[owner].remove(waiter)
        if not self._queues[owner]:
            del self._queues[owner]

    def _retry_after_s(self, owner: str) -> float:
        """How long what this owner has here may take, as fast as work went so far and shared with the others."""
        if self._cost_per_s is None:
            return 1.0
        cost = sum(waiter.cost for waiter in self._queues.get(owner, ())) + self._busy.get(owner, (0.0, 0.0))[1]
        return min(max(1.0, cost / self._cost_per_s * len(self._queues.keys() | self._busy.keys())), MAX_RETRY_S)
