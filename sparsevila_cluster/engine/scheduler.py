"""Which turns run, which wait and which are preempted: plain Python over integers, no torch. Its clock is steps.

    waiting --(a free place, room; conversation idle)--> prefill --(first token)--> decode --> gone
       |                                                    ^--- rows of a replay ---'
       ^------- preempted: keeps its place in the queue, or goes to its end after its time slice ------'

The rows of an answer that is replayed are known: they are prefilled as question rows are.

Guarantees, with R = max_step_tokens, S = slice_steps and B = max_running (at most max_batch, at most R / 2):

- Rows. A step has at most R rows. Every decoding turn has its row in every step; at least R / 2 rows are left for prefills.
- Prefills share those rows equally, and what a short one does not need goes to the longer ones. With q of them under way, one
  of n rows is prefilled after at most ceil(n / floor(R / 2 / q)) steps, however long the others are.
- The queue is served in order, and a turn that does not fit blocks those behind it, so that a large one cannot starve. Only turns
  of a conversation that is busy are passed over; they keep their order. Turns that have run for S steps are preempted for the
  first in the queue and go on behind those that wait by then. So the first in the queue starts within S steps, and a turn with k
  others before it, waiting or running, starts within 2 (k + 1) S steps, however long their answers are.
- Room. When running turns outgrow it, the last of them in queue order is preempted, and takes its place in the queue again; its
  slice goes on where it was. The first never is unless it runs alone, and then it fits again at once: so every turn ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass
class ScheduledTurn:
    """One turn's place: its conversation, its number in the queue, the rows that it still has to prefill (a replay's, too).

    started: it ran before, so that its conversation is busy also while it waits. num_ran: steps of its slice that it ran before
    `since_step`, at which it was admitted last.
    """

    turn_id: str
    conversation_id: str
    number: int
    rows_to_prefill: int = 0
    started: bool = False
    num_ran: int = 0
    since_step: int = 0


@dataclass
class Scheduler:
    """max_batch: turns that run at once. max_step_tokens: rows of a step. max_waiting: turns in the queue. slice_steps: steps that
    a turn runs before it may be preempted for others.
    """

    max_batch: int
    max_step_tokens: int
    max_waiting: int
    slice_steps: int = 256
    num_preempted: int = 0
    _waiting: dict[str, ScheduledTurn] = field(default_factory=dict)
    _decoding: dict[str, ScheduledTurn] = field(default_factory=dict)
    _prefilling: dict[str, ScheduledTurn] = field(default_factory=dict)
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

    def add(self, turn_id: str, conversation_id: str) -> None:
        """Queue a turn."""
        assert not any(turn_id in turns for turns in (self._waiting, self._decoding, self._prefilling)), turn_id
        self._waiting[turn_id] = ScheduledTurn(turn_id, conversation_id, self._number())

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
        if not self._waiting or (self.num_running >= self.max_running and self._out_of_slice() is None):
            return admitted
        busy = {turn.conversation_id for turn in self._running()}
        busy.update(turn.conversation_id for turn in self._waiting.values() if turn.started)
        for turn in list(self._waiting.values()):
            if not turn.started:
                if turn.conversation_id in busy:
                    continue
                busy.add(turn.conversation_id)
            while not self._try(turn, try_admit):
                if turn.turn_id not in self._waiting:
                    break
                last = self._out_of_slice()
                if last is None:
                    return admitted
                last.num_ran, last.number = 0, self._number()
                self._requeue(last)
                on_preempt(last.turn_id)
            else:
                admitted.append(turn.turn_id)
        return admitted

    def preempt(self) -> str:
        """The last of the running turns, in queue order, goes back to its place in the queue. Returns its turn_id."""
        turn = max(self._running(), key=lambda turn: turn.number)
        turn.num_ran += self._step - turn.since_step
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

    def _out_of_slice(self) -> ScheduledTurn | None:
        """The running turn that has run for longest, if its slice is over."""
        turn = max(self._running(), key=self._ran, default=None)
        return turn if turn is not None and self._ran(turn) >= self.slice_steps else None

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
        left, num = self.max_step_tokens - len(rows), len(self._prefilling)
        for turn in sorted(self._prefilling.values(), key=lambda turn: turn.rows_to_prefill):
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
