"""The face for Python users who block: `AsyncClient`, run by an event loop in a thread of its own.

Knows: how long each call may take. Does not know: what the calls do, or how threads wait for them.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Sequence
from os import PathLike
from typing import Any, TypeVar, Unpack

from sparsevila_cluster.client.async_client import AsyncChat, AsyncClient
from sparsevila_cluster.client.connection import Tls
from sparsevila_cluster.client.media_upload import Given, Progress, Upload
from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.event_loop_thread import EventLoopThread
from sparsevila_cluster.core.requests import Answer, MediaHandle

R = TypeVar("R")


class Client:
    """Questions about videos and images, to a server.

        with Client.connect("videos.example.org:8600", api_key=key, tls=True) as client:
            chat = client.conversation(client.prepare("clip.mp4"))
            print(chat.ask("What happens?").text)

    Use it as a context manager, or call `close`. Methods may be called from several threads, and from a notebook. Every call is
    that of `AsyncClient`, which documents arguments and errors, and waits for it.
    """

    def __init__(self, client: AsyncClient):
        self.target = client.target
        self._async = client
        self._thread = EventLoopThread("Client")

    @classmethod
    def connect(
        cls,
        target: str,
        *,
        api_key: str | None = None,
        tls: Tls | bool | str | PathLike[str] | None = None,
        timeout_s: float | None = None,
    ) -> Client:
        """A client of the server at `target`, "host:port". Arguments as for `AsyncClient.connect`."""
        return cls(AsyncClient.connect(target, api_key=api_key, tls=tls, timeout_s=timeout_s))

    def upload(self, source: Source, *, progress: Progress | None = None, timeout_s: float | None = None) -> Upload:
        """Send a file without preparing it. `progress` is called in another thread."""
        limit_s = self._async.prepare_limit_s(timeout_s)
        return self._run(self._async.upload(source, progress=progress, timeout_s=timeout_s), limit_s)

    def prepare(
        self, source: Given | Sequence[Given], *, progress: Progress | None = None, **options: Unpack[PrepareOptions]
    ) -> MediaHandle:
        """Have a video or image prepared, or several as one. `progress` is called in another thread."""
        limit_s = self._async.prepare_limit_s(options.get("timeout_s"))
        return self._run(self._async.prepare(source, progress=progress, **options), limit_s)

    def conversation(self, media: MediaHandle | str) -> Chat:
        """A new conversation about prepared media, given as its handle or its media id."""
        return Chat(self, self._async.conversation(media))

    def ask(self, media: MediaHandle | str, question: str, **options: Unpack[AskOptions]) -> Answer:
        """The answer to a single question: a conversation of its own, which is closed afterwards."""
        return self._run(self._async.ask(media, question, **options), self._async.turn_limit_s(options.get("timeout_s")))

    def stream(self, media: MediaHandle | str, question: str, **options: Unpack[AskOptions]) -> Iterator[str]:
        """The text of a single question's answer in pieces, in a conversation of its own. Leaving early aborts the turn."""
        limit_s = self._async.turn_limit_s(options.get("timeout_s"))
        return self._thread.iterate(self._async.stream(media, question, **options), limit_s)

    def info(self, *, timeout_s: float | None = None) -> dict[str, Any]:
        """The server's version, model and limits, and what its workers hold and do."""
        return self._run(self._async.info(timeout_s=timeout_s), self._async.call_limit_s(timeout_s))

    def media(self, media_id: str, *, timeout_s: float | None = None) -> MediaHandle:
        """What was prepared under this id. Raises NotFound."""
        return self._run(self._async.media(media_id, timeout_s=timeout_s), self._async.call_limit_s(timeout_s))

    def delete_media(self, media_id: str, *, timeout_s: float | None = None) -> bool:
        """Forget prepared media. False: there was nothing to forget."""
        return self._run(self._async.delete_media(media_id, timeout_s=timeout_s), self._async.call_limit_s(timeout_s))

    def close(self) -> None:
        """Abort what runs and disconnect. Idempotent."""
        self._thread.close(self._async.close(), 2 * GRACE_S)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, R], limit_s: float) -> R:
        return self._thread.run(work, limit_s)


class Chat:
    """One conversation: each question sees the video and all earlier questions and answers."""

    def __init__(self, client: Client, chat: AsyncChat):
        self._client = client
        self._chat = chat
        self.media = chat.media
        self.turns = chat.turns

    @property
    def conversation_id(self) -> str:
        """How the server calls it; "" before the first question."""
        return self._chat.conversation_id

    def ask(self, question: str, **options: Unpack[AskOptions]) -> Answer:
        """The whole answer. Options and errors as for `AsyncChat.ask`."""
        limit_s = self._client._async.turn_limit_s(options.get("timeout_s"))
        return self._client._run(self._chat.ask(question, **options), limit_s)

    def stream(self, question: str, **options: Unpack[AskOptions]) -> Iterator[str]:
        """The answer's text in pieces. Leaving early aborts the turn and forgets it; after the last piece the whole answer is the
        last of `turns`.
        """
        limit_s = self._client._async.turn_limit_s(options.get("timeout_s"))
        return self._client._thread.iterate(self._chat.stream(question, **options), limit_s)

    def close(self) -> None:
        """Free the conversation's KV; its media stays."""
        self._client._run(self._chat.close(), self._client._async.call_limit_s())
