"""Which turns run, which wait and which are preempted: plain Python over integers, no torch. Its clock is steps.

    waiting --(a free place, room; conversation idle)--> prefill --(first token)--> decode --> gone
       |                                                    ^--- rows of a replay ---'
       ^------- preempted: keeps its place in the queue, or goes to its end after its time slice ------'

The rows of an answer that is replayed are known: they are prefilled as question rows are.

Guarantees, with R = max_step_tokens, S = slice_steps, B = max_running (at most max_batch, at most R / 2), and m the most owners
that have turns here at one time. With one owner (m = 1) they are those of one queue.

- Rows. A step has at most R rows. Every decoding turn has its row in every step; at least R / 2 rows are left for prefills.
- Prefills have a row each and share the rest of those rows, equally between owners first, then between the turns of each; what one
  does not need goes to the others. With Q of them under way, q of its owner's, a turn gets at least
  P = 1 + floor(floor((R / 2 - Q) / m) / q) rows: one of n rows is prefilled after ceil(n / P) steps, however long the others are.
- Every owner has a queue. It is served in order: only turns of a conversation that is busy are passed over, and keep their order.
  The owner that runs the fewest turns is served first; among those that run as many, owners take turns. A turn that does not fit
  blocks all that come behind it in this order, so that a large one cannot starve, of whichever owner.
- Places. A turn at the head that finds none, or no room, takes it at once from an owner that runs at least two more turns than its
  own: so two owners who want all of B have B / 2 each, and the one who comes second has them without a wait for the first.
- Slices. Turns that have run for S steps are preempted for the head, unless another owner's that runs no more than the head's, and
  go on behind those of their owner that wait by then. So the first head starts within S steps, and a turn with k others of its
  owner before it, waiting or running, starts within 2 (k + 1) m S steps, however many turns others have and however long they are.
- Room. When running turns outgrow it, the last in the queue of the owner that runs the most is preempted, and takes its place in
  the queue again; its slice goes on where it was. The first of all never is unless it runs alone, and then it fits again at once:
  so every turn ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sparsevila_cluster.core.fair_sharing import FairClock, owner_bound


@dataclass
class ScheduledTurn:
    """One turn's place: its conversation and owner, its number in the queue, the rows that it still has to prefill (or to replay).

    started: it ran before, so that its conversation is busy also while it waits. num_ran: steps of its slice that it ran before
    `since_step`, at which it was admitted last.
    """

    turn_id: str
    conversation_id: str
    number: int
    owner: str = ""
    rows_to_prefill: int = 0
    started: bool = False
    num_ran: int = 0
    since_step: int = 0


@dataclass
class Scheduler:
    """max_batch: turns that run at once. max_step_tokens: rows of a step. max_waiting: turns that wait. slice_steps: steps that
    a turn runs before it may be preempted for others. max_share: of those that wait, how many one owner (but "") may have.
    """

    max_batch: int
    max_step_tokens: int
    max_waiting: int
    slice_steps: int = 256
    max_share: float = 1.0
    num_preempted: int = 0
    _waiting: dict[str, ScheduledTurn] = field(default_factory=dict)
    _decoding: dict[str, ScheduledTurn] = field(default_factory=dict)
    _prefilling: dict[str, ScheduledTurn] = field(default_factory=dict)
    _clock: FairClock = field(default_factory=FairClock)
    _next_number: int = 0
    _step: int = 0

    @property
    def max_running(self) -> int:
        """Most turns that run at once: their decode rows leave half of a step to prefills."""
        return max(1, min(self.max_batch, self.max_step_tokens // 2))

    @property
    def num_waiting(self) -> int:
        """Turns in the queue, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Turns that have a share of every step."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def full(self) -> bool:
        """Whether the queue takes no more turns."""
        return len(self._waiting) >= self.max_waiting

    @property
    def idle(self) -> bool:
        """Whether there is no turn at all."""
        return not (self._waiting or self._decoding or self._prefilling)

    def num_waiting_of(self, owner: str) -> int:
        """Turns of one owner in its queue."""
        return sum(turn.owner == owner for turn in self._waiting.values())

    def bound_of(self, owner: str) -> int:
        """Most turns of one owner that may wait."""
        return owner_bound(owner, self.max_waiting, self.max_share)

    def add(self, turn_id: str, conversation_id: str, owner: str = "") -> None:
        """Queue a turn."""
        assert not any(turn_id in turns for turns in (self._waiting, self._decoding, self._prefilling)), turn_id
        self._waiting[turn_id] = ScheduledTurn(turn_id, conversation_id, self._number(), owner)

    def remove(self, turn_id: str) -> None:
        """Forget a turn in any phase; unknown turns are fine."""
        for turns in (self._waiting, self._decoding, self._prefilling):
            turns.pop(turn_id, None)

    # ---- who runs ----------------------------------------------------------------------------------------------------------

    def admit(self, try_admit: Callable[[str], int | None], on_preempt: Callable[[str], None]) -> list[str]:
        """Move turns from the queue to the batch while they fit.

        try_admit(turn_id) takes the bytes that the turn needs and returns the rows that it has to prefill, or None if there
        is no room now. A turn that fails inside it must have been removed by then (return None as well); the next one is
        tried. on_preempt(turn_id) takes back the bytes of a turn that was running and is in the queue again.
        """
        admitted: list[str] = []
        if not self._waiting:
            return admitted
        queues, num_of = self._queues(), Counter(turn.owner for turn in self._running())
        while queues:
            owner = min(queues, key=lambda owner: (num_of[owner], self._clock.start(owner), queues[owner][0].number))
            turn = queues[owner].popleft()
            if not queues[owner]:
                del queues[owner]
            while not self._try(turn, try_admit):
                if turn.turn_id not in self._waiting:
                    break
                victim = self._victim(owner, num_of)
                if victim is None:
                    return admitted
                if self._ran(victim) >= self.slice_steps:
                    victim.num_ran, victim.number = 0, self._number()
                else:
                    victim.num_ran = self._ran(victim)
                num_of[victim.owner] -= 1
                self._requeue(victim)
                on_preempt(victim.turn_id)
            else:
                self._clock.charge(owner, 1.0)
                num_of[owner] += 1
                admitted.append(turn.turn_id)
        return admitted

    def _queues(self) -> dict[str, deque[ScheduledTurn]]:
        """By owner, in order, the waiting turns whose conversation is idle."""
        queues: dict[str, deque[ScheduledTurn]] = {}
        busy = {turn.conversation_id for turn in self._running()}
        busy.update(turn.conversation_id for turn in self._waiting.values() if turn.started)
        for turn in self._waiting.values():
            if not turn.started:
                if turn.conversation_id in busy:
                    continue
                busy.add(turn.conversation_id)
            queues.setdefault(turn.owner, deque()).append(turn)
        return queues

    def _victim(self, owner: str, num_of: Counter[str]) -> ScheduledTurn | None:
        """The running turn that makes way for one of `owner`; None if it has to wait."""
        above = [turn for turn in self._running() if num_of[turn.owner] >= num_of[owner] + 2]
        if above:
            return max(above, key=lambda turn: (num_of[turn.owner], turn.number))
        may = (turn for turn in self._running() if turn.owner == owner or num_of[turn.owner] > num_of[owner])
        return max((turn for turn in may if self._ran(turn) >= self.slice_steps), key=self._ran, default=None)

    def preempt(self) -> str:
        """The last in the queue of the owner that runs the most turns goes back to its place in the queue. Returns its turn_id."""
        num_of = Counter(turn.owner for turn in self._running())
        turn = max(self._running(), key=lambda turn: (num_of[turn.owner], turn.number))
        turn.num_ran = self._ran(turn)
        self._requeue(turn)
        return turn.turn_id

    def _try(self, turn: ScheduledTurn, try_admit: Callable[[str], int | None]) -> bool:
        if self.num_running >= self.max_running:
            return False
        rows = try_admit(turn.turn_id)
        if rows is None:
            return False
        del self._waiting[turn.turn_id]
        turn.started, turn.rows_to_prefill, turn.since_step = True, rows, self._step
        (self._prefilling if rows else self._decoding)[turn.turn_id] = turn
        return True

    def _requeue(self, turn: ScheduledTurn) -> None:
        self.remove(turn.turn_id)
        self._waiting[turn.turn_id] = turn
        self._waiting = {s.turn_id: s for s in sorted(self._waiting.values(), key=lambda s: s.number)}
        self.num_preempted += 1

    def _ran(self, turn: ScheduledTurn) -> int:
        return turn.num_ran + self._step - turn.since_step

    def _running(self) -> Iterable[ScheduledTurn]:
        yield from self._decoding.values()
        yield from self._prefilling.values()

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    # ---- rows --------------------------------------------------------------------------------------------------------------

    def schedule(self) -> list[tuple[str, int]]:
        """The turns of the next step and how many rows each of them has, decode rows first."""
        self._step += 1
        rows = [(turn_id, 1) for turn_id in self._decoding]
        by_owner: dict[str, list[ScheduledTurn]] = {}
        for turn in self._prefilling.values():
            by_owner.setdefault(turn.owner, []).append(turn)
        # A row for each, then the rest: who needs least first, so that what it leaves goes to the others.
        left, num = self.max_step_tokens - len(rows) - len(self._prefilling), len(by_owner)
        for turns in sorted(by_owner.values(), key=_more_rows):
            share = min(_more_rows(turns), left // num)
            rows += self._share_rows(turns, share + len(turns))
            left, num = left - share, num - 1
        return rows

    @staticmethod
    def _share_rows(turns: list[ScheduledTurn], left: int) -> list[tuple[str, int]]:
        """`left` rows between the turns of one owner."""
        rows, num = [], len(turns)
        for turn in sorted(turns, key=lambda turn: turn.rows_to_prefill):
            share = min(turn.rows_to_prefill, left // num)
            rows.append((turn.turn_id, share))
            turn.rows_to_prefill -= share
            left, num = left - share, num - 1
        return rows

    def update(self, turn_id: str, rows: int = 0) -> None:
        """A turn has prefilled its rows. Now it has `rows` of a replay to prefill, or, with none, takes one row per step."""
        if not rows and turn_id in self._decoding:
            return
        turn = self._prefilling.pop(turn_id, None) or self._decoding.pop(turn_id)
        turn.rows_to_prefill = rows
        (self._prefilling if rows else self._decoding)[turn_id] = turn


def _more_rows(turns: list[ScheduledTurn]) -> int:
    """Rows that these turns have to prefill beyond one each."""
    return sum(turn.rows_to_prefill - 1 for turn in turns)
