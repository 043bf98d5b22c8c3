"""Questions about videos, put to the engines as users would: files, conversations, own earlier answers as history.

    video file -> prepare -> questions in order -> each answer is right or wrong

Protocols:

    served   one conversation: every turn sees the questions before it and the model's own answers
    paper    rounds on one visual KV: the last round's question and answer are dropped, what it did to the visual KV stays
    single   every question has a prefix of its own, made anew

Pruning that does not know the question makes `paper` and `single` the same; what selects by the first question loses in `paper`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.lib.exam_journal import ExamJournal
from benchmarks.lib.exam_marks import Mark
from benchmarks.lib.exam_questions import Dialogue
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.requests import Answer, MediaHandle, MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.models import Model

MAX_TOKENS = 32

Protocol = Literal["served", "paper", "single"]
PROTOCOLS: tuple[Protocol, ...] = ("served", "paper", "single")


@dataclass(frozen=True)
class Sitting:
    """One configuration and the values of retrieve_keep to ask with (None: the configured one), each under a name."""

    fields: Mapping[str, Any]
    names: Mapping[str, float | None]
    seeds: int = 1


def sit(
    model: Model,
    dialogues: Sequence[Dialogue],
    fields: Mapping[str, Any],
    retrieve_keeps: Sequence[float | None] = (None,),
    *,
    seeds: int = 1,
    protocol: Protocol = "served",
    max_tokens: int | None = None,
    num_parallel: int = 16,
    journal: ExamJournal | None = None,
) -> list[list[Mark]]:
    """Marks of all dialogues under config `fields`, once per retrieve_keep (None = the configured one).

    With several seeds, dialogue i is held with seed i % seeds: a random policy must not be judged by one draw.
    """
    marks: list[list[Mark]] = [[] for _ in retrieve_keeps]
    journal = ExamJournal(None, {}) if journal is None else journal
    for seed in range(seeds):
        mine = [(i, dialogue) for i, dialogue in enumerate(dialogues) if i % seeds == seed]
        exam = _Exam(model, {**fields, "seed": seed}, protocol, max_tokens or MAX_TOKENS, journal)
        found = asyncio.run(exam.sit(mine, retrieve_keeps, num_parallel))
        for all_of_it, part in zip(marks, found, strict=True):
            all_of_it += part
    return [sorted(marked, key=lambda mark: (mark.dialogue, mark.turn)) for marked in marks]


class _Exam:
    def __init__(self, model: Model, fields: Mapping[str, Any], protocol: Protocol, max_tokens: int, journal: ExamJournal):
        self._model, self._fields, self._protocol, self._journal = model, fields, protocol, journal
        self._sampling = SamplingParams(max_tokens=max_tokens)

    async def sit(
        self, dialogues: Sequence[tuple[int, Dialogue]], retrieve_keeps: Sequence[float | None], num_parallel: int
    ) -> list[list[Mark]]:
        pipeline = LocalPipeline(build_config(**self._fields), self._model)
        gate = asyncio.Semaphore(1 if self._protocol == "single" else num_parallel)

        async def one(number: int, dialogue: Dialogue, retrieve_keep: float | None) -> list[Mark]:
            setting = {**self._fields, "asked_keep": retrieve_keep}
            if (marks := self._journal.marks(setting, number)) is None:
                async with gate:
                    marks = await self._hold(pipeline, number, dialogue, retrieve_keep)
                self._journal.keep(setting, number, marks)
            return marks

        try:
            results = []
            for retrieve_keep in retrieve_keeps:
                marked = await asyncio.gather(*(one(number, dialogue, retrieve_keep) for number, dialogue in dialogues))
                results.append([mark for marks in marked for mark in marks])
            return results
        finally:
            await pipeline.close()

    async def _hold(self, pipeline: LocalPipeline, number: int, dialogue: Dialogue, retrieve_keep: float | None) -> list[Mark]:
        """One dialogue about one video."""
        marks, conversation, handle = [], uuid.uuid4().hex, await self._prepare(pipeline, dialogue)
        for turn, question in enumerate(dialogue.questions):
            if turn and self._protocol == "single":
                await pipeline.delete_media(handle.media_id)
                handle = await self._prepare(pipeline, dialogue)
            asked = Turn(
                turn_id=uuid.uuid4().hex,
                conversation_id=conversation,
                media_id=handle.media_id,
                question=question.text,
                sampling=self._sampling,
                retrieve_keep=retrieve_keep,
            )
            answer = Answer.from_events([event async for event in pipeline.ask(asked)])
            is_new = not turn or self._protocol == "single"
            prefill_ms = handle.ms.get("prefill") if is_new else None
            marks.append(_marked(number, turn, dialogue, answer, handle, prefill_ms))
            if self._protocol != "served":
                await pipeline.close_conversation(conversation)
                conversation = uuid.uuid4().hex
        await pipeline.close_conversation(conversation)
        return marks

    async def _prepare(self, pipeline: LocalPipeline, dialogue: Dialogue) -> MediaHandle:
        return await pipeline.prepare(PrepareRequest((MediaSource(str(dialogue.video)),)))


def _marked(number: int, turn: int, dialogue: Dialogue, answer: Answer, handle: MediaHandle, prefill_ms: float | None) -> Mark:
    usage, question = answer.usage, dialogue.questions[turn]
    return Mark(
        number,
        turn,
        question.kind,
        question.is_right(answer.text),
        answer.text,
        question.answer,
        group=question.group,
        source=dialogue.source,
        video_s=round(handle.duration_s, 3),
        kv_bytes=handle.kv_bytes,
        visual=usage.visual_tokens,
        kept=usage.visual_tokens_kept,
        retrieved=usage.visual_tokens_retrieved,
        prefill_ms=prefill_ms,
        question_ms=usage.ms.get("question"),
        step_ms=usage.ms.get("step"),
    )
