"""Who is admitted, who steps, who makes way: plain Python over integers, no torch.

Knows: the line, rows per step, which conversation a turn belongs to. Does not know: KV, models, text or time; its clock is steps.

    the line --(seat, room; conversation free)--> question --(first token)--> decode --> gone
       |                                              ^--- rows of a replay ---'
       ^------------- preempted: keeps its place, or goes behind after its slice -------------'

The rows of an answer that is made again, a replay, are known: they are prefilled as question rows are.

What is promised, with R = max_step_tokens, S = slice_steps and B the batch's seats (at most max_batch, at most R / 2):

- Rows. A step has at most R rows. Every decoding turn has its row in every step; at least R / 2 rows are left for questions.
- Questions share those rows equally, and what a short one does not need goes to the longer ones. With q questions under way, one
  of n rows is prefilled after at most ceil(n / floor(R / 2 / q)) steps, however long the others are.
- The line is served in order, and a turn that does not fit blocks those behind it, so that a large one cannot starve. Only turns
  of a conversation that is busy are passed over; they keep their order. Turns that have run for S steps make way for the first in
  line and go on behind those that wait by then. So the first in line starts within S steps, and a turn with k others before it,
  in line or running, starts within 2 (k + 1) S steps, however long their answers are.
- Room. When running turns outgrow it, the last in line of them makes way, and takes its place in line again; its slice goes on
  where it was. The first in line never does unless it is alone, and then it fits again at once: so every turn ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["waiting", "question", "decode"]


@dataclass
class Seat:
    """One turn's place: its conversation, its number in line, its phase, the rows that it still has to prefill (a replay's, too).

    started: it ran before, so that its conversation is busy also while it waits. num_ran: steps of its slice that it ran before
    `since_step`, at which it was admitted last.
    """

    turn_id: str
    conversation_id: str
    number: int
    phase: Phase = "waiting"
    question_rows: int = 0
    started: bool = False
    num_ran: int = 0
    since_step: int = 0


@dataclass
class Scheduler:
    max_batch: int
    max_step_tokens: int
    max_waiting: int
    slice_steps: int = 256
    num_preempted: int = 0
    _waiting: dict[str, Seat] = field(default_factory=dict)
    _decoding: dict[str, Seat] = field(default_factory=dict)
    _asking: dict[str, Seat] = field(default_factory=dict)
    _next_number: int = 0
    _step: int = 0

    @property
    def num_seats(self) -> int:
        """Most turns that run at once: their decode rows leave half of a step to questions."""
        return max(1, min(self.max_batch, self.max_step_tokens // 2))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._decoding) + len(self._asking)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self.max_waiting

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._decoding or self._asking)

    def add(self, turn_id: str, conversation_id: str) -> None:
        assert not any(turn_id in seats for seats in (self._waiting, self._decoding, self._asking)), turn_id
        self._waiting[turn_id] = Seat(turn_id, conversation_id, self._number())

    def remove(self, turn_id: str) -> None:
        """Forget a turn in any phase; unknown turns are fine."""
        for seats in (self._waiting, self._decoding, self._asking):
            seats.pop(turn_id, None)

    # ---- who runs ----------------------------------------------------------------------------------------------------------

    def admit(self, try_admit: Callable[[str], int | None], make_way: Callable[[str], None]) -> list[str]:
        """Move turns from the line to the batch while they fit.

        try_admit(turn_id) takes the bytes that the turn needs and returns the question rows that it has before it, or None if
        there is no room now. A turn that fails inside it must have been removed by then (return None as well); the next one is
        tried. make_way(turn_id) takes back the bytes of a turn that was running and is in line again.
        """
        admitted: list[str] = []
        if not self._waiting or (self.num_running >= self.num_seats and self._out_of_slice() is None):
            return admitted
        busy = {seat.conversation_id for seat in self._running()}
        busy.update(seat.conversation_id for seat in self._waiting.values() if seat.started)
        for seat in list(self._waiting.values()):
            if not seat.started:
                if seat.conversation_id in busy:
                    continue
                busy.add(seat.conversation_id)
            while not self._try(seat, try_admit):
                if seat.turn_id not in self._waiting:
                    break
                last = self._out_of_slice()
                if last is None:
                    return admitted
                last.num_ran, last.number = 0, self._number()
                self._requeue(last)
                make_way(last.turn_id)
            else:
                admitted.append(seat.turn_id)
        return admitted

    def preempt(self) -> str:
        """The last in line of the running turns goes back into the line, to the place that it had. Returns its turn_id."""
        seat = max(self._running(), key=lambda seat: seat.number)
        seat.num_ran += self._step - seat.since_step
        self._requeue(seat)
        return seat.turn_id

    def _try(self, seat: Seat, try_admit: Callable[[str], int | None]) -> bool:
        if self.num_running >= self.num_seats:
            return False
        rows = try_admit(seat.turn_id)
        if rows is None:
            return False
        del self._waiting[seat.turn_id]
        seat.started, seat.question_rows, seat.since_step = True, rows, self._step
        seat.phase = "question" if rows else "decode"
        (self._asking if rows else self._decoding)[seat.turn_id] = seat
        return True

    def _requeue(self, seat: Seat) -> None:
        self.remove(seat.turn_id)
        seat.phase = "waiting"
        self._waiting[seat.turn_id] = seat
        self._waiting = {s.turn_id: s for s in sorted(self._waiting.values(), key=lambda s: s.number)}
        self.num_preempted += 1

    def _out_of_slice(self) -> Seat | None:
        """The running turn that has run for longest, if its slice is over."""
        seat = max(self._running(), key=self._ran, default=None)
        return seat if seat is not None and self._ran(seat) >= self.slice_steps else None

    def _ran(self, seat: Seat) -> int:
        return seat.num_ran + self._step - seat.since_step

    def _running(self) -> Iterable[Seat]:
        yield from self._decoding.values()
        yield from self._asking.values()

    def _number(self) -> int:
        self._next_number += 1
        return self._next_number

    # ---- what they do ------------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[str, int]]:
        """The turns of the next step and how many rows each of them has, decode rows first."""
        self._step += 1
        rows = [(turn_id, 1) for turn_id in self._decoding]
        left, num = self.max_step_tokens - len(rows), len(self._asking)
        for seat in sorted(self._asking.values(), key=lambda seat: seat.question_rows):
            share = min(seat.question_rows, left // num)
            rows.append((seat.turn_id, share))
            seat.question_rows -= share
            left, num = left - share, num - 1
        return rows

    def goes_on(self, turn_id: str, rows: int = 0) -> None:
        """What it had to prefill is in. Now it has `rows` of a replay to prefill, or, with none, takes one row per step."""
        if not rows and turn_id in self._decoding:
            return
        seat = self._asking.pop(turn_id, None) or self._decoding.pop(turn_id)
        seat.phase, seat.question_rows = "question" if rows else "decode", rows
        (self._asking if rows else self._decoding)[turn_id] = seat
