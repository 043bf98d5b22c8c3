"""The engines under measurement: one model, one variant of sparsity, driven by hand so that stages can be timed apart.

Answers have a fixed number of tokens: `endless` hides the end-of-turn token from the engine. Batches hold conversations on
different media prefixes, each in memory of its own, so that a step reads as many KV bytes as it would for different videos; the
prefixes are copies of one, because what they say does not change the time. On a GPU every stage of a prefix waits for what it
started, so that its time is its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.lib.flop_counts import TextShape, Work
from benchmarks.lib.stopwatch import Times, once_ms
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, SamplingParams, Timeline, Turn, TurnEvent, Usage
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.media import Media
from sparsevila_cluster.models import Model

QUESTION = "What happens in this clip, and when?"
NEXT_QUESTION = "And what comes after that?"

DENSE = {"prune": "keep_all", "retrieve": "retrieve_all"}
SPARSE = {"prune": "salience", "prune_keep": 0.25, "retrieve": "query_topk", "retrieve_keep": 0.10}
VARIANTS: dict[str, dict[str, Any]] = {"dense": DENSE, "sparse": SPARSE}

_LONG_S = 1e6
_SPARE_ROWS = 4096


@contextmanager
def endless(model: Model) -> Iterator[None]:
    """No token ends an answer."""
    ends = model.chat.eos_ids
    model.chat.eos_ids = frozenset()
    try:
        yield
    finally:
        model.chat.eos_ids = ends


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _DeviceTimeline(Timeline):
    """A timeline whose moments are those of the device."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device

    def mark(self, name: str, at_s: float | None = None) -> None:
        synchronize(self._device)
        super().mark(name, at_s)


@dataclass(frozen=True)
class Session:
    """One media and two turns on it: milliseconds by stage, the answer's tokens, and what was kept."""

    ms: dict[str, float]
    tokens: tuple[int, ...]
    prefix: MediaPrefix
    usage: Usage


