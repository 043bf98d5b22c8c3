"""The slow, obvious run of a turn: alone, in an engine that has room for everything.

Two runs of one turn agree in tokens, text and every logit up to float error. Where they do not, the run alone tells whether the
decision hung on a float: two scores at the cut of a retrieval, or two tokens (sampling ranks them all), closer than rounding. Such
a tie is counted, not forgiven silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.requests import Turn, TurnEvent, Usage, kept_count
from sparsevila_cluster.engine import decode_engine, turn_retrieval
from sparsevila_cluster.engine.turn import RunningTurn
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models.adapter import Model
from tests.checkpoints.transformers_oracle import Bench, random_media

ATOL = 1e-4
TIE = 1e-5


@contextmanager
def recorded_logits() -> Iterator[dict[object, list[torch.Tensor]]]:
    """Records, by the turn's sampler, the logits f32 [V] that each token came from, in whatever batch it was."""
    heard: dict[object, list[torch.Tensor]] = {}
    plain = decode_engine.sample

    def sample(logits, samplers, argmax_ids=None):
        for sampler, row in zip(samplers, logits, strict=True):
            heard.setdefault(sampler, []).append(row.clone())
        return plain(logits, samplers, argmax_ids)

    decode_engine.sample = sample
    try:
        yield heard
    finally:
        decode_engine.sample = plain


@contextmanager
def recorded_gaps() -> Iterator[list[float]]:
    """Records how clear each choice of visual KV was: the smallest relative distance of anything from the other side of a cut."""
    gaps: list[float] = []
    plain = turn_retrieval.TurnRetrieval.choose

    def choose(self, *args):
        scores = plain(self, *args)
        ranked, count = scores.double().sort(-1, descending=True).values, self.num_retrieved
        if 0 < count < ranked.shape[1]:
            gaps.append(float(((ranked[:, count - 1] - ranked[:, count]) / ranked[:, count - 1]).min()))
        if self._budget.mass is not None:
            held = ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)
            gaps.append(float((held - self._budget.mass).abs().min()))
        return scores

    turn_retrieval.TurnRetrieval.choose = choose
    try:
        yield gaps
    finally:
        turn_retrieval.TurnRetrieval.choose = plain


@dataclass
class TurnOutput:
    """What came of one turn."""

    events: list[TurnEvent | Exception]
    logits: list[torch.Tensor]
    min_gap: float = 1.0

    @property
    def tokens(self) -> list[int]:
        return [t for e in self.events for t in e.token_ids]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events)

    @property
    def evidence(self) -> tuple:
        return next((e.evidence for e in self.events if e.kind == "evidence"), ())


class ReferenceEngine:
    """An engine with the same model and sparsity as another, and room for everything; one turn at a time."""

    def __init__(self, model: Model, heard: dict[object, list[torch.Tensor]], **fields):
        roomy = {"prefix_bytes": 2**26, "turn_bytes": 2**26, "max_batch": 1, "max_conversations": 10**6}
        self.bench = Bench(model, build_config(model="unused", **{**fields, **roomy}))
        self.engine, self._heard = self.bench.decode, heard

    def prepare(self, key: str, kind: str, frames: int, height: int, width: int) -> MediaPrefix:
        return self.bench.prefix(random_media(kind, frames, height, width, seed=frames + height), key=key)

    def copy_of(self, key: str, reserve) -> MediaPrefix:
        """The same media prefix in an extent of another engine."""
        prefix = self.engine.prefixes.get(key)
        copy = replace(prefix, extent=reserve(prefix.length))
        for layer in range(prefix.spec.num_layers):
            for target, source in zip(copy.extent.rows(layer), prefix.extent.rows(layer), strict=True):
                target.copy_(source)
        return copy

    def answer(self, running: RunningTurn, conversation_id: str) -> TurnOutput:
        """The same turn alone, with the budget that it had there. Of a replay, what follows on it in the answer as a whole."""
        budget = running.retrieval._budget
        turn: Turn = replace(
            running.turn, conversation_id=conversation_id, retrieve_keep=budget.keep, deadline_s=None, replay=None,
            **({"retrieve_mass": budget.mass or 1.0, "refresh_every": budget.refresh_every} if budget.name == "query_topk" else {}),
        )  # fmt: skip
        events: list[TurnEvent | Exception] = []
        self.engine.submit(turn, events.append)
        sampler = self.engine.turns[turn.turn_id].sampler
        with recorded_gaps() as gaps:
            while not self.engine.idle:
                self.engine.step()
        assert not isinstance(events[-1], Exception), f"alone it fails: {events[-1]}"
        start = running.answer.num_known
        events = [event for event in events if event.kind != "token" or event.index >= start]
        return TurnOutput(events, self._heard.pop(sampler, [])[start:], min(gaps, default=1.0))

    def close(self, conversation_id: str) -> None:
        self.engine.close_conversation(conversation_id)


def differences(got: TurnOutput, alone: TurnOutput) -> str | None:
    """None if both runs agree, "tie" if they part where a float decides, else what differs."""
    if got.tokens == alone.tokens:
        assert len(got.logits) == len(alone.logits) == len(got.tokens), "a token without its logits"
        worst = max((float((a - b).abs().max()) for a, b in zip(got.logits, alone.logits, strict=True)), default=0.0)
        if worst < ATOL:
            if got.text != alone.text or got.events[-1].finish_reason != alone.events[-1].finish_reason:
                return f"text {got.text!r}, alone {alone.text!r}"
            return _evidence_difference(got, alone)
        found = f"a logit differs by {worst:.3g}"
    else:
        at = next((i for i, (a, b) in enumerate(zip(got.tokens, alone.tokens, strict=False)) if a != b), None)
        if at is None:
            return f"{len(got.tokens)} tokens, alone {len(alone.tokens)}"
        row = alone.logits[at]
        apart = abs(float(row[got.tokens[at]] - row[alone.tokens[at]]))
        if apart < ATOL and float((got.logits[at] - row).abs().max()) < ATOL:
            return "tie"
        found = f"token {at} is {got.tokens[at]}, alone {alone.tokens[at]}"
    return "tie" if alone.min_gap < TIE else found


def _evidence_difference(got: TurnOutput, alone: TurnOutput) -> str | None:
    for a, b in zip(got.evidence, alone.evidence, strict=True):
        if a.kept != b.kept or abs(a.share - b.share) > 1e-3:
            return f"frame {a.frame} has share {a.share}, alone {b.share}"
    return None


def check_usage(running: RunningTurn, usage: Usage, brownout: float) -> None:
    """What a turn reports of its retrieval, given the level of pressure that it started under."""
    retrieval, kept = running.retrieval, usage.visual_tokens_kept
    wanted, budget, floor = retrieval._wanted, retrieval._budget, retrieval._sparsity.brownout_floor
    assert abs(budget.keep - (wanted.keep - brownout * max(0.0, wanted.keep - floor))) < 1e-9, f"brownout {brownout}"
    most = kept_count(budget.keep, kept)
    assert usage.visual_tokens_retrieved == most or (budget.mass is not None and 0 < usage.visual_tokens_retrieved < most)
    assert usage.effective_keep == usage.visual_tokens_retrieved / kept
    if budget.mass is None:
        assert usage.degraded == (most < kept_count(wanted.keep, kept))
    assert not usage.degraded or budget.keep < wanted.keep
    assert ("preempted" in usage.ms) == bool(usage.num_preemptions)
