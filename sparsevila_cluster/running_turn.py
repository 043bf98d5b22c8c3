"""One turn while it waits and runs: its rows, its retrieved KV, its tokens and text.

Knows: what this turn needs, attends to and has said so far. Does not know: other turns, the scheduler, or who listens.

State of the KV, as half-open row intervals of the conversation's tail:

    [0, length) earlier turns   [length, length + rows) this turn, owned by it until `commit`   the last token has no row yet
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from sparsevila_cluster.attention import Capture, Span
from sparsevila_cluster.config import EngineConfig
from sparsevila_cluster.conversation import Conversation, Room
from sparsevila_cluster.detokenize import Detokenizer
from sparsevila_cluster.errors import TooLarge
from sparsevila_cluster.evidence import build_evidence
from sparsevila_cluster.kv import MediaPrefix
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.request import FinishReason, Timeline, Turn, TurnEvent, Usage
from sparsevila_cluster.retrieval import RetrievalPolicy, build_retrieval
from sparsevila_cluster.sampling import Sampler
from sparsevila_cluster.step_batch import Segment

Sink = Callable[[TurnEvent | Exception], None]

DEFAULT_RETRIEVE_KEEP = {"video": 0.10, "image": 0.25}


class RunningTurn:
    def __init__(
        self, turn: Turn, conversation: Conversation, prefix: MediaPrefix, model: Model, config: EngineConfig, sink: Sink
    ):
        self.turn, self.conversation, self.prefix, self.sink = turn, conversation, prefix, sink
        self._model, self._config = model, config
        self.timeline = Timeline()
        self.timeline.mark("arrived")
        self.deadline_s = config.turn_timeout_s if turn.deadline_s is None else turn.deadline_s
        self.deadline_at_s = time.perf_counter() + self.deadline_s
        self.phase: Literal["waiting", "question", "decode"] = "waiting"
        self.policy = self._build_policy()
        self.sampler = Sampler(turn.sampling)
        self.room: Room | None = None
        self.input_ids: list[int] = []
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._text = Detokenizer(model.chat.decode, turn.sampling.stop)
        self._rows = 0
        self._prompt_rows = 0
        self._words = (0, 0)
        self._prepared_at: int | None = None
        self._capture: Capture | None = None
        self._body: list[Span] = []
        self._tail: list[Span] = []

    def _build_policy(self) -> RetrievalPolicy:
        sparsity = self._config.sparsity
        keep = next(
            k
            for k in (self.turn.retrieve_keep, sparsity.retrieve_keep, DEFAULT_RETRIEVE_KEEP[self.prefix.kind])
            if k is not None
        )
        return build_retrieval(sparsity.retrieve, keep, sparsity.seed)

    # ---- before the first step ---------------------------------------------------------------------------------------------

    def prepare_question(self) -> None:
        """Tokenise the question on the conversation as it is now. Raises TooLarge if the answer cannot fit the model."""
        conversation = self.conversation
        if self._prepared_at == conversation.num_turns:
            return  # a turn that waits for room is asked again before every step
        ids, start, stop = self._model.chat.question_ids(self.turn.question, conversation.num_turns == 0, conversation.pending)
        self.input_ids, self._words = ids, (start, stop)
        self._prompt_rows = len(ids)
        last = conversation.next_pos + len(ids) + self.turn.sampling.max_tokens
        if last > self._model.max_position:
            raise TooLarge(
                f"position {last} of the last possible token (conversation at {conversation.next_pos}, question of {len(ids)}, "
                f"max_tokens={self.turn.sampling.max_tokens}) is over the model's {self._model.max_position}"
            )
        self._prepared_at = conversation.num_turns

    def rows_needed(self) -> tuple[int, int]:
        """(rows of the tail at its longest, rows of packed KV). The last token of an answer needs no row."""
        tail = self.conversation.length + len(self.input_ids) + self.turn.sampling.max_tokens - 1
        kept = self.prefix.num_kept
        budget = self.policy.budget(kept)
        return tail, 0 if budget == kept else budget + len(self.prefix.other_index)

    # ---- one step ----------------------------------------------------------------------------------------------------------

    @property
    def input_pos(self) -> int:
        """Position of the next row."""
        position = self.conversation.next_pos + self._rows
        return max(position, self.prefix.generation_floor + len(self.tokens) - 1) if self.tokens else position

    def segment(self, first: int) -> Segment:
        """This turn's rows of the next step, which begin at row `first` of it."""
        if self.phase == "question":
            self._body, self._tail = self.prefix.extent.spans(), self.room.tail.spans()
            if self.policy.needs_scores or self.turn.want_evidence:
                self._capture = self._new_capture()
        past = self.conversation.length + self._rows
        return Segment(
            first=first,
            num=len(self.input_ids),
            body=self._body,
            packed=self.room.packed if self.phase == "decode" else None,
            tail=self._tail,
            tail_start=self.room.tail.start,
            past=past,
            capture=self._capture if self.phase == "question" else None,
            phase=self.phase,
        )

    def _new_capture(self) -> Capture:
        num = len(self.input_ids)
        rows = {"all": (0, num), "question": self._words, "last": (num - 1, num)}[self._config.sparsity.retrieve_rows]
        return Capture(self.prefix.visual_index, *rows, self._config.sparsity.normalise)

    def take_rows(self) -> None:
        """The step ran: the rows of `input_ids` have KV now."""
        self._rows += len(self.input_ids)

    def retrieve(self, last: bool) -> None:
        """Choose this turn's visual KV; unless the answer is complete already, pack it for the decode rows."""
        prefix = self.prefix
        if self._capture is not None:
            scores = torch.stack(self._capture.scores)
        else:
            scores = torch.zeros(prefix.spec.num_layers, prefix.num_kept, device=prefix.visual_index.device)
        chosen = self.policy.select(scores)
        if chosen is not None and self.room.packed is not None and not last:
            self._pack(prefix.visual_index[chosen])
        self.timeline.mark("retrieved")
        if self.turn.want_evidence:
            self.sink(TurnEvent("evidence", self.turn.turn_id, evidence=build_evidence(prefix, scores, chosen)))

    def _pack(self, rows: Tensor) -> None:
        """Copy prefix rows i64 [L, k], and all rows that are not visual, into contiguous memory."""
        others = self.prefix.other_index.expand(len(rows), -1)
        for layer, index in enumerate(torch.cat([rows, others], 1).sort(1).values):
            for source, target in zip(self.prefix.extent.rows(layer), self.room.packed.rows(layer), strict=True):
                torch.index_select(source, 0, index, out=target)
        self._body = self.room.packed.spans()

    # ---- tokens ------------------------------------------------------------------------------------------------------------

    def is_last(self, token: int) -> bool:
        """Whether the answer ends with this token, as far as its id and the count tell."""
        return token in self._model.chat.eos_ids or len(self.tokens) + 1 >= self.turn.sampling.max_tokens

    def accept(self, token: int) -> None:
        """Add a sampled token: show its text, decide whether the answer ends, make it the next step's row."""
        ends, over = token in self._model.chat.eos_ids, self.is_last(token)
        index = len(self.tokens)
        self.tokens.append(token)
        self.input_ids = [token]
        self.phase = "decode"
        text = "" if ends else self._text.add(token)
        if ends or self._text.stopped:
            self.finish_reason = FinishReason.STOP
        elif over:
            self.finish_reason = FinishReason.LENGTH
        self.sink(TurnEvent("token", self.turn.turn_id, index=index, token_ids=(token,), text=text))

    def commit(self) -> None:
        """The answer is complete: its rows become part of the conversation."""
        conversation = self.conversation
        conversation.next_pos = self.input_pos
        conversation.length += self._rows
        conversation.pending = self.tokens[-1]
        conversation.num_turns += 1

    def send_rest(self) -> None:
        """The last event, with the text that was held back."""
        self.timeline.mark("done")
        self.sink(
            TurnEvent(
                "done", self.turn.turn_id, index=len(self.tokens), text=self._text.finish(), finish_reason=self.finish_reason,
                usage=self._usage(),
            )
        )

    def _usage(self) -> Usage:
        kept = self.prefix.num_kept
        retrieved = self.policy.budget(kept)
        line = self.timeline
        spans = {
            "queue": line.ms("arrived", "admitted"),
            "question": line.ms("admitted", "answered"),
            "retrieve": line.ms("answered", "retrieved"),
            "ttft": line.ms("arrived", "answered"),
            "total": line.ms("arrived", "done"),
        }
        steps = line.ms("retrieved", "done")
        if steps is not None and len(self.tokens) > 1:
            spans["step"] = steps / (len(self.tokens) - 1)
        return Usage(
            visual_tokens=self.prefix.num_visual,
            visual_tokens_kept=kept,
            visual_tokens_retrieved=retrieved,
            prompt_tokens=self.prefix.length + self.conversation.length - self._rows + self._prompt_rows,
            completion_tokens=len(self.tokens),
            effective_keep=retrieved / kept if kept else 1.0,
            ms={name: round(ms, 3) for name, ms in spans.items() if ms is not None},
        )
