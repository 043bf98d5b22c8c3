"""One turn while it waits and runs: its rows, its retrieved KV, its tokens and text.

State of the KV, as half-open row intervals of the conversation's tail:

    [0, length) earlier turns   [length, written) this turn, its own until `commit`   the last token has no row yet

A turn that is preempted loses its room. Its rows stay with the conversation, what it retrieved is remembered, and with its next
room it goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from sparsevila_cluster.attention.interface import Capture, Segment, Span
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import TooLarge
from sparsevila_cluster.core.requests import FinishReason, Timeline, Turn, TurnEvent, Usage
from sparsevila_cluster.engine.prepared_turn import PreparedTurn
from sparsevila_cluster.engine.turn_retrieval import TurnRetrieval
from sparsevila_cluster.kvcache.conversation_store import Conversation, Room
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models.adapter import Model

EventSink = Callable[[TurnEvent | Exception], None]

# Rows of the tail beyond those of the next step that a turn asks for: this many, or a quarter of what it has. A tail that cannot
# grow where it lies is copied, so that small steps cost copies and large ones cost room that others could use.
GROWTH_ROWS = 32


class RunningTurn:
    """What one turn needs, attends to and has said; the scheduler decides when it runs."""

    def __init__(
        self,
        turn: Turn,
        prepared: PreparedTurn,
        conversation: Conversation,
        prefix: MediaPrefix,
        model: Model,
        config: EngineConfig,
        sink: EventSink,
    ):
        """Raises BadRequest if the turn asks for what the configured retrieval cannot do."""
        self.turn, self.conversation, self.prefix, self.sink = turn, conversation, prefix, sink
        self._model, self._prepared = model, prepared
        answer = prepared.answer
        self.timeline = Timeline()
        self.timeline.mark("arrived")
        self.deadline_s = config.turn_timeout_s if turn.deadline_s is None else turn.deadline_s
        self.deadline_at_s = time.perf_counter() + self.deadline_s
        # What its next rows are. "refresh": one decode row that attends to the whole prefix and chooses anew. "replay": decode
        # rows whose tokens are known, prefilled together; a refresh cuts them, for it chooses what those behind it attend to.
        self.phase: Literal["waiting", "question", "replay", "decode", "refresh"] = "waiting"
        self.retrieval = TurnRetrieval(turn, prefix, config.sparsity, model.attention)
        self.answer, self.sampler, self.tokens = answer, answer.sampler, answer.tokens
        self.room: Room | None = None
        self.input_ids: list[int] = []
        self.num_preemptions = 0
        self._rows = 0
        self._prompt_rows = 0
        self._question_span = (0, 0)
        self._prepared_at: int | None = None
        self._capture: Capture | None = None
        self._packed = False
        self._body: list[Span] = []
        self._tail: list[Span] = []
        self._preempted_ms = [0.0, 0.0]  # before and after the first token that is sent
        self._preempted_at_s = 0.0

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer is complete; None as long as it is not."""
        return self.answer.finish_reason

    # ---- room --------------------------------------------------------------------------------------------------------------

    def start(self, brownout: float) -> None:
        """Fix the budget, under this level of pressure; a replay is made under that of its time."""
        replay = self.turn.replay
        self.retrieval.start(brownout if replay is None else replay.brownout)

    def prepare_question(self) -> None:
        """Take the question's tokens on the conversation as it is now. Raises TooLarge if the answer cannot fit the model."""
        conversation = self.conversation
        if self.phase != "waiting" or self._prepared_at == conversation.num_turns:
            return  # a turn that waits for room is asked again before every step
        pending = None if conversation.pending in self._model.chat.eos_ids else conversation.pending
        ids, start, stop = self._prepared.question_ids(conversation.num_turns == 0, pending)
        self.input_ids, self._question_span = ids, (start, stop)
        self._prompt_rows = len(ids)
        last = conversation.next_pos + len(ids) + self.turn.sampling.max_tokens
        if last > self._model.max_position:
            raise TooLarge(
                f"position {last} of the last possible token (conversation at {conversation.next_pos}, question of {len(ids)}, "
                f"max_tokens={self.turn.sampling.max_tokens}) is over the model's {self._model.max_position}"
            )
        self._prepared_at = conversation.num_turns

    def max_room(self) -> tuple[int, int]:
        """(rows of the tail at its longest, most rows of packed KV). The last token of an answer needs no row."""
        tail = self.conversation.length + self._prompt_rows + self.turn.sampling.max_tokens - 1
        return tail, self.retrieval.most_rows

    def room_needed(self) -> tuple[int, int]:
        """(rows of the tail, rows of packed KV) to go on for a while: the rest of the question and a few tokens more."""
        packed_rows = self.retrieval.rows if self.tokens else self.retrieval.most_rows
        written = self.conversation.written
        rows = written + len(self.input_ids)
        if self.room is not None and rows <= self.room.tail.length:
            return self.room.tail.length, packed_rows
        return min(rows + max(GROWTH_ROWS, written // 4), self.max_room()[0]), packed_rows

    @property
    def outgrown(self) -> bool:
        """Whether the room lacks rows for `input_ids`, or is not that of what was retrieved."""
        assert self.room is not None
        return self.conversation.written + len(self.input_ids) > self.room.tail.length or (bool(self.tokens) and not self._packed)

    def admit(self, room: Room) -> None:
        """Start, or go on after a preemption."""
        self.room = room
        if self.phase == "waiting":
            self.phase = "question"
            self.timeline.mark("admitted")
        else:
            self.timeline.mark("resumed")
            away_ms = (time.perf_counter() - self._preempted_at_s) * 1e3
            self._preempted_ms[len(self.tokens) >= max(1, self.answer.num_known)] += away_ms
        self.update_spans()

    def update_spans(self) -> None:
        """The room is new or another one than before: find out where it lies, pack what has to be packed."""
        assert self.room is not None
        self._tail = self.room.tail.spans()
        if not self._packed:
            self._body = self.retrieval.pack(self.room.packed) if self.tokens else self.retrieval.whole()
            self._packed = bool(self.tokens)

    def preempt(self) -> None:
        """The room is gone: the rows that are written stay with the conversation."""
        self.room, self._packed, self._body, self._tail = None, False, [], []
        self.num_preemptions += 1
        self.timeline.mark("preempted")
        self._preempted_at_s = time.perf_counter()

    # ---- one step ----------------------------------------------------------------------------------------------------------

    @property
    def input_pos(self) -> int:
        """Position of the next row."""
        position = self.conversation.next_pos + self._rows
        return max(position, self.prefix.metadata.generation_floor + self._rows - self._prompt_rows) if self.tokens else position

    @property
    def rows_to_prefill(self) -> int:
        """How many of its next rows may share a step; 0 if it takes one row per step."""
        return len(self.input_ids) if self.phase in ("question", "replay") else 0

    def is_sampled(self, num: int) -> bool:
        """Whether a step with the first `num` of its next rows ends in a token that has to be sampled."""
        return num == len(self.input_ids) and len(self.tokens) >= self.answer.num_known

    def segment(self, first: int, num: int) -> Segment:
        """The first `num` of this turn's next rows, which begin at row `first` of the step."""
        assert self.room is not None
        body, home = self._body, self.room.packed or self.prefix.extent
        if self.phase in ("question", "refresh"):
            body, home = self.retrieval.whole(), self.prefix.extent
            if self._capture is None:
                self._capture = self._new_capture()
        return Segment(
            first=first,
            num=num,
            body=body,
            home=home,
            tail=self._tail,
            tail_start=self.room.tail.start,
            past=self.conversation.written,
            capture=self._capture,
            phase=self.phase,
        )

    def _new_capture(self) -> Capture | None:
        if self.phase == "refresh":
            return self.retrieval.capture_row()
        return self.retrieval.capture_question(self._prompt_rows, self._question_span)

    def take_rows(self, num: int) -> bool:
        """The step ran: the first `num` of `input_ids` have KV now. Whether those are all."""
        self._rows += num
        self.conversation.written += num
        if num == len(self.input_ids):
            return True
        del self.input_ids[:num]
        if self._capture is not None:
            self._capture.num_done += num
        return False

    def retrieve(self) -> None:
        """Choose this turn's visual KV from what its last rows attended to. Evidence is of the question's choice."""
        scores = self.retrieval.choose(self._capture, self.conversation.num_turns, len(self.tokens))
        self._capture, self._packed = None, False
        if self.phase == "question" and self.turn.want_evidence:
            self.sink(TurnEvent("evidence", self.turn.turn_id, evidence=self.retrieval.evidence(scores)))

    # ---- tokens ------------------------------------------------------------------------------------------------------------

    def accept(self, token: int | None) -> None:
        """Add what the rows that are written now predict: a sampled token, whose text is shown, or known ones."""
        answer, index = self.answer, len(self.tokens)
        if token is None:
            answer.take_known(self._rows - self._prompt_rows + 1)
            if len(self.tokens) == answer.num_known:
                self.timeline.mark("replayed")
            self._next_rows()
            return
        text = answer.add(token)
        self._next_rows()
        brownout = self.retrieval.brownout
        self.sink(TurnEvent("token", self.turn.turn_id, index=index, token_ids=(token,), text=text, brownout=brownout))

    def _next_rows(self) -> None:
        """The last token's row and, if known tokens follow, theirs, up to one that refreshes or whose next token is not known."""
        count, known = len(self.tokens), self.answer.num_known
        self.input_ids = self.tokens[-1:]
        if self.retrieval.refreshes_at(count):
            self.phase = "refresh"
            return
        stop = next((n for n in range(count + 1, known) if self.retrieval.refreshes_at(n)), known)
        self.input_ids += self.answer.known_tokens(count, stop - 1)
        self.phase = "replay" if len(self.input_ids) > 1 else "decode"

    def commit(self) -> None:
        """The answer is complete: its rows become part of the conversation."""
        conversation = self.conversation
        conversation.next_pos = self.input_pos
        conversation.length = conversation.written
        conversation.pending = self.tokens[-1]
        conversation.num_turns += 1

    def drop_rows(self) -> None:
        """Unless the answer was committed, the conversation is as it was before this turn."""
        if self.phase != "waiting":
            self.conversation.written = self.conversation.length

    def send_done(self) -> None:
        """The last event, with the text that was held back."""
        self.timeline.mark("done")
        self.sink(
            TurnEvent(
                "done",
                self.turn.turn_id,
                index=len(self.tokens),
                text=self.answer.flush(),
                finish_reason=self.finish_reason,
                usage=self._usage(),
                conversation_id=self.turn.conversation_id,
            )
        )

    def _usage(self) -> Usage:
        kept, retrieved = self.prefix.num_kept, self.retrieval.num_retrieved
        # A replay of one token has no rows of its own: the question's last row predicts it.
        times, replayed = self.timeline, self.answer.num_known > 1
        spans = {
            "queue": times.ms("arrived", "admitted"),
            "question": times.ms("admitted", "answered"),
            "retrieve": times.ms("answered", "retrieved"),
            "replay": times.ms("retrieved", "replayed") if replayed else None,
            "ttft": times.ms("arrived", "replayed" if replayed else "answered"),
            "total": times.ms("arrived", "done"),
            "preempted": sum(self._preempted_ms) if self.num_preemptions else None,
        }
        steps = times.ms("replayed" if replayed else "retrieved", "done")
        num_steps = len(self.tokens) - max(1, self.answer.num_known)
        if steps is not None and num_steps > 0:
            spans["step"] = (steps - self._preempted_ms[1]) / num_steps
        return Usage(
            visual_tokens=self.prefix.metadata.num_visual,
            visual_tokens_kept=kept,
            visual_tokens_retrieved=retrieved,
            prompt_tokens=self.prefix.length + self.conversation.length - self._rows + self._prompt_rows,
            completion_tokens=len(self.tokens),
            effective_keep=retrieved / kept if kept else 1.0,
            degraded=self.retrieval.degraded,
            num_preemptions=self.num_preemptions,
            brownout=self.retrieval.brownout,
            ms={name: round(ms, 3) for name, ms in spans.items() if ms is not None},
        )
