"""`AsyncVideoQA` for Python users who block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, Unpack

from sparsevila_cluster.api.ask_many import Asked, Item, ask_many_limit_s, read_items
from sparsevila_cluster.api.async_video_qa import AsyncVideoQA
from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.conversation import Chat
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.event_loop_thread import Blocking
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.engine.local_pipeline import LocalPipeline


class VideoQA(Blocking[AsyncVideoQA]):
    """Questions about videos and images.

        qa = VideoQA("path/to/checkpoint", prune_keep=0.25, retrieve_keep=0.10)
        chat = qa.conversation(qa.prepare("clip.mp4"))
        print(chat.ask("What happens?").text)

    Keyword arguments are config fields (`EngineConfig`, and the fields of its `sparsity` and `limits`). `VideoQA("demo")` is the
    bundled model. `prune="keep_all", retrieve="retrieve_all"` is dense. Use it as a context manager, or call `close`.
    Methods may be called from several threads, and from a notebook. Every call is that of `AsyncVideoQA`, and waits for it.

    Raises:
        BadConfig, BadRequest, BadCheckpoint, DeadlineExceeded. Methods also: Unavailable (closed).
    """

    def __init__(self, model: str | PathLike[str] | None = None, *, config: EngineConfig | None = None, **fields: Any):
        super().__init__(AsyncVideoQA(model, config=config, **fields), "VideoQA")
        self.config = self._async.config
        try:
            self._run(self._async.load(), self.config.load_timeout_s)
        except BaseException:
            self.close()
            raise

    @property
    def pipeline(self) -> LocalPipeline:
        """The pipeline behind this object. Its coroutines belong to this object's event loop."""
        return self._run(self._async.ready(), self.config.load_timeout_s)

    def prepare(
        self, source: Source | Sequence[Source], *, progress: Progress | None = None, **options: Unpack[PrepareOptions]
    ) -> MediaHandle:
        """Decode, encode, prune and prefill a video or image (a path, bytes or data URL), or several as one.

        Options: `fps`, `max_frames`, `prune_keep`, `timeout_s`. The same media with the same options is found again without work
        (`handle.reused`). `progress(stage, done, total)` is called in another thread; what it raises ends the preparation.

        Raises:
            BadMedia, BadRequest, TooLarge, QueueFull, DeadlineExceeded.
        """
        limit_s = self._async.prepare_limit_s(options.get("timeout_s"))
        return self._run(self._async.prepare(source, progress=progress, **options), limit_s)

    def conversation(self, media: MediaHandle) -> Chat[MediaHandle]:
        """A new conversation about prepared media."""
        return Chat(self._async.conversation(media), self._thread)

    def ask_many(
        self,
        asks: Iterable[Item],
        *,
        max_parallel: int | None = None,
        prepare: PrepareOptions | None = None,
        progress: Progress | bool | None = None,
        **options: Unpack[AskOptions],
    ) -> list[Asked]:
        """Hold many conversations, several at a time; the results stand in the order of `asks`.

            results = qa.ask_many([("a.mp4", "What happens?"), ("b.mp4", ["Who is there?", "And then?"])], max_tokens=32)
            texts = [result.answer.text for result in results]

        `AsyncVideoQA.ask_many` documents the arguments. A `progress` function is called in another thread: it must not call
        methods of this object.
        """
        asks = list(asks)
        work = self._async.ask_many(asks, max_parallel=max_parallel, prepare=prepare, progress=progress, **options)
        items = read_items(asks, prepare or {}, options)
        return self._run(work, ask_many_limit_s(self._async, items, prepare or {}, options))

    def info(self) -> dict[str, Any]:
        """What is resident and running."""
        return self._run(self._async.info())

    def close(self) -> None:
        """Abort what runs and free everything. Idempotent.

        Raises:
            DeadlineExceeded: the engines did not end within twice `close_timeout_s`.
        """
        self._thread.close(self._async.close(), 2 * self.config.close_timeout_s + 2 * GRACE_S)
