"""`AsyncVideoQA`, for Python users in an event loop: media and conversations about them, with an engine in this process.

AsyncVideoQA(...) -> load (in a thread of its own) -> prepare, conversation, ask_many, from any task -> close
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from typing import Any, Unpack

from sparsevila_cluster.api.ask_many import Asked, Item, read_items, run_ask_many
from sparsevila_cluster.api.frame_reader import record_origin
from sparsevila_cluster.api.heatmap import draw_conversation
from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source, to_request
from sparsevila_cluster.core.config import EngineConfig, build_config
from sparsevila_cluster.core.conversation import AsyncChat
from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import BadRequest, Unavailable
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import MediaHandle, Turn, TurnEvent
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.engine.local_pipeline import LocalPipeline


class AsyncVideoQA:
    """Questions about videos and images, from an event loop.

        async with AsyncVideoQA("path/to/checkpoint", prune_keep=0.25, retrieve_keep=0.10) as qa:
            chat = qa.conversation(await qa.prepare("clip.mp4"))
            print((await chat.ask("What happens?")).text)

    Arguments as for `VideoQA`. The constructor only checks them; the model is loaded in a thread of its own by `async with`, by
    `load`, or by the first call that needs it. Any number of tasks of one event loop may use it. Cancelling a task ends what it
    waits for: a turn is aborted, a preparation ends at its next report of progress.

    Raises:
        BadConfig, BadRequest. Methods also: BadCheckpoint (loading), Unavailable (closed), DeadlineExceeded.
    """

    def __init__(self, model: str | PathLike[str] | None = None, *, config: EngineConfig | None = None, **fields: Any):
        if config is None:
            config = build_config(**({} if model is None else {"model": fspath(model)}), **fields)
        elif fields or model is not None:
            raise BadRequest("give either config= or single fields, not both")
        check_choices(config)
        self.config = config
        self._loaded: Future[LocalPipeline] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def load(self) -> AsyncVideoQA:
        """Load the model unless that was done already; at most `load_timeout_s`. Returns itself."""
        await self.ready()
        return self

    async def ready(self) -> LocalPipeline:
        """The pipeline behind this object, once its model is loaded.

        Raises:
            BadCheckpoint, DeadlineExceeded. Unavailable: closed. BadRequest: called in another event loop than before.
        """
        if self._closed:
            raise Unavailable("this VideoQA is closed")
        if self._loaded is None:
            self._loop, self._loaded = asyncio.get_running_loop(), Future()
            # Not a thread of the loop's own pool: nothing may wait for it once the caller has given up.
            threading.Thread(target=_load, args=(self.config, self._loaded), name="load-model", daemon=True).start()
        elif self._loop is not asyncio.get_running_loop():
            raise BadRequest("an AsyncVideoQA belongs to the event loop that loaded it; make another one, or use VideoQA")
        return await wait_within(asyncio.wrap_future(self._loaded), self.config.load_timeout_s, "loading the model")

    async def prepare(
        self, source: Source | Sequence[Source], *, progress: Progress | None = None, **options: Unpack[PrepareOptions]
    ) -> MediaHandle:
        """Decode, encode, prune and prefill a video or image (a path, bytes or data URL), or several as one.

        Options: `fps`, `max_frames`, `prune_keep`, `timeout_s`. The same media with the same options is found again without work
        (`handle.reused`). `progress(stage, done, total)` is called in another thread; what it raises ends the preparation.

        Raises:
            BadMedia, BadRequest, TooLarge, QueueFull, DeadlineExceeded, Unavailable.
        """
        request = to_request(source, options)
        pipeline = await self.ready()
        limit_s = self.prepare_limit_s(request.deadline_s)
        origin = await wait_within(asyncio.to_thread(record_origin, request, self.config), limit_s, "finding the media")
        return replace(await pipeline.prepare(request, progress), origin=origin)

    def conversation(self, media: MediaHandle) -> AsyncChat[MediaHandle]:
        """A new conversation about prepared media."""
        draw = None if media.origin is None else partial(draw_conversation, media.origin)
        return AsyncChat(self, media, uuid.uuid4().hex, draw)

    async def ask_many(
        self,
        asks: Iterable[Item],
        *,
        max_parallel: int | None = None,
        prepare: PrepareOptions | None = None,
        progress: Progress | bool | None = None,
        **options: Unpack[AskOptions],
    ) -> list[Asked]:
        """Hold many conversations, several at a time; the results stand in the order of `asks`.

            results = await qa.ask_many([("a.mp4", "What happens?"), ("b.mp4", ["Who is there?", "And then?"])], max_tokens=32)
            texts = [result.answer.text for result in results]

        Each of `asks` is (media, question), (media, questions) or an `Ask` with options of its own; media is what `prepare`
        takes, or a MediaHandle. The questions of one item are turns of one conversation. Equal sources are prepared once, and
        not before there is room for them. What fails is the `error` of its result and harms no other: `ask_many` itself
        raises only for mistakes that concern all of them.

        max_parallel: conversations at the same time (None: as many as the engine takes into one step). prepare: options of
        `prepare` for all items. options: those of `ask` for all questions. progress: None shows a line on a terminal, True
        always, False never; a function is called with ("ask", questions done, of how many).

        Raises:
            BadRequest: an unknown or illegal option that is given for all. Unavailable, BadCheckpoint.
        """
        items = read_items(asks, prepare or {}, options)
        await self.ready()
        return await run_ask_many(self, items, max_parallel, prepare or {}, options, progress)

    async def info(self) -> dict[str, Any]:
        """What is resident and running."""
        return await (await self.ready()).info()

    async def turn_events(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn; conversations ask through it. Closing the generator early aborts the turn."""
        pipeline = await self.ready()
        limit_s = self.turn_limit_s(turn.deadline_s)
        until_s = time.perf_counter() + limit_s
        async with aclosing(pipeline.ask(turn)) as events:
            while True:
                # A slow reader still gets what has arrived meanwhile.
                left_s = max(GRACE_S, until_s - time.perf_counter())
                event = await wait_within(anext(events, None), left_s, f"turn {turn.turn_id} (of at most {limit_s:g} s)")
                if event is None:
                    return
                yield event

    async def close_conversation(self, conversation_id: str) -> None:
        """Free the KV of a conversation; its media stays."""
        await (await self.ready()).close_conversation(conversation_id)

    async def close(self) -> None:
        """Abort what runs and free everything. Idempotent.

        Raises:
            DeadlineExceeded: the engines did not end within twice `close_timeout_s`.
        """
        self._closed = True
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        if not loaded.done():
            loaded.add_done_callback(_discard)
        elif loaded.exception() is None:
            await wait_within(loaded.result().close(), 2 * self.config.close_timeout_s + GRACE_S, "closing")

    async def __aenter__(self) -> AsyncVideoQA:
        return await self.load()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def turn_limit_s(self, timeout_s: float | None) -> float:
        """The longest that a turn with this deadline (None: the configured one) lets its caller wait.

        A turn without a deadline of its own may first have to make an evicted media prefix again.
        """
        own_s = self.config.turn_timeout_s + self.config.prepare_timeout_s if timeout_s is None else timeout_s
        return own_s + 2 * GRACE_S

    def prepare_limit_s(self, timeout_s: float | None) -> float:
        """The longest that a preparation with this deadline (None: the configured one) lets its caller wait."""
        return (self.config.prepare_timeout_s if timeout_s is None else timeout_s) + 2 * GRACE_S

    def call_limit_s(self) -> float:
        """The longest that any other call lets its caller wait: it may have to wait for the model to be loaded."""
        return self.turn_limit_s(None)


def _load(config: EngineConfig, loaded: Future[LocalPipeline]) -> None:
    loaded.set_running_or_notify_cancel()  # from here on, a waiter that is cancelled does not cancel it for the others
    try:
        pipeline = LocalPipeline(config)
    except BaseException as error:
        loaded.set_exception(error)
    else:
        loaded.set_result(pipeline)


def _discard(loaded: Future[LocalPipeline]) -> None:
    """Close a pipeline that came too late: its owner was closed meanwhile, maybe with its event loop."""
    if loaded.exception() is None:
        work = loaded.result().close
        threading.Thread(target=lambda: asyncio.run(work()), name="close-late", daemon=True).start()
