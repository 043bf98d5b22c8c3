"""Conversations for Python users, blocking and in an event loop, answered by an engine in this process or by a server.

ask / stream -> Turn -> backend.turn_events -> accepted, token*, evidence?, done -> Answer, kept in `turns`
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, Unpack

from sparsevila_cluster.core.call_options import AskOptions, to_turn
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.errors import NotFound
from sparsevila_cluster.core.event_loop_thread import EventLoopThread
from sparsevila_cluster.core.evidence import Evidence
from sparsevila_cluster.core.requests import Answer, MediaHandle, Turn, TurnEvent

if TYPE_CHECKING:
    from PIL import Image

    # One picture of where (question, answer) pairs on the same media looked.
    DrawTurns = Callable[[Sequence[tuple[str, Answer]]], Image.Image]

# How a conversation names its media: always by the handle, or also by the media id.
M = TypeVar("M", bound=MediaHandle | str)


class ConversationBackend(Protocol):
    """What answers the questions of a conversation."""

    def turn_events(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn, within `turn_limit_s`. Closing the generator early aborts the turn.

        A turn without a conversation id begins a conversation; the events say under which id it goes on.
        """
        ...

    async def close_conversation(self, conversation_id: str) -> None:
        """Free the KV of a conversation, within `call_limit_s`."""
        ...

    def turn_limit_s(self, timeout_s: float | None) -> float:
        """The longest that a turn with this deadline (None: the default one) lets its caller wait, in seconds."""
        ...

    def call_limit_s(self) -> float:
        """The longest that any other call lets its caller wait, in seconds."""
        ...


class AsyncChat(Generic[M]):
    """One conversation: each question sees the media and all earlier questions and answers.

    media: what it is about, as it was given. conversation_id: "" until the first question is accepted, where the backend names
    conversations. turns: (question, answer) of each finished turn.
    """

    def __init__(
        self,
        backend: ConversationBackend,
        media: M,
        conversation_id: str = "",
        draw: DrawTurns | None = None,
    ):
        """media: its handle or its media id. draw: draws turns on the frames of the media, where these can be read again."""
        self._backend = backend
        self._draw = draw
        self._first_question = asyncio.Lock()
        self.media = media
        self.conversation_id = conversation_id
        self.turns: list[tuple[str, Answer]] = []

    async def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """The whole answer.

        Options: the fields of SamplingParams (max_tokens, temperature, top_p, top_k, seed, stop), `retrieve_keep`, `retrieve_mass`
        and `refresh_every` for this turn, `evidence=False` to save its cost, `timeout_s`.

        Raises:
            BadRequest, TooLarge, NotFound, QueueFull, DeadlineExceeded, Internal. The conversation is then as it was before.
        """
        turn = self._turn(question, options)
        return self._keep(turn, [event async for event in self._events(turn)])

    def stream(self, question: str, **options: Unpack[AskOptions]) -> AsyncGenerator[str, None]:
        """The answer's text in pieces. Options and errors as for `ask`.

        Leaving early aborts the turn and forgets it: at once with `aclose()`, and as soon as nothing refers to the iterator any
        more without. After the last piece the whole answer is the last of `turns`.
        """
        return self._pieces(self._turn(question, options))

    async def show(self) -> Image.Image:
        """One picture of where all turns looked; `evidence.show()` is that of one. Errors as for that."""
        return await asyncio.to_thread(self.draw)

    def draw(self) -> Image.Image:
        """What `show` returns, drawn in the calling thread."""
        if self._draw is None:
            raise NotFound("this conversation cannot read its media again: it was prepared elsewhere")
        return self._draw(self.turns)

    async def close(self) -> None:
        """Free the conversation's KV; its media stays."""
        if self.conversation_id:
            await self._backend.close_conversation(self.conversation_id)

    def turn_limit_s(self, options: AskOptions) -> float:
        """The longest that a question with these options lets its caller wait, in seconds."""
        return self._backend.turn_limit_s(options.get("timeout_s"))

    def close_limit_s(self) -> float:
        """The longest that `close` lets its caller wait, in seconds."""
        return self._backend.call_limit_s()

    def _turn(self, question: str, options: AskOptions) -> Turn:
        media_id = self.media if isinstance(self.media, str) else self.media.media_id
        return to_turn(self.conversation_id, media_id, question, options)

    async def _pieces(self, turn: Turn) -> AsyncGenerator[str, None]:
        events = []
        async with aclosing(self._events(turn)) as arriving:
            async for event in arriving:
                events.append(event)
                if event.text:
                    yield event.text
        self._keep(turn, events)

    async def _events(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        with ExitStack() as first:
            if not self.conversation_id:  # questions that come before the first one was accepted belong to the same conversation
                limit_s = self._backend.turn_limit_s(turn.deadline_s)
                await wait_within(self._first_question.acquire(), limit_s, "the first question of the conversation")
                first.callback(self._first_question.release)
            turn = replace(turn, conversation_id=self.conversation_id)
            async with aclosing(self._backend.turn_events(turn)) as events:
                async for event in events:
                    self.conversation_id = event.conversation_id or self.conversation_id
                    if self.conversation_id:
                        first.close()
                    yield event

    def _keep(self, turn: Turn, events: Sequence[TurnEvent]) -> Answer:
        answer = Answer.from_events(events)
        if self._draw is not None:
            answer = drawable(answer, turn.question, self._draw)
        self.turns.append((turn.question, answer))
        return answer


class Chat(Generic[M]):
    """`AsyncChat` for callers who block."""

    def __init__(self, chat: AsyncChat[M], thread: EventLoopThread):
        self._chat = chat
        self._thread = thread
        self.media = chat.media
        self.turns = chat.turns

    @property
    def conversation_id(self) -> str:
        """How the backend names the conversation; "" before the first question where only the backend can name it."""
        return self._chat.conversation_id

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """The whole answer. Options and errors as for `AsyncChat.ask`."""
        return self._thread.run(self._chat.ask(question, **options), self._chat.turn_limit_s(options))

    def stream(self, question: str, **options: Unpack[AskOptions]) -> Iterator[str]:
        """The answer's text in pieces. Options and errors as for `AsyncChat.ask`.

        Leaving early aborts the turn and forgets it; after the last piece the whole answer is the last of `turns`.
        """
        return self._thread.iterate(self._chat.stream(question, **options), self._chat.turn_limit_s(options))

    def show(self) -> Image.Image:
        """One picture of where all turns looked; `evidence.show()` is that of one. Errors as for that."""
        return self._chat.draw()

    def close(self) -> None:
        """Free the conversation's KV; its media stays."""
        self._thread.run(self._chat.close(), self._chat.close_limit_s())


def drawable(answer: Answer, question: str, draw: DrawTurns) -> Answer:
    """`answer`, whose evidence shows itself with `draw`."""
    return replace(answer, evidence=answer.evidence.drawn_by(partial(_draw_turn, draw, question, answer)))


def _draw_turn(draw: DrawTurns, question: str, answer: Answer, evidence: Evidence) -> Image.Image:
    return draw([(question, replace(answer, evidence=evidence))])
