"""The life of a request as data: what is asked, what comes back, and when each part happened."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from sparsevila_cluster.core.config import EngineConfig, MediaLimits
from sparsevila_cluster.core.display import ReprMixin
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.evidence import Evidence

MAX_STOP_STRINGS, MAX_STOP_CHARS = 16, 512


class FinishReason(StrEnum):
    """Why an answer ended. `stop`: end-of-turn token or a stop string; `length`: max_tokens; `abort`: the caller's wish."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def check_ratio(name: str, value: float) -> float:
    """Return `value` if it is a kept fraction in (0, 1], else raise BadRequest."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise BadRequest(f"{name} must be in (0, 1], got {value!r}")
    return float(value)


def check_deadline(deadline_s: float | None) -> None:
    """Raise BadRequest unless it is None or a number of seconds > 0."""
    if deadline_s is not None and (isinstance(deadline_s, bool) or not isinstance(deadline_s, (int, float)) or not deadline_s > 0):
        raise BadRequest(f"deadline_s must be a number > 0, got {deadline_s!r}")


def check_brownout(level: float) -> float:
    """Return `level` if it is a level of pressure in [0, 1], else raise BadRequest."""
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0.0 <= level <= 1.0:
        raise BadRequest(f"brownout level must be in [0, 1], got {level!r}")
    return float(level)


def kept_count(fraction: float, total: int) -> int:
    """How many of `total` tokens a kept `fraction` means: rounded half up, at least one of any."""
    return min(total, max(1, math.floor(fraction * total + 0.5))) if total else 0


@dataclass(frozen=True)
class SamplingParams:
    """How to choose each token.

    temperature 0 is greedy; otherwise softmax(logits / temperature) cut to the `top_k` likeliest tokens (0 = all) and to the
    smallest set of probability >= `top_p`. The same `seed` gives the same answer, whatever else is in the batch.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int) or self.max_tokens < 1:
            raise BadRequest(f"max_tokens must be an integer >= 1, got {self.max_tokens!r}")
        if not isinstance(self.temperature, (int, float)) or not 0.0 <= self.temperature <= 10.0:
            raise BadRequest(f"temperature must be in [0, 10], got {self.temperature!r}")
        check_ratio("top_p", self.top_p)
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise BadRequest(f"top_k must be an integer >= 0 (0 = all), got {self.top_k!r}")
        if self.seed is not None and (not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63):
            raise BadRequest(f"seed must be a 64-bit integer, got {self.seed!r}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        if len(self.stop) > MAX_STOP_STRINGS:
            raise BadRequest(f"stop may hold at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise BadRequest(f"stop strings must be non-empty text, got {text!r}")
            if len(text) > MAX_STOP_CHARS:
                raise BadRequest(f"a stop string may have at most {MAX_STOP_CHARS} characters, got {len(text)}")


class Timeline:
    """Named moments on one monotonic clock; every latency is a difference of two of them."""

    def __init__(self) -> None:
        self.moments: list[tuple[str, float]] = []

    def mark(self, name: str, at_s: float | None = None) -> None:
        """Note that something happened, at `at_s` of time.perf_counter() (None: now)."""
        self.moments.append((name, time.perf_counter() if at_s is None else at_s))

    def at(self, name: str) -> float | None:
        """Seconds of the first moment with this name, or None."""
        return next((at_s for moment, at_s in self.moments if moment == name), None)

    def ms(self, start: str, end: str) -> float | None:
        """Milliseconds from the first `start` to the first `end`, or None if one did not happen."""
        a, b = self.at(start), self.at(end)
        return None if a is None or b is None else (b - a) * 1e3


@dataclass(frozen=True, repr=False)
class Usage(ReprMixin):
    """What a turn consumed. Visual token counts: before pruning, after it, and retrieved per layer for this turn.

    effective_keep: retrieved / kept, of the last choice; degraded: pressure made it less than the turn wished; num_preemptions: how
    often the turn gave up its place in the batch and went on later, with the same answer; brownout: the pressure, 0 to 1, under
    which it started.
    """

    visual_tokens: int
    visual_tokens_kept: int
    visual_tokens_retrieved: int
    prompt_tokens: int
    completion_tokens: int
    effective_keep: float
    degraded: bool = False
    num_preemptions: int = 0
    brownout: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MediaSource:
    """One video or image as the user named it: a path, raw bytes or a data URL. name: what errors call it ("": by path or size)."""

    data: str | bytes
    kind: Literal["video", "image", "auto"] = "auto"
    name: str = ""


@dataclass(frozen=True)
class PrepareRequest:
    """What media prefix is wanted. `fps` and `max_frames` None = the engine's defaults; `prune_keep` None = the configured one.

    tenant: who alone may use the prefix, part of its content key; "" = everybody. owner: whose share of the engines it takes, "" =
    nobody counts shares.
    """

    sources: tuple[MediaSource, ...]
    fps: float | None = None
    max_frames: int | None = None
    prune_keep: float | None = None
    deadline_s: float | None = None
    tenant: str = ""
    owner: str = ""

    def __post_init__(self) -> None:
        if not self.sources:
            raise BadRequest("sources must name at least one video or image, got none")
        if self.fps is not None and not (isinstance(self.fps, (int, float)) and 0.0 < self.fps <= 240.0):
            raise BadRequest(f"fps must be in (0, 240], got {self.fps!r}")
        if self.max_frames is not None and (
            isinstance(self.max_frames, bool) or not isinstance(self.max_frames, int) or self.max_frames < 1
        ):
            raise BadRequest(f"max_frames must be an integer >= 1, got {self.max_frames!r}")
        if self.prune_keep is not None:
            check_ratio("prune_keep", self.prune_keep)
        check_deadline(self.deadline_s)


@dataclass(frozen=True)
class MediaOrigin:
    """What media was prepared from, and how it was sampled: enough to decode the same frames again.

    stamps: for each source the (size in bytes, mtime in ns) of its file when it was prepared, None for bytes and data URLs.
    """

    sources: tuple[MediaSource, ...]
    fps: float
    max_frames: int
    limits: MediaLimits
    stamps: tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True, repr=False)
class MediaHandle(ReprMixin):
    """A media prefix that is ready for questions. `media_id` is its content key; `origin` is known where it was prepared."""

    media_id: str
    kind: str
    num_frames: int
    duration_s: float
    visual_tokens: int
    visual_tokens_kept: int
    prefix_tokens: int
    kv_bytes: int
    dense_kv_bytes: int
    reused: bool = False
    tenant: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    origin: MediaOrigin | None = field(default=None, repr=False, compare=False)

    def as_reused(self) -> MediaHandle:
        """The same media for a caller for whom nothing had to be made."""
        return replace(self, reused=True, ms={})


@dataclass(frozen=True)
class Replay:
    """An answer, or its beginning, as it was given before: these tokens are taken instead of sampled ones, and not sent again.

    The events go on behind them as if the turn had never been interrupted; evidence, if wanted, is sent again. brownout: the
    pressure under which the turn started then (`TurnEvent.brownout`, `Usage.brownout`).
    """

    token_ids: tuple[int, ...]
    brownout: float = 0.0

    def __post_init__(self) -> None:
        check_brownout(self.brownout)


@dataclass(frozen=True)
class Turn:
    """One question within a conversation. None = as configured; `deadline_s` counts from arrival.

    retrieve_keep: fraction of the pruned visual KV that the answer attends to; with a mass, the most that it may be.
    retrieve_mass: share of the visual attention that this must hold, 1 = no mass. refresh_every: generated tokens between two
    choices, 0 = chosen once. Evidence is of the choice after the question. after: how many turns the conversation has behind it as
    far as the caller knows, None = unchecked. replay: go on with an answer that was begun elsewhere. owner: as in `PrepareRequest`.
    """

    turn_id: str
    conversation_id: str
    media_id: str
    question: str
    sampling: SamplingParams = SamplingParams()
    retrieve_keep: float | None = None
    retrieve_mass: float | None = None
    refresh_every: int | None = None
    want_evidence: bool = False
    deadline_s: float | None = None
    tenant: str = ""
    after: int | None = None
    replay: Replay | None = None
    owner: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise BadRequest(f"question must be non-empty text, got {self.question!r}")
        try:
            self.question.encode()
        except UnicodeEncodeError as error:
            alone = f"{self.question[error.start]!r}, half of a surrogate pair"
            raise BadRequest(f"question must be text in UTF-8; character {error.start} is {alone}") from None
        if self.retrieve_keep is not None:
            check_ratio("retrieve_keep", self.retrieve_keep)
        if self.retrieve_mass is not None:
            check_ratio("retrieve_mass", self.retrieve_mass)
        every = self.refresh_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 0):
            raise BadRequest(f"refresh_every must be an integer >= 0 (0 = never), got {every!r}")
        check_deadline(self.deadline_s)


