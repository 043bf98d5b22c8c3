"""Held-out videos and questions, put to the engines as users would: MP4 files, conversations, own earlier answers as history.

seed -> scene -> MP4 file -> prepare -> 8 questions in one conversation -> exact match of each answer's text
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.demo.world import HELD_OUT_STREAM, KINDS, Question, make_questions, make_video, write_mp4
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.models import Model

# The first video's seed. Training watches held-out videos from 0 on and ends with those from 100 000 on; nobody has seen these.
FIRST_SEED = 200_000
NUM_TURNS = 8
MAX_TOKENS = 32
# Kinds whose answers have several words. A one-word answer comes from the question's own rows, which see the whole prefix: only
# these kinds can suffer from retrieval.
SEVERAL_WORDS = ("when", "where", "at", "describe")
SPANS = {"turn 1": range(0, 1), "turns 2-3": range(1, 3), "turns 4+": range(3, NUM_TURNS)}


@dataclass(frozen=True)
class Paper:
    """One video and what is asked about it, in order."""

    path: Path
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Mark:
    paper: int
    turn: int  # 0 for the first question of a conversation
    kind: str
    right: bool
    said: str
    expected: str


@dataclass(frozen=True)
class Score:
    right: int
    total: int

    @classmethod
    def of(cls, marks: Iterable[Mark]) -> Score:
        marked = [mark.right for mark in marks]
        return cls(sum(marked), len(marked))

    @property
    def percent(self) -> float:
        return 100.0 * self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in per cent."""
        if not self.total:
            return 0.0, 100.0
        z, n, p = 1.959964, self.total, self.right / self.total
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return 100 * max(0.0, middle - reach), 100 * min(1.0, middle + reach)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f} ({low:.1f}-{high:.1f})"


def write_papers(folder: Path, num_videos: int, first_seed: int = FIRST_SEED) -> list[Paper]:
    papers = []
    for seed in range(first_seed, first_seed + num_videos):
        scene, frames = make_video(seed, held_out=True)
        path = folder / f"{seed}.mp4"
        write_mp4(frames, path)
        questions = make_questions(scene, np.random.default_rng((HELD_OUT_STREAM, seed, 1)), NUM_TURNS)
        papers.append(Paper(path, tuple(questions)))
    return papers


def sit(
    model: Model,
    papers: Sequence[Paper],
    fields: Mapping[str, Any],
    retrieve_keeps: Sequence[float | None] = (None,),
    *,
    seeds: int = 1,
    num_parallel: int = 16,
) -> list[list[Mark]]:
    """Marks of all papers under config `fields`, once per retrieve_keep (None = the configured one).

    With several seeds, paper i is sat with seed i % seeds: a random policy must not be judged by one draw.
    """
    marks: list[list[Mark]] = [[] for _ in retrieve_keeps]
    for seed in range(seeds):
        mine = [(i, paper) for i, paper in enumerate(papers) if i % seeds == seed]
        found = asyncio.run(_sit(model, mine, {**fields, "seed": seed}, retrieve_keeps, num_parallel))
        for all_of_it, part in zip(marks, found, strict=True):
            all_of_it += part
    return [sorted(marked, key=lambda mark: (mark.paper, mark.turn)) for marked in marks]


async def _sit(
    model: Model,
    papers: Sequence[tuple[int, Paper]],
    fields: Mapping[str, Any],
    retrieve_keeps: Sequence[float | None],
    num_parallel: int,
) -> list[list[Mark]]:
    pipeline = LocalPipeline(build_config(**fields), model)
    gate = asyncio.Semaphore(num_parallel)

    async def one(number: int, paper: Paper, retrieve_keep: float | None) -> list[Mark]:
        async with gate:
            return await _converse(pipeline, number, paper, retrieve_keep)

    try:
        results = []
        for retrieve_keep in retrieve_keeps:
            marked = await asyncio.gather(*(one(number, paper, retrieve_keep) for number, paper in papers))
            results.append([mark for marks in marked for mark in marks])
        return results
    finally:
        await pipeline.close()


async def _converse(pipeline: LocalPipeline, number: int, paper: Paper, retrieve_keep: float | None) -> list[Mark]:
    """One conversation about one video."""
    handle = await pipeline.prepare(PrepareRequest((MediaSource(str(paper.path)),)))
    conversation, marks = uuid.uuid4().hex, []
    for turn, question in enumerate(paper.questions):
        events = pipeline.ask(
            Turn(
                turn_id=uuid.uuid4().hex,
                conversation_id=conversation,
                media_id=handle.media_id,
                question=question.text,
                sampling=SamplingParams(max_tokens=MAX_TOKENS),
                retrieve_keep=retrieve_keep,
            )
        )
        said = Answer.from_events([event async for event in events]).text
        marks.append(Mark(number, turn, question.kind, said == question.answer, said, question.answer))
    await pipeline.close_conversation(conversation)
    return marks


def several_words(marks: Iterable[Mark]) -> list[Mark]:
    return [mark for mark in marks if mark.kind in SEVERAL_WORDS]


def by_kind(marks: Sequence[Mark]) -> dict[str, Score]:
    return {kind: Score.of(mark for mark in marks if mark.kind == kind) for kind in KINDS}


def by_turn(marks: Sequence[Mark]) -> dict[str, Score]:
    return {name: Score.of(mark for mark in marks if mark.turn in turns) for name, turns in SPANS.items()}


def changed(before: Sequence[Mark], after: Sequence[Mark]) -> tuple[int, int]:
    """Answers that were right before and are wrong after, and the other way round; both sat the same papers."""
    pairs = list(zip(before, after, strict=True))
    assert all((a.paper, a.turn) == (b.paper, b.turn) for a, b in pairs)
    return sum(a.right and not b.right for a, b in pairs), sum(b.right and not a.right for a, b in pairs)
