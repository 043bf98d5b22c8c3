"""`AsyncClient` for Python users who block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, Unpack

from sparsevila_cluster.client.async_client import AsyncClient
from sparsevila_cluster.client.connection import Tls
from sparsevila_cluster.client.media_upload import ClientSource, Progress, Upload
from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions, Source
from sparsevila_cluster.core.conversation import Chat
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.event_loop_thread import Blocking
from sparsevila_cluster.core.requests import Answer, MediaHandle


class Client(Blocking[AsyncClient]):
    """Questions about videos and images, to a server.

        with Client.connect("videos.example.org:8600", api_key=key, tls=True) as client:
            chat = client.conversation(client.prepare("clip.mp4"))
            print(chat.ask("What happens?").text)

    Use it as a context manager, or call `close`. Methods may be called from several threads, and from a notebook. Every call is
    that of `AsyncClient`, which documents arguments and errors, and waits for it.
    """

    def __init__(self, client: AsyncClient):
        super().__init__(client, "Client")
        self.target = client.target

    @classmethod
    def connect(
        cls,
        target: str,
        *,
        api_key: str | None = None,
        tls: Tls | bool | str | PathLike[str] | None = None,
        timeout_s: float | None = None,
    ) -> Client:
        """A client of the server at `target`, "host:port", or of several. Arguments as for `AsyncClient.connect`."""
        return cls(AsyncClient.connect(target, api_key=api_key, tls=tls, timeout_s=timeout_s))

    def upload(self, source: Source, *, progress: Progress | None = None, timeout_s: float | None = None) -> Upload:
        """Send a file without preparing it. `progress` is called in another thread."""
        limit_s = self._async.prepare_limit_s(timeout_s)
        return self._run(self._async.upload(source, progress=progress, timeout_s=timeout_s), limit_s)

    def prepare(
        self, source: ClientSource | Sequence[ClientSource], *, progress: Progress | None = None, **options: Unpack[PrepareOptions]
    ) -> MediaHandle:
        """Have a video or image prepared, or several as one. `progress` is called in another thread."""
        limit_s = self._async.prepare_limit_s(options.get("timeout_s"))
        return self._run(self._async.prepare(source, progress=progress, **options), limit_s)

    def conversation(self, media: MediaHandle | str) -> Chat[MediaHandle | str]:
        """A new conversation about prepared media, given as its handle or its media id."""
        return Chat(self._async.conversation(media), self._thread)

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