class EnginePair:
    """A prefill engine and a decode engine of one variant, with room for `num_prefixes` of `prefix_rows` rows.

    matrix_width: bytes per weight of the text layers' matrices, 0 for those of the model's dtype; `knobs` are further fields of the
    engines' config.
    """

    def __init__(
        self, model: Model, variant: str, prefix_rows: int, num_prefixes: int = 1, matrix_width: float = 0.0, **knobs: Any
    ):
        row_bytes = model.spec.bytes_per_token
        self.model, self.variant = model, variant
        self.shape = TextShape.of(model.config, model.spec.dtype.itemsize, matrix_width)
        self.config = build_config(
            **VARIANTS[variant],
            # As transformers places text after a video, so that its tokens can be compared with ours.
            video_text_pos="hf5",
            prefix_bytes=num_prefixes * prefix_rows * row_bytes,
            turn_bytes=(num_prefixes * (prefix_rows + _SPARE_ROWS)) * row_bytes,
            turn_timeout_s=_LONG_S,
            prepare_timeout_s=_LONG_S,
            **knobs,
        )
        self.prefill = PrefillEngine(model, self.config)
        self.decode = DecodeEngine(model, self.config)
        self._names = map(str, itertools.count())
        self._conversations: set[str] = set()

    def prepare(self, media: Media) -> tuple[MediaPrefix, dict[str, float]]:
        """A published media prefix, and the milliseconds of its stages."""
        preparation = Preparation(PrepareRequest((MediaSource(b""),)), timeline=_DeviceTimeline(self.model.device))
        prefix = self.prefill.prefill(preparation, [media], next(self._names), self.decode.prefixes.reserve)
        return self.decode.prefixes.publish(prefix), preparation.stage_ms()

    def submit(self, prefix: MediaPrefix, conversation: str, question: str, num_tokens: int) -> list[TurnEvent | Exception]:
        """Queue a turn; the list fills as it runs."""
        events: list[TurnEvent | Exception] = []
        self._conversations.add(conversation)
        sampling = SamplingParams(max_tokens=num_tokens)
        self.decode.submit(Turn(next(self._names), conversation, prefix.key, question, sampling), events.append)
        return events

    def answer(self, prefix: MediaPrefix, conversation: str, question: str, num_tokens: int) -> tuple[Usage, tuple[int, ...]]:
        events = self.submit(prefix, conversation, question, num_tokens)
        while not self.decode.idle:
            self.decode.step()
        told = []
        for event in events:
            if isinstance(event, Exception):
                raise event
            told.append(event)
        whole = Answer.from_events(told)
        return whole.usage, whole.token_ids

    def run_session(self, media: Media, num_tokens: int) -> Session:
        """From frames in memory to a whole answer, then a second question. What earlier sessions left behind is dropped first."""
        self.forget()
        prefix, ms = self.prepare(media)
        conversation = next(self._names)
        usage, tokens = self.answer(prefix, conversation, QUESTION, num_tokens)
        again, _ = self.answer(prefix, conversation, NEXT_QUESTION, 2)
        media_ms = sum(ms.values())
        told = {
            "patchify+encode": ms["encode"],
            "prune": ms["prune"],
            "prefill": ms["prefill"],
            "prune+prefill": ms["prune"] + ms["prefill"],
            "question": usage.ms["question"],
            "retrieve+pack": usage.ms["retrieve"],
            "first token, cold": media_ms + usage.ms["ttft"],
            "first token, turn 2": again.ms["ttft"],
            "end to end": media_ms + usage.ms["total"],
        }
        return Session(told, tokens, prefix, usage)

    def fill(self, prefix: MediaPrefix, batch: int, num_tokens: int) -> None:
        """`batch` conversations on copies of `prefix`, their questions prefilled, ready to step."""
        store = self.decode.prefixes
        for _ in range(batch):
            metadata = replace(prefix.metadata, key=next(self._names))
            copy = replace(prefix, metadata=metadata, extent=store.reserve(prefix.length))
            for layer in range(self.model.spec.num_layers):
                for target, source in zip(copy.extent.rows(layer), prefix.extent.rows(layer), strict=True):
                    target.copy_(source)
            self.submit(store.publish(copy), copy.key, QUESTION, num_tokens)
        while any(turn.phase != "decode" for turn in self.decode.turns.values()):
            self.decode.step()
        assert len(self.decode.turns) == batch, "a turn failed"

    def forget(self, keep: MediaPrefix | None = None) -> None:
        """Abort what runs; drop all conversations, and all prefixes but `keep`."""
        for turn_id in list(self.decode.turns):
            self.decode.abort(turn_id)
        for conversation in self._conversations:
            self.decode.close_conversation(conversation)
        self._conversations.clear()
        for prefix in list(self.decode.prefixes):
            if prefix is not keep:
                self.decode.prefixes.remove(prefix.key)
        self.decode.check_integrity()

    # ---- what the stages must do -------------------------------------------------------------------------------------------

    def work(self, session: Session) -> dict[str, Work]:
        """Per stage of the text decoder, for the prefix and question of `session`."""
        length = session.prefix.length
        rows = session.usage.prompt_tokens - length
        work = {"prefill": self.shape.prefill(length), "question": self.shape.question(rows, length)}
        work["prune+prefill"] = work["prefill"]
        return work

    def step_work(self, session: Session, batch: int, num_tokens: int) -> Work:
        """One step over `batch` such turns, halfway through an answer of `num_tokens`."""
        prefix, usage = session.prefix, session.usage
        packed = prefix.length - prefix.num_kept + usage.visual_tokens_retrieved
        tail = usage.prompt_tokens - prefix.length + num_tokens // 2
        return self.shape.step(batch, packed + tail)


def time_round(pairs: dict[str, EnginePair], times: dict[str, Times], block: int) -> None:
    """`block` timed steps of each filled pair. The step before them warms the processor's caches and is left out."""
    for name, pair in pairs.items():
        pair.decode.step()
        for _ in range(block):
            times[name].add(once_ms(pair.decode.step))
