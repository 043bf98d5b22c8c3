"""The simple face for Python users: prepare a video, hold a conversation about it. Blocking calls over a LocalPipeline.

Knows: how to run the asynchronous pipeline behind blocking calls. Does not know: engines, tensors or media formats.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import closing
from os import PathLike, fspath
from typing import Any, TypeVar

from sparsevila_cluster.config import EngineConfig, build_config
from sparsevila_cluster.errors import BadRequest
from sparsevila_cluster.pipeline import LocalPipeline, Pipeline
from sparsevila_cluster.prefill_engine import Progress
from sparsevila_cluster.request import Answer, MediaHandle, MediaSource, PrepareRequest, Turn, TurnEvent, with_defaults

R = TypeVar("R")
Source = str | bytes | PathLike[str]


class VideoQA:
    """Questions about videos and images.

        qa = VideoQA("path/to/checkpoint", prune_keep=0.25, retrieve_keep=0.10)
        chat = qa.conversation(qa.prepare("clip.mp4"))
        print(chat.ask("What happens?").text)

    Keyword arguments are config fields (`EngineConfig`, and the fields of its `sparsity` and `limits`). `VideoQA("demo")` is the
    bundled model. `prune="keep_all", retrieve="retrieve_all"` is dense. Use it as a context manager, or call `close`.
    Methods may be called from several threads.

    Raises:
        BadConfig, BadCheckpoint.
    """

    def __init__(self, model: str | PathLike[str] | None = None, *, config: EngineConfig | None = None, **fields: Any):
        if config is None:
            config = build_config(**({} if model is None else {"model": fspath(model)}), **fields)
        elif fields or model is not None:
            raise BadRequest("give either config= or single fields, not both")
        self.config = config
        self._loop = asyncio.new_event_loop()
        self._pipeline: Pipeline | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="video-qa", daemon=True)
        self._thread.start()
        try:
            self._pipeline = self._run(_create(config))
        except BaseException:
            self.close()
            raise

    @property
    def pipeline(self) -> LocalPipeline:
        """The pipeline behind this object. Its coroutines belong to this object's event loop."""
        return self._pipeline

    def prepare(
        self,
        source: Source | Sequence[Source],
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        prune_keep: float | None = None,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> MediaHandle:
        """Decode, encode, prune and prefill a video or image (a path, bytes or data URL), or several as one.

        The same media with the same options is found again without work (`handle.reused`).

        Raises:
            BadMedia, BadRequest, TooLarge, QueueFull, DeadlineExceeded.
        """
        sources = [source] if isinstance(source, (str, bytes, PathLike)) else list(source)
        request = PrepareRequest(
            sources=tuple(MediaSource(s if isinstance(s, bytes) else fspath(s)) for s in sources),
            fps=fps,
            max_frames=max_frames,
            prune_keep=prune_keep,
            deadline_s=timeout_s,
        )
        return self._run(self._pipeline.prepare(request, progress))

    def conversation(self, media: MediaHandle) -> Chat:
        """A new conversation about prepared media."""
        return Chat(self, media)

    def info(self) -> dict[str, Any]:
        """What is resident and running."""
        return self._run(self._pipeline.info())

    def close(self) -> None:
        """Abort what runs and free everything. Idempotent."""
        if self._loop.is_closed():
            return
        if self._pipeline is not None:
            self._run(self._pipeline.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> VideoQA:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, R]) -> R:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _events(self, turn: Turn) -> Iterator[TurnEvent]:
        events = self._pipeline.ask(turn)
        try:
            while (event := self._run(_next(events))) is not None:
                yield event
        finally:
            if not self._loop.is_closed():
                self._run(events.aclose())


class Chat:
    """One conversation: each question sees the video and all earlier questions and answers."""

    def __init__(self, qa: VideoQA, media: MediaHandle):
        self._qa = qa
        self.media = media
        self.conversation_id = uuid.uuid4().hex
        self.turns: list[tuple[str, Answer]] = []

    def ask(self, question: str, **options: Any) -> Answer:
        """The whole answer.

        Options: the fields of SamplingParams (max_tokens, temperature, top_p, top_k, seed, stop), `retrieve_keep`, `retrieve_mass`
        and `refresh_every` for this turn, `evidence=False` to save its cost, `timeout_s`.

        Raises:
            BadRequest, TooLarge, NotFound, QueueFull, DeadlineExceeded, Internal. The conversation is then as it was before.
        """
        events = self._qa._run(_collect(self._qa.pipeline.ask(self._turn(question, options))))
        self.turns.append((question, Answer.from_events(events)))
        return self.turns[-1][1]

    def stream(self, question: str, **options: Any) -> Iterator[str]:
        """The answer's text in pieces. Options and errors as for `ask`. Leaving early aborts the turn and forgets it; after the
        last piece the whole answer is the last of `turns`."""
        events = []
        with closing(self._qa._events(self._turn(question, options))) as arriving:
            for event in arriving:
                events.append(event)
                if event.text:
                    yield event.text
        self.turns.append((question, Answer.from_events(events)))

    def close(self) -> None:
        """Free the conversation's KV; its media stays."""
        self._qa._run(self._qa.pipeline.close_conversation(self.conversation_id))

    def _turn(self, question: str, options: dict[str, Any]) -> Turn:
        retrieval = {name: options.pop(name, None) for name in ("retrieve_keep", "retrieve_mass", "refresh_every")}
        evidence = options.pop("evidence", True)
        timeout_s = options.pop("timeout_s", None)
        return Turn(
            turn_id=uuid.uuid4().hex,
            conversation_id=self.conversation_id,
            media_id=self.media.media_id,
            question=question,
            sampling=with_defaults(**options),
            **retrieval,
            want_evidence=evidence,
            deadline_s=timeout_s,
        )


async def _create(config: EngineConfig) -> LocalPipeline:
    return LocalPipeline(config)


async def _collect(events: AsyncIterator[TurnEvent]) -> list[TurnEvent]:
    return [event async for event in events]


async def _next(events: AsyncIterator[TurnEvent]) -> TurnEvent | None:
    return await anext(events, None)
