"""Requests that were in hand when a worker died: who is suspected, who is refused, and who may enter a worker beside whom.

    in hand at a worker that dies -> suspected -> [alone at another worker] -> got further than before: free
                                                                            -> that one dies, too: refused for a while
Nobody can tell what a worker died of, so all that it had in hand is suspected. A request is refused only for a second death that it
met alone; those who were suspected of the same deaths are free then. Time is handed in; nobody is asked.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import PoisonRequest
from sparsevila_cluster.core.lru_dict import LRUDict

MAX_SUSPECTS = 4_096
MAX_REFUSED = 256
# A worker may still work on what its client has left, and die of it; this long it counts as in hand.
LINGER_S = 120.0
MAX_LINGERING = 1_024
MAX_WORKERS = 256


@dataclass
class _Suspect:
    """workers: those that died with it in hand. reach: how far it had come, at most."""

    until_s: float
    workers: set[str] = field(default_factory=set)
    reach: int = 0


@dataclass(eq=False)
class InHand:
    """One request at one worker. names: its fingerprint, then others that it is known by; reach: how far it has come."""

    worker: str
    names: Sequence[str]
    reach: int = 0

    @property
    def fingerprint(self) -> str:
        """What a request is known by in the table of suspects."""
        return self.names[0]


class EntryGate:
    """Who may enter one worker: any number at a time, or one alone, in the order in which they came."""

    def __init__(self) -> None:
        self._line: deque[tuple[bool, asyncio.Future[None]]] = deque()
        self._num_inside = 0
        self._is_alone = False

    @property
    def is_wanted_alone(self) -> bool:
        """Whether somebody is alone there, or waits to be."""
        return self._is_alone or any(alone for alone, _ in self._line)

    @property
    def is_idle(self) -> bool:
        """Whether nobody is there or waits."""
        return not self._num_inside and not self._line

    async def enter(self, alone: bool, deadline: Deadline, what: str) -> None:
        """Wait for one's turn; `leave` is to follow. Raises DeadlineExceeded, Cancelled."""
        if not self._line and self._is_open(alone):
            return self._let_in(alone)
        place = alone, asyncio.get_running_loop().create_future()
        self._line.append(place)
        try:
            await wait_within(place[1], deadline.remaining_s(what), what)
        except BaseException:
            if place in self._line:
                self._line.remove(place)
                self._admit()
            else:
                self.leave(alone)
            raise

    def leave(self, alone: bool) -> None:
        """Who entered has got through, or gave up."""
        self._num_inside -= 1
        self._is_alone &= not alone
        self._admit()

    def _is_open(self, alone: bool) -> bool:
        return not self._is_alone and (not alone or not self._num_inside)

    def _let_in(self, alone: bool) -> None:
        self._num_inside += 1
        self._is_alone = alone

    def _admit(self) -> None:
        while self._line and self._is_open(self._line[0][0]):
            alone, admitted = self._line.popleft()
            self._let_in(alone)
            if not admitted.done():  # else whoever gave up leaves at once
                admitted.set_result(None)