def check_size(turn: Turn, config: EngineConfig) -> None:
    """Raise BadRequest unless everything about a turn that costs work is within the configuration's bounds."""
    num_bytes = len(turn.question.encode())
    if num_bytes > config.max_question_bytes:
        raise BadRequest(f"question must have at most max_question_bytes={config.max_question_bytes} bytes, got {num_bytes}")
    max_tokens = turn.sampling.max_tokens
    if max_tokens > config.max_answer_tokens:
        raise BadRequest(f"max_tokens must be in [1, max_answer_tokens={config.max_answer_tokens}], got {max_tokens}")
    if turn.replay is not None and len(turn.replay.token_ids) > max_tokens:
        raise BadRequest(f"said_token_ids must hold at most max_tokens={max_tokens} tokens, got {len(turn.replay.token_ids)}")


@dataclass(frozen=True)
class TurnEvent:
    """One event of a turn, in this order: accepted, token (many), evidence (if wanted), done.

    accepted: `conversation_id`, under which the conversation goes on; done repeats it, for it may have moved meanwhile, and a
    client that resumes on another stream yields `accepted` again where it has. token: `index` of the first new token,
    `token_ids`, the whole characters that they completed in `text`, and the `brownout` under which the turn started. evidence:
    `evidence`. done: `finish_reason`, `usage` and the `text` held back until now, if any.
    """

    kind: Literal["accepted", "token", "evidence", "done"]
    turn_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    text: str = ""
    evidence: Evidence = Evidence()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    conversation_id: str = ""
    brownout: float = 0.0


