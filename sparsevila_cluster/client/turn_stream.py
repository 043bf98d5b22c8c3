r"""The events of one turn, over as many streams as it takes: a lost stream goes on at the next token.

asked -> accepted -> token* -> evidence? -> done
  |         \-- stream lost: asked again with the tokens so far, under the latest conversation id -> token*
  \-- stream lost: asked again from the start, because nothing was accepted
Asked again means: of another target, if there is a healthy one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

from sparsevila_cluster.client.call_errors import RetryPolicy
from sparsevila_cluster.client.connection import Connection
from sparsevila_cluster.client.proto_messages import ask_message, to_event
from sparsevila_cluster.client.targets import Target
from sparsevila_cluster.core.errors import DataLoss, NotFound, SparseVilaError, Unavailable
from sparsevila_cluster.core.requests import Turn, TurnEvent
from sparsevila_cluster.pb import video_qa_pb2 as pb

# The server may still run the turn of a stream that only this client lost, maybe before it noticed the loss: how long the server is
# asked to stop it before the turn is asked again.
STOP_WITHIN_S = 2.0


class TurnStream:
    """One turn. `conversation_id` is the latest one from the server, under which the conversation goes on."""

    def __init__(self, connection: Connection, turn: Turn, within_s: float):
        self.turn = turn
        self.conversation_id = turn.conversation_id
        self.num_streams = 0
        self._connection = connection
        self._within_s = within_s
        self._where = f"{connection.target}: turn {turn.turn_id}"
        self._target: Target | None = None  # of the latest stream
        self._token_ids: list[int] = []
        self._brownout = 0.0
        self._yielded: set[str] = set()

    async def events(self) -> AsyncGenerator[TurnEvent, None]:
        """Each event once: accepted, token (indices without a gap), evidence, done. Leaving early aborts the turn.

        `accepted` comes again only where the conversation goes on under another id.

        Raises:
            What the server raises. Unavailable: it cannot be reached. DeadlineExceeded. DataLoss: a token that is out of order.
        """
        attempts = RetryPolicy(self._within_s, self._where)
        try:
            while "done" not in self._yielded:
                num_known = len(self._token_ids)
                try:
                    async with aclosing(self._stream(attempts.left_s())) as arriving:
                        async for event in arriving:
                            for new in self._take(event):
                                yield new
                    if "done" not in self._yielded:
                        raise Unavailable(f"{self._where}: the stream ended early")
                except NotFound:
                    # The router that began the conversation may have died before the directory heard of it.
                    if self.num_streams == 1 or self.turn.conversation_id or not self.conversation_id:
                        raise
                    self.conversation_id = ""
                except SparseVilaError as error:
                    if len(self._token_ids) > num_known:
                        attempts.worked()
                    await self._connection.again(attempts, error)
                    if isinstance(error, Unavailable):
                        await self._stop_other_stream()
        except (GeneratorExit, asyncio.CancelledError):
            if "done" not in self._yielded and self._target is not None:
                self._connection.run_in_background(self._abort(self._target))
            raise

    def _stream(self, within_s: float) -> AsyncGenerator[pb.AskEvent, None]:
        self.num_streams += 1
        message = ask_message(self.turn, self.conversation_id, self._token_ids, self._brownout)
        self._target = self._connection.choose(self.conversation_id, self._target)
        return self._connection.stream(self._target, "Ask", message, within_s, f"turn {self.turn.turn_id}")

    def _take(self, message: pb.AskEvent) -> Iterator[TurnEvent]:
        """The event in a message, unless an earlier stream yielded it already."""
        event = to_event(self.turn.turn_id, message)
        if event is None:
            return
        moved = event.kind == "accepted" and event.conversation_id not in ("", self.conversation_id)
        self.conversation_id = event.conversation_id or self.conversation_id
        if event.conversation_id and self._target is not None:
            self._connection.remember(event.conversation_id, self._target)
        if event.kind == "token":
            if event.index != len(self._token_ids):
                raise DataLoss(f"{self._where}: token {event.index} arrived where token {len(self._token_ids)} was due")
            self._token_ids += event.token_ids
            self._brownout = event.brownout
        elif event.kind in self._yielded and not moved:
            return
        elif event.kind == "done" and message.done.num_tokens != len(self._token_ids):
            raise DataLoss(f"{self._where}: {len(self._token_ids)} tokens arrived of an answer of {message.done.num_tokens}")
        self._yielded.add(event.kind)
        yield event

    async def _stop_other_stream(self) -> None:
        try:
            await self._abort(self._connection.choose(after=self._target))
        except SparseVilaError:  # the worker is gone, and the turn with it
            pass

    async def _abort(self, target: Target) -> None:
        message = pb.AbortRequest(turn_id=self.turn.turn_id)
        await self._connection.call_once(target, "Abort", message, STOP_WITHIN_S, f"aborting turn {self.turn.turn_id}")
