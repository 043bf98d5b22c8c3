"""The decode loop: many conversations on shared media prefixes, one batch.

    submit -> waiting -> [question prefill over the FULL prefix + tail: scores, first token]
                 ^            -> retrieve + pack (per layer) -> [step]* over packed KV + tail -> done
                 |               (a replay: the answer's known rows in one piece, then steps)
                 '---- preempted: packed KV dropped, text KV and chosen rows kept ----'

Question rows and decode rows share one step; a long question takes several. A turn is admitted with room for its question and a
few tokens, and grows. Everything runs in the thread that calls `step`; nothing here is thread-safe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from sparsevila_cluster.attention.interface import Segment
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    QueueFull,
    SparseVilaError,
    TooLarge,
)
from sparsevila_cluster.core.requests import Turn, TurnEvent, check_brownout
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.engine.model_runner import ModelRunner
from sparsevila_cluster.engine.prepared_turn import PreparedTurn
from sparsevila_cluster.engine.sampling import sample
from sparsevila_cluster.engine.scheduler import Scheduler
from sparsevila_cluster.engine.turn import EventSink, RunningTurn
from sparsevila_cluster.kvcache.arena import Arena
from sparsevila_cluster.kvcache.conversation_store import Conversation, ConversationStore
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.kvcache.prefix_store import PrefixStore
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.retrieval.budget import budget_of

log = logging.getLogger(__name__)


def _not_decoding(share: tuple[RunningTurn, int]) -> bool:
    """Sorts rows over packed KV before rows over the whole prefix."""
    return share[0].phase != "decode"


class DecodeEngine:
    """Holds media prefixes and conversations and generates answers."""

    def __init__(self, model: Model, config: EngineConfig):
        check_choices(config)
        self.model = model
        self.config = config
        per_token = model.spec.bytes_per_token
        self.prefixes = PrefixStore(Arena(model.spec, config.prefix_bytes // per_token, model.device), config.max_share)
        self.conversations = ConversationStore(
            Arena(model.spec, config.turn_bytes // per_token, model.device), config.max_conversations, config.parked_bytes
        )
        self.scheduler = Scheduler(
            config.max_batch, config.max_step_tokens, config.max_waiting, config.slice_steps, config.max_share
        )
        self.turns: dict[str, RunningTurn] = {}
        self.num_steps = 0
        self.brownout = 0.0
        self._outgrown: list[str] = []
        self.runner = ModelRunner(model, (self.prefixes.arena, self.conversations.arena), config)

    # ---- turns ------------------------------------------------------------------------------------------------------------

    def prepare(self, turn: Turn) -> PreparedTurn:
        """What `submit` needs of a turn and can be had without the engine: from any thread. Raises as `PreparedTurn.of`."""
        return PreparedTurn.of(turn, self.model, self.config)

    def submit(self, turn: Turn, sink: EventSink, prepared: PreparedTurn | None = None) -> None:
        """Queue a turn; its events, or one error, go to `sink`. It runs only if, when it starts, `turn.after` turns are finished.

        prepared: by `prepare`; done here, in the engine's thread, if None.

        Raises:
            NotFound: unknown media, or a conversation that is not here as `turn.after` says, or is another tenant's. BadRequest,
            TooLarge: illegal or over-long question, a replay that no answer begins with, or a wish that the configured retrieval
            cannot fulfil. QueueFull: too many turns wait.
        """
        if turn.turn_id in self.turns:
            raise BadRequest(f"turn_id {turn.turn_id!r} is already in use")
        if self.scheduler.full:
            raise QueueFull(f"{self.scheduler.num_waiting} turns wait already; the limit is {self.config.max_waiting}")
        if (num := self.scheduler.num_waiting_of(turn.owner)) >= (most := self.scheduler.bound_of(turn.owner)):
            limit = f"its share of max_waiting={self.config.max_waiting} is {most}"
            raise QueueFull(f"{num} turns of {turn.owner!r} wait already; {limit}")
        prefix = self.prefix_of(turn.media_id, turn.tenant)
        conversation = self._conversation_of(turn)
        prepared = prepared or self.prepare(turn)
        budget_of(turn, self.config.sparsity, prefix.metadata.kind)
        if conversation is None:
            conversation = self.conversations.open(turn.conversation_id, turn.media_id, prefix.metadata.next_pos, turn.tenant)
        self.prefixes.hold(prefix.key)
        self.conversations.enter(conversation)
        self.turns[turn.turn_id] = RunningTurn(turn, prepared, conversation, prefix, self.model, self.config, sink)
        self.scheduler.add(turn.turn_id, turn.conversation_id, turn.owner)
        sink(TurnEvent("accepted", turn.turn_id, conversation_id=turn.conversation_id))

    def prefix_of(self, media_id: str, tenant: str = "") -> MediaPrefix:
        """A resident prefix. Raises NotFound: there is none, or it is another tenant's, which looks the same."""
        prefix = self.prefixes.get(media_id)
        if prefix is None or not prefix.serves(tenant):
            raise NotFound(f"media {media_id!r} is not resident; prepare it first")
        return prefix

    def _conversation_of(self, turn: Turn) -> Conversation | None:
        """The conversation that the turn goes on with, None if it opens one."""
        conversation = self.conversations.get(turn.conversation_id)
        if conversation is not None and not may_use(conversation.tenant, turn.tenant):
            raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
        if conversation is not None and conversation.media_id != turn.media_id:
            raise BadRequest(f"conversation {turn.conversation_id!r} is about another media than {turn.media_id!r}")
        if not self.conversations.busy(turn.conversation_id):  # else it is as it will be only when the turn starts
            self._check_after(turn, conversation)
        return conversation

    @staticmethod
    def _check_after(turn: Turn, conversation: Conversation | None) -> None:
        num_turns = 0 if conversation is None else conversation.num_turns
        if turn.after not in (None, num_turns):
            raise NotFound(
                f"conversation {turn.conversation_id!r} is not here as it was: it has {num_turns} turns behind it, not {turn.after}"
            )

    def abort(self, turn_id: str, error: SparseVilaError | None = None) -> bool:
        """End a turn in any phase; its conversation stays as it was before it. False if the turn is unknown."""
        running = self.turns.get(turn_id)
        if running is None:
            return False
        self._release(running)
        running.sink(error or Cancelled(f"turn {turn_id} was aborted"))
        return True

    def close_conversation(self, conversation_id: str, tenant: str | None = None) -> bool:
        """Abort the conversation's turns and free its KV. False if it is unknown, or another tenant's than `tenant` (None: any)."""
        known = self.conversations.get(conversation_id)
        if known is None or tenant is not None and not may_use(known.tenant, tenant):
            return False
        for running in [t for t in self.turns.values() if t.conversation.conversation_id == conversation_id]:
            self.abort(running.turn.turn_id)
        self.conversations.close(conversation_id)  # gone with its first turn, perhaps
        return True

    def set_brownout(self, level: float) -> None:
        """Attend to less instead of refusing work: from 0, every turn as it wishes, to 1, at `brownout_floor`.

        Turns that start from now on have their `retrieve_keep` (with a mass, the most that it may take) moved that share of the way
        down to the floor; turns that run keep theirs. An answer that got less than its wish says so: `Usage.degraded`.

        Raises:
            BadRequest: a level outside [0, 1].
        """
        self.brownout = check_brownout(level)

    @property
    def idle(self) -> bool:
        """Whether no turn runs or waits."""
        return self.scheduler.idle

    def check_integrity(self) -> None:
        """Assert that every slot of both arenas has exactly one owner, and that no reference is left over when idle."""
        self.prefixes.check_integrity()
        self.conversations.check_integrity()
        held = sum(self.prefixes.holders(p.key) for p in self.prefixes)
        assert held == len(self.turns), "a prefix is held by a turn that is gone"

    # ---- the loop ----------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> None:
        """Make room, admit what fits, then run one step over all running turns."""
        self._expire(time.perf_counter())
        self._make_room()
        self.scheduler.admit(self._try_admit, self._preempt)
        batch = [(self.turns[turn_id], num) for turn_id, num in self.scheduler.schedule()]
        if not batch:
            return
        batch.sort(key=_not_decoding)
        try:
            tokens = self._forward(batch)
        except Exception as error:
            self._fail([running for running, _ in batch], error)
            return
        for (running, num), token in zip(batch, tokens, strict=True):
            try:
                self._advance(running, num, token)
            except Exception as error:
                self._fail([running], error)
        self.num_steps += 1

    def _forward(self, batch: list[tuple[RunningTurn, int]]) -> Sequence[int | None]:
        """One pass of the text model; the next token of every turn, None where more rows are to come or the token is known."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        for running, num in batch:
            segments.append(running.segment(len(ids), num))
            ids += running.input_ids[:num]
            positions += range(running.input_pos, running.input_pos + num)
        sampled = [i for i, (running, num) in enumerate(batch) if running.is_sampled(num)]
        last = [segments[i].first + segments[i].num - 1 for i in sampled]
        logits, argmax_ids = self.runner.forward(ids, positions, segments, last)
        tokens: list[int | None] = [None] * len(batch)
        if logits is not None:
            chosen = sample(logits, [batch[i][0].sampler for i in sampled], argmax_ids)
            for i, token in zip(sampled, chosen, strict=True):
                tokens[i] = token
        return tokens

    def _advance(self, running: RunningTurn, num: int, token: int | None) -> None:
        """Take one more token: retrieve and pack after the question and whenever it is time again, show text, finish."""
        phase = running.phase
        if not running.take_rows(num):
            return
        if phase == "question":
            running.timeline.mark("answered")
        if phase in ("question", "refresh"):
            running.retrieve()
        running.accept(token)
        self.scheduler.update(running.turn.turn_id, running.rows_to_prefill)
        if running.finish_reason is None and running.outgrown and not self._resize(running):
            self._outgrown.append(running.turn.turn_id)
        if phase == "question":
            running.timeline.mark("retrieved")
        if running.finish_reason is not None:
            self._finish(running)

    def _finish(self, running: RunningTurn) -> None:
        running.commit()
        self._release(running)
        running.send_done()

    # ---- room --------------------------------------------------------------------------------------------------------------

    def _try_admit(self, turn_id: str) -> int | None:
        """Take the bytes of a waiting turn; the rows that it has to prefill, or None if there is no room now or it failed."""
        running = self.turns[turn_id]
        try:
            if running.phase == "waiting":
                # Turns before it may have ended otherwise than whoever asked it believes.
                self._check_after(running.turn, running.conversation)
            running.prepare_question()
            if running.phase == "waiting":
                running.start(self.brownout)
                self._check_room(*running.max_room())
            room = self.conversations.take(running.conversation, *running.room_needed())
            if room is None:
                return None
            running.admit(room)
        except Exception as error:
            self._fail([running], error)
            return None
        return running.rows_to_prefill

    def _check_room(self, tail_rows: int, packed_rows: int) -> None:
        """Raises TooLarge if a turn of this size, at its longest, could not run even alone."""
        if not self.conversations.fits_ever(tail_rows, packed_rows):
            size = self.model.spec.bytes_per_token
            raise TooLarge(
                f"the turn needs {(tail_rows + packed_rows) * size} bytes of KV (text tail of {tail_rows} and packed KV of "
                f"{packed_rows} tokens); turn_bytes allows {self.conversations.arena.num_slots * size}"
            )

    def _resize(self, running: RunningTurn) -> bool:
        """Bring the room of a running turn to what it needs next; False if there is too little now."""
        if not self.conversations.resize(running.conversation, *running.room_needed()):
            return False
        running.update_spans()
        return True

    def _make_room(self) -> None:
        """Where a running turn has outgrown the arena, the last in queue order is preempted, be it that turn itself."""
        while self._outgrown:
            running = self.turns.get(self._outgrown.pop(0))
            if running is None:
                continue
            try:
                while running.room is not None and not self._resize(running):
                    self._preempt(self.scheduler.preempt())
            except Exception as error:
                self._fail([running], error)

    def _preempt(self, turn_id: str) -> None:
        """Take the room of a turn that was running: its packed KV is dropped, its text KV may be parked."""
        running = self.turns[turn_id]
        self.conversations.give_back(running.conversation)
        running.preempt()

    # ---- endings -----------------------------------------------------------------------------------------------------------

    def _expire(self, now_s: float) -> None:
        for running in [t for t in self.turns.values() if now_s > t.deadline_at_s]:
            waited = f"{running.deadline_s:g} s"
            self.abort(running.turn.turn_id, DeadlineExceeded(f"turn {running.turn.turn_id} took longer than {waited}"))

    def _fail(self, batch: list[RunningTurn], error: Exception) -> None:
        """End turns on an error: known errors as they are, unknown ones logged once and turned into Internal."""
        if not isinstance(error, SparseVilaError):
            log.exception("step failed for turns %s", [t.turn.turn_id for t in batch])
            error = Internal(f"{type(error).__name__}: {error}")
        for running in batch:
            self.abort(running.turn.turn_id, error)

    def _release(self, running: RunningTurn) -> None:
        """Give back everything that a turn holds, in any phase."""
        del self.turns[running.turn.turn_id]
        self.scheduler.remove(running.turn.turn_id)
        running.drop_rows()
        if running.room is not None:
            self.conversations.give_back(running.conversation)
            running.room = None
        self.conversations.leave(running.conversation)
        if not running.conversation.num_turns:  # its client may never have heard its name, and would find it as it finds none
            self.conversations.close(running.conversation.conversation_id)
        self.prefixes.release(running.prefix.key)
