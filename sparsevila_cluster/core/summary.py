"""The trip of one media through the system in a few numbers: as one line for people, as JSON for machines.

Knows: media handles, answers and configuration as data. Does not know: engines, tensors, terminals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.evidence import FrameEvidence
from sparsevila_cluster.core.requests import Answer, MediaHandle

PREPARE_STAGES = ("decode", "encode", "prune", "prefill", "transfer")
TURN_STAGES = ("question", "retrieve")


def make_trip(media: MediaHandle, answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts, bytes and milliseconds of one media and the turns on it.

    `visual_tokens_retrieved` is per layer, of the last turn. `ms` holds the media's stages, the mean per turn of
    question and retrieve, and the mean per token of step; 0 is a stage that did not happen (reused media, one process,
    answers of one token).
    """
    ms = {stage: media.ms.get(stage, 0.0) for stage in PREPARE_STAGES}
    for stage in TURN_STAGES:
        ms[stage] = _mean([(answer.timeline.get(stage, 0.0), 1) for answer in answers])
    # The first token comes from the question's prefill, so an answer of n tokens is n - 1 steps.
    steps = [(a.timeline["step"], a.usage.completion_tokens - 1) for a in answers if "step" in a.timeline]
    ms["step"] = _mean(steps)
    return {
        "num_frames": media.num_frames,
        "visual_tokens": media.visual_tokens,
        "visual_tokens_kept": media.visual_tokens_kept,
        "visual_tokens_retrieved": answers[-1].usage.visual_tokens_retrieved if answers else 0,
        "kv_bytes": media.kv_bytes,
        "dense_kv_bytes": media.dense_kv_bytes,
        "ms": {stage: round(spent, 3) for stage, spent in ms.items()},
    }


def trip_card(trip: dict[str, Any], answer: str | None) -> str:
    """`64 frames -> 4096 visual tokens -> 1024 kept -> 12.6 MB KV -> 102 packed -> "a red star"`; None: nothing was asked."""
    stops = [
        _count(trip["num_frames"], "frame"),
        _count(trip["visual_tokens"], "visual token"),
        f"{trip['visual_tokens_kept']} kept",
        f"{megabytes(trip['kv_bytes'])} KV",
    ]
    if trip["ms"]["transfer"]:
        stops.append(f"{trip['ms']['transfer']:.0f} ms wire")
    if trip["visual_tokens_retrieved"]:
        stops.append(f"{trip['visual_tokens_retrieved']} packed")
    if answer is not None:
        stops.append(f'"{" ".join(answer.split())}"')
    return " -> ".join(stops)


def answer_document(question: str, answer: Answer) -> dict[str, Any]:
    """One turn as JSON. `evidence` holds every frame that was looked at, the most looked-at first."""
    several = any(one.media for one in answer.evidence)
    return {
        "question": question,
        "answer": answer.text,
        "num_tokens": len(answer.token_ids),
        "finish_reason": str(answer.finish_reason),
        "evidence": [_frame_document(one, several) for one in answer.evidence.top()],
        "ms": answer.timeline,
    }


def _frame_document(one: FrameEvidence, several: bool) -> dict[str, Any]:
    """A frame of `several` media also says of which: the index among them, in the order in which they were given."""
    where = {"media": one.media} if several else {}
    return {**where, "frame": one.frame, "time_s": round(one.time_s, 3), "share": round(one.share, 6)}


def ask_document(config: EngineConfig, media: MediaHandle, turns: Sequence[tuple[str, Answer]]) -> dict[str, Any]:
    """The one JSON document of `sparsevila ask --json`."""
    return talk_document(config.model, resolved_sparsity(config, media.kind), media, turns)


def talk_document(model: str, sparsity: dict[str, Any], media: MediaHandle, turns: Sequence[tuple[str, Answer]]) -> dict[str, Any]:
    """One conversation as JSON, whoever answered."""
    return {
        "answers": [answer_document(question, answer) for question, answer in turns],
        "trip": make_trip(media, [answer for _, answer in turns]),
        "model": model,
        "sparsity": sparsity,
    }


def resolved_sparsity(config: EngineConfig, kind: str) -> dict[str, Any]:
    """The sparsity that media of this kind get, with every default filled in. Ratios are the fraction kept."""
    return config.sparsity.resolved(kind).model_dump()


def megabytes(num_bytes: int) -> str:
    """`263 MB`, `12.6 MB`, `0.26 MB`: decimal megabytes."""
    size = num_bytes / 1e6
    digits = f"{size:.0f}" if size >= 100 else f"{size:.1f}" if size >= 1 else f"{size:.2g}"
    return f"{digits} MB"


def _count(num: int, noun: str) -> str:
    return f"{num} {noun}{'' if num == 1 else 's'}"


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    total = sum(weight for _, weight in weighted)
    return sum(spent * weight for spent, weight in weighted) / total if total else 0.0
