"""Who is admitted, who steps, who waits: plain Python over integers, no torch.

Knows: arrival order, rows per step, which conversation a turn belongs to. Does not know: KV, models, text or time.

    waiting --(room in batch, rows and bytes; conversation idle)--> question --(first token)--> decode --> gone

Admission is first come, first served: a turn that does not fit blocks those behind it, so that a large one cannot starve. Only
turns of a conversation that is busy are passed over; they keep their order among themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["waiting", "question", "decode"]


@dataclass
class Seat:
    """One turn's place: its conversation, its phase and how many rows its question takes (known once admitted)."""

    turn_id: str
    conversation_id: str
    phase: Phase = "waiting"
    question_rows: int = 0


@dataclass
class Scheduler:
    max_batch: int
    max_step_tokens: int
    max_waiting: int
    _waiting: dict[str, Seat] = field(default_factory=dict)
    _running: dict[str, Seat] = field(default_factory=dict)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self.max_waiting

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, turn_id: str, conversation_id: str) -> None:
        assert turn_id not in self._waiting and turn_id not in self._running, turn_id
        self._waiting[turn_id] = Seat(turn_id, conversation_id)

    def remove(self, turn_id: str) -> None:
        """Forget a turn in any phase; unknown turns are fine."""
        self._waiting.pop(turn_id, None)
        self._running.pop(turn_id, None)

    def admit(self, try_admit: Callable[[str], int | None]) -> list[str]:
        """Move turns from waiting to running while they fit.

        try_admit(turn_id) takes the bytes that the turn needs and returns its question rows, or None if there is no room now. A
        turn that fails inside it must have been removed by then (return None as well); the next one is tried.
        """
        admitted: list[str] = []
        rows = len(self._running)
        busy = {seat.conversation_id for seat in self._running.values()}
        for seat in list(self._waiting.values()):
            if len(self._running) >= self.max_batch:
                break
            if seat.conversation_id in busy:
                continue
            busy.add(seat.conversation_id)
            # A question longer than the whole row budget runs alone rather than never.
            if admitted and rows >= self.max_step_tokens:
                break
            question_rows = try_admit(seat.turn_id)
            if question_rows is None:
                if seat.turn_id in self._waiting:
                    break
                continue
            del self._waiting[seat.turn_id]
            seat.phase, seat.question_rows = "question", question_rows
            self._running[seat.turn_id] = seat
            admitted.append(seat.turn_id)
            rows += question_rows
        return admitted

    def step(self) -> list[tuple[str, Phase]]:
        """The turns of the next step with their phase, decode rows first."""
        order = {"decode": 0, "question": 1}
        return sorted(((s.turn_id, s.phase) for s in self._running.values()), key=lambda item: order[item[1]])

    def answered(self, turn_id: str) -> None:
        """The question is prefilled and the first token chosen: from now on the turn takes one row per step."""
        self._running[turn_id].phase = "decode"