class Suspects:
    """The requests of one router. Used within one event loop."""

    def __init__(self, refuse_s: float):
        """refuse_s: how long a request is refused, and how long one that is suspected stays so."""
        self.refuse_s = refuse_s
        self._suspects: LRUDict[_Suspect] = LRUDict(MAX_SUSPECTS)
        self._refused: LRUDict[float] = LRUDict(MAX_REFUSED)
        self._in_hand: dict[str, set[InHand]] = {}
        self._lingering: LRUDict[LRUDict[tuple[InHand, float]]] = LRUDict(MAX_WORKERS)
        self._gates: dict[str, EntryGate] = {}

    @property
    def num_suspects(self) -> int:
        """Requests that are suspected."""
        return len(self._suspects)

    @property
    def num_refused(self) -> int:
        """Requests that are refused."""
        return len(self._refused)

    # ---- who may go on -----------------------------------------------------------------------------------------------------

    def check(self, fingerprint: str, now_s: float, refused_elsewhere: Collection[str] = ()) -> None:
        """Raises PoisonRequest: it is refused, here or (as the directory says) by another router."""
        if self._refused.get(fingerprint, now_s) <= now_s:
            self._refused.pop(fingerprint, None)
            if fingerprint not in refused_elsewhere:
                return
        raise PoisonRequest(f"two workers died with this request in hand; it is refused for {self.refuse_s:g} s")

    def is_suspected(self, fingerprint: str, now_s: float) -> bool:
        """Whether it has to be alone at its next worker."""
        suspect = self._suspects.get(fingerprint)
        if suspect is not None and suspect.until_s <= now_s:
            del self._suspects[fingerprint]
            suspect = None
        return suspect is not None

    def reach_of(self, fingerprint: str) -> int:
        """How far a request has to come to be free of suspicion."""
        suspect = self._suspects.get(fingerprint)
        return suspect.reach if suspect is not None else 0

    def gate(self, worker: str) -> EntryGate:
        """Of one worker. A gate that is idle may be another one the next time."""
        if len(self._gates) > MAX_WORKERS:
            self._gates = {name: gate for name, gate in self._gates.items() if not gate.is_idle}
        return self._gates.setdefault(worker, EntryGate())

    def watched_workers(self) -> set[str]:
        """Workers where a suspect is alone or waits to be: better avoided."""
        return {worker for worker, gate in self._gates.items() if gate.is_wanted_alone}

    # ---- what happens to them ----------------------------------------------------------------------------------------------

    def begin(self, request: InHand) -> None:
        """Its worker has it in hand from now on."""
        self._in_hand.setdefault(request.worker, set()).add(request)

    def end(self, request: InHand, now_s: float, lingers: bool) -> None:
        """It is over here. lingers: its worker was not heard of it, and may still work on it."""
        in_hand = self._in_hand.get(request.worker, set())
        in_hand.discard(request)
        if not in_hand:
            self._in_hand.pop(request.worker, None)
        if lingers:
            lingering = self._lingering.use(request.worker) or LRUDict(MAX_LINGERING)
            lingering.put(request.fingerprint, (request, now_s + LINGER_S))
            self._lingering.put(request.worker, lingering)

    def clear(self, fingerprint: str) -> None:
        """It got further than where a worker died, so that was of something else."""
        self._suspects.pop(fingerprint, None)

    def worker_died(self, worker: str, now_s: float) -> None:
        """Suspect all that it had in hand."""
        lingering = [request for request, until_s in (self._lingering.pop(worker, None) or {}).values() if until_s > now_s]
        for request in (*self._in_hand.get(worker, ()), *lingering):
            suspect = self._suspects.use(request.fingerprint)
            if suspect is None or suspect.until_s <= now_s:
                suspect = _Suspect(now_s)
            suspect.until_s = now_s + self.refuse_s
            suspect.workers.add(worker)
            suspect.reach = max(suspect.reach, request.reach)
            self._suspects.put(request.fingerprint, suspect)

    def workers_left(self, workers: Collection[str], now_s: float) -> None:
        """Only these report: what others may still have worked on is suspected."""
        for worker in [one for one in self._lingering if one not in workers]:
            self.worker_died(worker, now_s)

    def refuse(self, request: InHand, now_s: float) -> set[str]:
        """It was alone when its worker died: refuse it. The workers that died with it, of which nobody else is suspected now."""
        suspect = self._suspects.pop(request.fingerprint, None) or _Suspect(now_s)
        suspect.workers.add(request.worker)
        for name in request.names:
            self._refused.put(name, now_s + self.refuse_s)
        for fingerprint, other in list(self._suspects.items()):
            other.workers -= suspect.workers
            if not other.workers:
                del self._suspects[fingerprint]
        return suspect.workers
