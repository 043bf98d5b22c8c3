"""Many conversations at the same time: each media prepared once, every item with its own result.

Knows: which items share a media, how many conversations may run, who waits for room. Does not know: pipelines or engines; it
calls `prepare` and `ask` as any user could.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source, to_request, to_turn
from sparsevila_cluster.core.display import Shown
from sparsevila_cluster.core.errors import BadRequest, QueueFull, SparseVilaError
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import Answer, MediaHandle

if TYPE_CHECKING:
    from sparsevila_cluster.api.async_video_qa import AsyncVideoQA

R = TypeVar("R")
Options = TypeVar("Options", AskOptions, PrepareOptions)

FIRST_PAUSE_S = 0.02  # before a call that found the queue full is made again; doubled each time


@dataclass(frozen=True, repr=False)
class Ask(Shown):
    """One conversation that `ask_many` is to hold.

    media: what `prepare` takes (a path, bytes, a data URL, or several of them), or a MediaHandle; questions: one, or several that
    are asked in order; options: those of `ask`, over the ones that are given for all; prepare: those of `prepare`, likewise.
    """

    media: Source | Sequence[Source] | MediaHandle
    questions: str | Sequence[str]
    options: AskOptions = field(default_factory=AskOptions)
    prepare: PrepareOptions = field(default_factory=PrepareOptions)

    def __post_init__(self) -> None:
        if not isinstance(self.questions, str):
            object.__setattr__(self, "questions", tuple(self.questions))
            if not self.questions:
                raise BadRequest("an item of ask_many needs at least one question, got none")

    @classmethod
    def of(cls, item: Item) -> Ask:
        """`item` as an Ask. Raises BadRequest if it is neither one nor (media, question or questions)."""
        if isinstance(item, Ask):
            return item
        if not isinstance(item, tuple) or len(item) != 2:
            form = "(media, question), (media, questions) or an Ask"
            raise BadRequest(f"an item of ask_many must be {form}, got {type(item).__name__}")
        return cls(*item)

    @property
    def turns(self) -> Sequence[str]:
        """The questions, also of a single one, in order."""
        return (self.questions,) if isinstance(self.questions, str) else self.questions


Item = Ask | tuple[Source | Sequence[Source] | MediaHandle, str | Sequence[str]]


@dataclass(frozen=True, repr=False)
class Asked(Shown):
    """What came of one item: its media, the answers that were given, and the error that ended it early, if any."""

    ask: Ask
    media: MediaHandle | None = None
    answers: tuple[Answer, ...] = ()
    error: SparseVilaError | None = None

    @property
    def answer(self) -> Answer:
        """The answer to the last question. Raises `error` if there is one."""
        if self.error is not None:
            raise self.error
        return self.answers[-1]

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from ((question, answer.text) for question, answer in zip(self.ask.turns, self.answers, strict=False))
        if self.error is not None:
            yield "error", self.error


async def hold_many(
    qa: AsyncVideoQA,
    asks: Sequence[Ask],
    max_parallel: int | None,
    prepare: PrepareOptions,
    options: AskOptions,
    progress: Progress | bool | None,
) -> list[Asked]:
    """The work of `AsyncVideoQA.ask_many`, which documents it."""
    if max_parallel is None:
        # No more than may wait, so that these conversations alone never fill the queue.
        max_parallel = min(qa.config.max_batch, qa.config.max_waiting)
    if isinstance(max_parallel, bool) or not isinstance(max_parallel, int) or max_parallel < 1:
        raise BadRequest(f"max_parallel must be an integer >= 1, got {max_parallel!r}")
    to_turn("", "", "?", options)  # mistakes that concern all items are told before anything is done
    to_request("?", prepare)
    shows = progress is None or progress is True
    with ProgressLine(always=progress is True) if shows else nullcontext() as line:
        report = line.stage if line is not None else progress if callable(progress) else None
        return await _Many(qa, asks, max_parallel, prepare, options, report).hold()


def many_limit_s(qa: AsyncVideoQA, asks: Sequence[Ask], prepare: PrepareOptions, options: AskOptions) -> float:
    """The longest that `hold_many` may take: everything one after the other, each at its deadline."""
    total_s = 0.0
    for ask in asks:
        total_s += _patience_s(qa.prepare_limit_s(_merged(prepare, ask.prepare).get("timeout_s")))
        total_s += _patience_s(qa.turn_limit_s(_merged(options, ask.options).get("timeout_s"))) * len(ask.turns)
    return total_s


class _Many:
    """One call of `ask_many`. Items about the same media form a group, which has it prepared and then talks about it."""

    def __init__(
        self,
        qa: AsyncVideoQA,
        asks: Sequence[Ask],
        max_parallel: int,
        prepare: PrepareOptions,
        options: AskOptions,
        report: Progress | None,
    ):
        self.qa, self.asks, self.prepare, self.options, self.report = qa, asks, prepare, options, report
        self.results: list[Asked | None] = [None] * len(asks)
        self.seats = asyncio.Semaphore(max_parallel)
        self.door = asyncio.Lock()
        self.left = asyncio.Event()
        self.bytes_in_use: dict[Hashable, int] = {}
        self.num_done, self.num_questions = 0, sum(len(ask.turns) for ask in asks)

    async def hold(self) -> list[Asked]:
        self._count(0)
        groups: dict[Hashable, list[int]] = {}
        for i, ask in enumerate(self.asks):
            try:
                groups.setdefault(self._key(ask), []).append(i)
            except SparseVilaError as error:
                self._finish(i, Asked(ask, error=error))
        await _all([self._hold_group(key, members) for key, members in groups.items()])
        assert all(result is not None for result in self.results)
        return [result for result in self.results if result is not None]

    def _key(self, ask: Ask) -> Hashable:
        """Equal for items that can share one preparation."""
        return ask.media.media_id if isinstance(ask.media, MediaHandle) else to_request(ask.media, self._prepare_options(ask))

    async def _hold_group(self, key: Hashable, members: Sequence[int]) -> None:
        try:
            media = await self._enter(key, self.asks[members[0]])
        except SparseVilaError as error:
            for i in members:
                self._finish(i, Asked(self.asks[i], error=error))
            return
        try:
            await _all([self._converse(i, media) for i in members])
        finally:
            del self.bytes_in_use[key]
            self.left.set()

    async def _enter(self, key: Hashable, ask: Ask) -> MediaHandle:
        """Prepare a media as soon as it fits beside those that are being talked about: else it would drive them out.

        One group at a time, in order. The wait has no deadline of its own: it ends with the turns inside, which have theirs.
        """
        async with self.door:
            while not self._has_room():
                self.left.clear()
                await self.left.wait()
            if isinstance(ask.media, MediaHandle):
                media = ask.media
            else:
                options = self._prepare_options(ask)
                call = partial(self.qa.prepare, ask.media, **options)
                media = await _patiently(call, self.qa.prepare_limit_s(options.get("timeout_s")))
            self.bytes_in_use[key] = media.kv_bytes
            return media

    def _has_room(self) -> bool:
        """Whether one more media fits if it is as large as the largest one inside."""
        inside = self.bytes_in_use.values()
        return not inside or sum(inside) + max(inside) <= self.qa.config.prefix_bytes

    async def _converse(self, i: int, media: MediaHandle) -> None:
        ask, answers, error = self.asks[i], [], None
        options = _merged(self.options, ask.options)
        limit_s = self.qa.turn_limit_s(options.get("timeout_s"))
        async with self.seats:
            chat = self.qa.conversation(media)
            try:
                for question in ask.turns:
                    try:
                        answers.append(await _patiently(partial(chat.ask, question, **options), limit_s))
                    except SparseVilaError as failed:
                        error = failed
                        break
                    self._count(1)
            finally:
                with suppress(SparseVilaError):  # only a closed engine refuses, and that keeps nothing
                    await chat.close()
        self._finish(i, Asked(ask, media, tuple(answers), error))

    def _prepare_options(self, ask: Ask) -> PrepareOptions:
        return _merged(self.prepare, ask.prepare)

    def _finish(self, i: int, result: Asked) -> None:
        """An item is done; the questions that an error left unasked count as done."""
        self.results[i] = result
        if result.error is not None:
            self._count(len(result.ask.turns) - len(result.answers))

    def _count(self, num: int) -> None:
        self.num_done += num
        if self.report is not None:
            self.report("ask", self.num_done, self.num_questions)


def _merged(common: Options, own: Options) -> Options:
    return cast(Options, {**common, **own})


async def _patiently(call: Callable[[], Awaitable[R]], limit_s: float) -> R:
    """`call()`, made again while the queue is full, but not begun later than `limit_s`."""
    loop = asyncio.get_running_loop()
    until_s, pause_s = loop.time() + limit_s, FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except QueueFull as error:
            pause_s = min(2 * pause_s, error.retry_after_s)
            if loop.time() + pause_s > until_s:
                raise
        await asyncio.sleep(pause_s)


def _patience_s(limit_s: float) -> float:
    """The longest that `_patiently` takes for a call that takes at most `limit_s`."""
    return 2 * limit_s


async def _all(works: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Do all of them at the same time. When one raises, or the caller is cancelled, the others end before this does."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second one would hit them while they clean up
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