@dataclass(frozen=True)
class TurnRecord:
    """A finished turn as it can be replayed: the question, the tokens of the answer, and the brownout under which it started."""

    turn: Turn
    token_ids: tuple[int, ...]
    brownout: float = 0.0


@dataclass(frozen=True, repr=False)
class Answer(ReprMixin):
    """A whole answer: the events of a turn put together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    evidence: Evidence
    usage: Usage

    @property
    def timeline(self) -> dict[str, float]:
        """Milliseconds by stage: queue, question, retrieve, ttft, step (mean per token), total, and preempted if it was."""
        return self.usage.ms

    @classmethod
    def from_events(cls, events: Sequence[TurnEvent]) -> Answer:
        """The answer that the events of a finished turn make."""
        last = events[-1]
        assert last.kind == "done" and last.finish_reason is not None and last.usage is not None
        return cls(
            text="".join(e.text for e in events),
            token_ids=tuple(t for e in events for t in e.token_ids),
            finish_reason=last.finish_reason,
            evidence=next((e.evidence for e in events if e.kind == "evidence"), Evidence()),
            usage=last.usage,
        )

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("text", self.text), ("finish_reason", str(self.finish_reason)), ("num_tokens", len(self.token_ids)))
        if places := self.evidence.places():
            yield "looked_at", places
        if "total" in self.timeline:
            yield "total_ms", self.timeline["total"]


def with_defaults(params: SamplingParams | None = None, **overrides: Any) -> SamplingParams:
    """`params` (or the defaults) with the given fields replaced; an unknown field is a BadRequest."""
    try:
        return replace(params or SamplingParams(), **overrides)
    except TypeError as error:
        legal = ", ".join(SamplingParams.__dataclass_fields__)
        raise BadRequest(f"unknown sampling parameter in {sorted(overrides)}; legal: {legal}") from error
