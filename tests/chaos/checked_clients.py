"""Clients of a cluster that check what they hear: it must be the tokens of one process that nothing ever happened to."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import SparseVilaError, Unavailable
from sparsevila_cluster.core.protocols import Pipeline
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.local_pipeline import LocalPipeline

QUESTIONS = ("what colour is the star?", "where is the circle?", "how many squares are there?", "what is in the first frame?")
NUM_TOKENS = 10
DEADLINE_S = 30.0


@dataclass(frozen=True)
class CheckedClip:
    """A clip, its content key, and the tokens of the answers to all questions, asked one after the other."""

    path: Path
    media_id: str
    answers: tuple[tuple[int, ...], ...]

    @property
    def request(self) -> PrepareRequest:
        return request_of(self.path)


def request_of(path: Path) -> PrepareRequest:
    return PrepareRequest((MediaSource(str(path)),), deadline_s=DEADLINE_S)


def turn_of(media_id: str, question: str, conversation_id: str, deadline_s: float = DEADLINE_S) -> Turn:
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    return Turn(uuid.uuid4().hex, conversation_id, media_id, question, sampling, deadline_s=deadline_s)


async def checked_clip(path: Path, config: ClusterConfig) -> CheckedClip:
    """What a local pipeline makes of a clip."""
    pipeline = LocalPipeline(config.engine, secret=config.secret)
    try:
        handle = await pipeline.prepare(request_of(path))
        answers = []
        for question in QUESTIONS:
            turn = turn_of(handle.media_id, question, "truth")
            answers.append(tuple([token async for event in pipeline.ask(turn) for token in event.token_ids]))
        return CheckedClip(path, handle.media_id, tuple(answers))
    finally:
        await pipeline.close()


class Client:
    """One conversation about one clip. Asks its questions in order, and asserts that every answer is the right one."""

    def __init__(self, pipeline: Pipeline, clip: CheckedClip):
        self.pipeline, self.clip = pipeline, clip
        self.conversation_id = ""
        self.num_answers = 0
        self.heard_s: list[float] = []
        self.history: list[str] = []

    def next_turn(self, deadline_s: float = DEADLINE_S) -> Turn:
        return turn_of(self.clip.media_id, QUESTIONS[self.num_answers], self.conversation_id, deadline_s)

    async def ask(
        self, turn: Turn | None = None, heard: Callable[[int], None] = lambda index: None, leave_at: int | None = None
    ) -> None:
        """Asks the next question. heard: called with the index of every token. leave_at: stop listening at this token.

        Raises what the pipeline raises.
        """
        turn = turn or self.next_turn()
        due, tokens, ended = self.clip.answers[self.num_answers], list[int](), False
        self.heard_s = []
        self.history.append(f"{turn.turn_id[:6]} at {self.num_answers}")
        async with aclosing(self.pipeline.ask(turn)) as events:
            async for event in events:
                self.heard_s.append(time.monotonic())
                if event.kind == "accepted":
                    self.conversation_id = event.conversation_id
                if event.kind == "token":
                    assert event.index == len(tokens), f"token {event.index} came instead of {len(tokens)}"
                    tokens += event.token_ids
                    assert tuple(tokens) == due[: len(tokens)], f"a wrong token: {tokens}, not {due}: {self.history}"
                    heard(event.index)
                    if event.index == leave_at:
                        self.history.append(f"left at {leave_at}")
                        return
                if event.kind == "done":
                    self.conversation_id, ended = event.conversation_id, True
        assert ended and tuple(tokens) == due, f"the answer is {tokens}, not {due}"
        self.num_answers += 1

    async def close(self) -> None:
        if self.conversation_id:
            await self.pipeline.close_conversation(self.conversation_id)
        self.forget()

    def forget(self) -> None:
        """The next question begins a new conversation."""
        self.conversation_id, self.num_answers, self.history = "", 0, []


class Bystander:
    """A client that keeps asking about another clip, conversation after conversation, and must not notice anything."""

    def __init__(self, pipeline: Pipeline, clip: CheckedClip):
        self._client = Client(pipeline, clip)
        self._over = False
        self._left: list[str] = []
        self.num_answers = 0
        self.slowest_s = 0.0
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while not self._over:
            if self._client.num_answers == len(QUESTIONS):
                await self._close()
            begun_s = time.monotonic()
            await self._client.ask()
            self.slowest_s = max(self.slowest_s, time.monotonic() - begun_s)
            self.num_answers += 1
            await asyncio.sleep(0.02)
        await self._close()
        for conversation_id in self._left:
            await self._client.pipeline.close_conversation(conversation_id)

    async def _close(self) -> None:
        """Without the directory a conversation cannot be closed: later, then."""
        conversation_id = self._client.conversation_id
        try:
            await self._client.close()
        except Unavailable:
            self._left.append(conversation_id)
            self._client.forget()

    async def hears_more(self, num: int = 1) -> None:
        """Wait for `num` more answers. Raises what the bystander was told."""
        due = self.num_answers + num
        while self.num_answers < due:
            if self._task.done():
                self._task.result()
                raise AssertionError("the bystander stopped asking")
            await asyncio.sleep(0.01)

    async def leaves(self) -> None:
        self._over = True
        await self._task

    async def drop(self) -> None:
        """Of a case that failed: stop, and keep no conversation. Raises what the pipeline raises."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._client.conversation_id:
            await self._close()
        for conversation_id in self._left:
            await self._client.pipeline.close_conversation(conversation_id)


async def error_of(work: asyncio.Task[None]) -> SparseVilaError | None:
    """The error of ours that a task ended with, None if it went well. Anything else is raised."""
    try:
        await work
    except SparseVilaError as error:
        return error
    return None
