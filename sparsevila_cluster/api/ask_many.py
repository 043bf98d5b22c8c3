"""Many conversations at the same time: each media prepared once, every item with its own result.

items -> grouped by media -> a group waits until its media fits -> prepare -> at most `max_parallel` conversations at a time
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar, Unpack, cast

from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source, to_request, to_turn
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.conversation import AsyncChat
from sparsevila_cluster.core.display import ReprMixin
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, QueueFull, SparseVilaError
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import Answer, MediaHandle

R = TypeVar("R")
Options = TypeVar("Options", AskOptions, PrepareOptions)

FIRST_PAUSE_S = 0.02  # before a call that found the queue full is made again; doubled each time


@dataclass(frozen=True, repr=False)
class Ask(ReprMixin):
    """One item of `ask_many`: a conversation about one media.

    media: what `prepare` takes (a path, bytes, a data URL, or several of them), or a MediaHandle; questions: one, or several that
    are asked in order; options: those of `ask`, over the ones that are given for all; prepare: those of `prepare`, likewise.

    Raises:
        BadRequest: questions that are no text, options that are no mapping.
    """

    media: Source | Sequence[Source] | MediaHandle
    questions: str | Sequence[str]
    options: AskOptions = field(default_factory=AskOptions)
    prepare: PrepareOptions = field(default_factory=PrepareOptions)

    def __post_init__(self) -> None:
        if not isinstance(self.questions, str):
            if not isinstance(self.questions, Iterable):
                raise BadRequest(f"an item of ask_many needs a question or several, got {type(self.questions).__name__}")
            object.__setattr__(self, "questions", tuple(self.questions))
            if not self.questions:
                raise BadRequest("an item of ask_many needs at least one question, got none")
            for question in self.questions:
                if not isinstance(question, str):
                    raise BadRequest(f"a question of an item of ask_many must be text, got {type(question).__name__}")
        for name in ("options", "prepare"):
            if not isinstance(getattr(self, name), Mapping):
                raise BadRequest(f"{name} of an item of ask_many must be a mapping, got {type(getattr(self, name)).__name__}")

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
class Asked(ReprMixin):
    """The result of one item: its media, the answers that were given, and the error that ended it early, if any.

    ask: the item; None if it has none of the forms of one, which `error` then says.
    """

    ask: Ask | None
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
        questions = () if self.ask is None else self.ask.turns
        yield from ((question, answer.text) for question, answer in zip(questions, self.answers, strict=False))
        if self.error is not None:
            yield "error", self.error


class QuestionAnswerer(Protocol):
    """What `ask_many` needs of an `AsyncVideoQA`."""

    config: EngineConfig

    async def prepare(self, source: Source | Sequence[Source], **options: Unpack[PrepareOptions]) -> MediaHandle:
        """Make media ready for questions."""
        ...

    def conversation(self, media: MediaHandle) -> AsyncChat[MediaHandle]:
        """A new conversation about prepared media."""
        ...

    def prepare_limit_s(self, timeout_s: float | None) -> float:
        """The longest that a preparation with this deadline lets its caller wait, in seconds."""
        ...

    def turn_limit_s(self, timeout_s: float | None) -> float:
        """The longest that a turn with this deadline lets its caller wait, in seconds."""
        ...


def read_items(items: Iterable[Item], prepare: PrepareOptions, options: AskOptions) -> list[Ask | Asked]:
    """Each item as an Ask, or the result of one that cannot be asked. prepare, options: those that are given for all."""
    return [_read_item(item, prepare, options) for item in items]


def _read_item(item: Item, prepare: PrepareOptions, options: AskOptions) -> Ask | Asked:
    ask = None
    try:
        ask = Ask.of(item)
        to_turn("", "", "?", _merged(options, ask.options))
        hash(_preparation(ask, prepare))
    except SparseVilaError as error:
        return Asked(ask, error=error)
    except (TypeError, ValueError, OverflowError) as error:  # values that cannot even be compared with their range
        return Asked(ask, error=BadRequest(f"an item of ask_many: {error}"))
    return ask


async def run_ask_many(
    qa: QuestionAnswerer,
    items: Sequence[Ask | Asked],
    max_parallel: int | None,
    prepare: PrepareOptions,
    options: AskOptions,
    progress: Progress | bool | None,
) -> list[Asked]:
    """The work of `AsyncVideoQA.ask_many`, which documents it. items: as `read_items` gives them."""
    if max_parallel is None:
        # No more than may wait, so that these conversations alone never fill the queue.
        max_parallel = min(qa.config.max_batch, qa.config.max_waiting)
    if isinstance(max_parallel, bool) or not isinstance(max_parallel, int) or max_parallel < 1:
        raise BadRequest(f"max_parallel must be an integer >= 1, got {max_parallel!r}")
    to_turn("", "", "?", options)  # a mistake that concerns all items is raised before anything is done
    to_request("?", prepare)
    shows = progress is None or progress is True
    with ProgressLine(always=progress is True) if shows else nullcontext() as line:
        report = line.stage if line is not None else progress if callable(progress) else None
        return await _AskMany(qa, items, max_parallel, prepare, options, report).run()


def ask_many_limit_s(qa: QuestionAnswerer, items: Sequence[Ask | Asked], prepare: PrepareOptions, options: AskOptions) -> float:
    """The longest that `run_ask_many` may take: everything one after the other, each at its deadline."""
    total_s = 0.0
    for ask in (item for item in items if isinstance(item, Ask)):
        total_s += _longest_retry_s(qa.prepare_limit_s(_merged(prepare, ask.prepare).get("timeout_s")))
        total_s += _longest_retry_s(qa.turn_limit_s(_merged(options, ask.options).get("timeout_s"))) * len(ask.turns)
    return total_s


class _AskMany:
    """One call of `ask_many`. Items about the same media form a group, which has it prepared and then asks about it."""

    def __init__(
        self,
        qa: QuestionAnswerer,
        items: Sequence[Ask | Asked],
        max_parallel: int,
        prepare: PrepareOptions,
        options: AskOptions,
        report: Progress | None,
    ):
        self.qa, self.prepare, self.options, self.report = qa, prepare, options, report
        self.asks = {i: item for i, item in enumerate(items) if isinstance(item, Ask)}
        self.refused = {i: item for i, item in enumerate(items) if isinstance(item, Asked)}
        self.results: list[Asked | None] = [None] * len(items)
        self.slots = asyncio.Semaphore(max_parallel)
        self.preparing = asyncio.Lock()
        self.freed = asyncio.Event()
        self.bytes_in_use: dict[Hashable, int] = {}
        self.until_s = asyncio.get_running_loop().time() + ask_many_limit_s(qa, items, prepare, options)
        known = [*self.asks.values(), *(item.ask for item in self.refused.values() if item.ask is not None)]
        self.num_done, self.num_questions = 0, sum(len(ask.turns) for ask in known)

    async def run(self) -> list[Asked]:
        self._count(0)
        groups: dict[Hashable, list[int]] = {}
        for i, result in self.refused.items():
            self._finish(i, result)
        for i, ask in self.asks.items():
            groups.setdefault(_preparation(ask, self.prepare), []).append(i)
        await _all([self._run_group(key, members) for key, members in groups.items()])
        assert all(result is not None for result in self.results)
        return [result for result in self.results if result is not None]

    async def _run_group(self, key: Hashable, members: Sequence[int]) -> None:
        try:
            media = await self._prepare_when_it_fits(key, self.asks[members[0]])
        except SparseVilaError as error:
            for i in members:
                self._finish(i, Asked(self.asks[i], error=error))
            return
        try:
            await _all([self._converse(i, media) for i in members])
        finally:
            del self.bytes_in_use[key]
            self.freed.set()

    async def _prepare_when_it_fits(self, key: Hashable, ask: Ask) -> MediaHandle:
        """Prepare a media as soon as it fits beside those that are being asked about: else it would evict them.

        One group at a time, in order. Raises DeadlineExceeded when there is no room by the time all turns must have ended.
        """
        async with self.preparing:
            while not self._has_room():
                self.freed.clear()
                await self._wait_for_room()
            if isinstance(ask.media, MediaHandle):
                media = ask.media
            else:
                options = _merged(self.prepare, ask.prepare)
                call = partial(self.qa.prepare, ask.media, **options)
                media = await _retry_while_full(call, self.qa.prepare_limit_s(options.get("timeout_s")))
            self.bytes_in_use[key] = media.kv_bytes
            return media

    async def _wait_for_room(self) -> None:
        try:
            async with asyncio.timeout_at(self.until_s):
                await self.freed.wait()
        except TimeoutError:
            raise DeadlineExceeded("no room for one more media: turns about the others did not end at their deadlines") from None

    def _has_room(self) -> bool:
        """Whether one more media fits if it is as large as the largest of those in use."""
        used = self.bytes_in_use.values()
        return not used or sum(used) + max(used) <= self.qa.config.prefix_bytes

    async def _converse(self, i: int, media: MediaHandle) -> None:
        ask, answers, error = self.asks[i], [], None
        options = _merged(self.options, ask.options)
        limit_s = self.qa.turn_limit_s(options.get("timeout_s"))
        async with self.slots:
            chat = self.qa.conversation(media)
            try:
                for question in ask.turns:
                    try:
                        answers.append(await _retry_while_full(partial(chat.ask, question, **options), limit_s))
                    except SparseVilaError as failed:
                        error = failed
                        break
                    self._count(1)
            finally:
                with suppress(SparseVilaError):  # only a closed engine refuses, and that keeps nothing
                    await chat.close()
        self._finish(i, Asked(ask, media, tuple(answers), error))

    def _finish(self, i: int, result: Asked) -> None:
        """An item is done; the questions that were not asked because of an error count as done."""
        self.results[i] = result
        if result.error is not None and result.ask is not None:
            self._count(len(result.ask.turns) - len(result.answers))

    def _count(self, num: int) -> None:
        self.num_done += num
        if self.report is not None:
            self.report("ask", self.num_done, self.num_questions)


def _preparation(ask: Ask, prepare: PrepareOptions) -> Hashable:
    """Equal for items that can share one preparation. Raises BadRequest: an unknown or illegal option, no source."""
    return ask.media.media_id if isinstance(ask.media, MediaHandle) else to_request(ask.media, _merged(prepare, ask.prepare))


def _merged(common: Options, own: Options) -> Options:
    return cast(Options, {**common, **own})


async def _retry_while_full(call: Callable[[], Awaitable[R]], limit_s: float) -> R:
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


def _longest_retry_s(limit_s: float) -> float:
    """The longest that `_retry_while_full` takes for a call that takes at most `limit_s`."""
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
