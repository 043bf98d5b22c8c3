"""Load on a server: clients with a connection each, who bring a video, hold a conversation about it, and look at the clock.

    closed loop   so many clients at a time; whoever ends makes room for the next
    open loop     clients come when they come, however many are there

Everybody is connected and has uploaded their video before the clock starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lib.goodput import Kind, Run, TurnTimes
from sparsevila_cluster.client import AsyncClient, Upload
from sparsevila_cluster.client.connection import Connection
from sparsevila_cluster.client.turn_stream import TurnStream
from sparsevila_cluster.core.call_options import to_turn
from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.core.requests import MediaHandle, Turn, TurnEvent

PREPARE_S, TURN_S, CALL_S = 300.0, 180.0, 60.0
QUESTIONS = (
    "What happens in this clip, and when?",
    "And what comes after that?",
    "Which of the two was there first?",
    "Does anything stay where it is?",
)


@dataclass(frozen=True)
class Variant:
    """A configuration, as a client asks for it."""

    name: str
    prepare: dict[str, Any] = field(default_factory=dict)
    ask: dict[str, Any] = field(default_factory=dict)

    def options(self, num_tokens: int) -> dict[str, Any]:
        """Of a question whose answer has `num_tokens`."""
        return {"max_tokens": num_tokens, "evidence": False, **self.ask}


SPARSE = Variant("sparse")
# Everything kept is `keep_all` and `retrieve_all`, whatever the names of the policies.
DENSE = Variant("dense", {"prune_keep": 1.0}, {"retrieve_keep": 1.0})


@dataclass(frozen=True)
class ConversationPlan:
    """One client's conversation. at_s: when it begins, in an open loop."""

    video: Path
    num_turns: int
    at_s: float = 0.0


@dataclass(frozen=True)
class LoadClient:
    """One client, connected."""

    connection: Connection
    client: AsyncClient

    def ask(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        return TurnStream(self.connection, turn, TURN_S).events()

    async def leave(self, media: MediaHandle, conversation_id: str) -> None:
        chat = self.client.conversation(media)
        chat.conversation_id = conversation_id
        await chat.close()


@asynccontextmanager
async def connected_client(target: str) -> AsyncIterator[LoadClient]:
    connection = Connection(target, None, None)
    async with AsyncClient(connection, None) as client:
        yield LoadClient(connection, client)


class TurnListener:
    """What is heard of a conversation: a turn for each call of `listen`."""

    def __init__(self, ask: Callable[[Turn], AsyncGenerator[TurnEvent, None]], media_id: str, options: dict[str, Any]):
        self.conversation_id = ""
        self._ask, self._media_id, self._options = ask, media_id, options
        self._num_turns = 0

    async def listen(self, kind: Kind, since_s: float | None = None) -> TurnTimes:
        """The next question's answer. since_s: what its first token is counted from, if not from now. Raises what `ask` raises."""
        question = QUESTIONS[self._num_turns % len(QUESTIONS)]
        turn = to_turn(self.conversation_id, self._media_id, question, self._options)  # type: ignore[arg-type]
        self._num_turns += 1
        arrived_s: list[float] = []
        tokens: list[int] = []
        start_s = time.perf_counter() if since_s is None else since_s
        async with aclosing(self._ask(turn)) as events:
            async for event in events:
                self.conversation_id = event.conversation_id or self.conversation_id
                if event.kind == "token":
                    arrived_s += [time.perf_counter()] * len(event.token_ids)
                    tokens += event.token_ids
        end_s = time.perf_counter()
        gap_ms = (arrived_s[-1] - arrived_s[0]) / (len(arrived_s) - 1) * 1e3 if len(arrived_s) > 1 else None
        ttft_s = (arrived_s[0] if arrived_s else end_s) - start_s
        return TurnTimes(kind, ttft_s * 1e3, gap_ms, (end_s - start_s) * 1e3, tuple(tokens))


async def converse(one: LoadClient, upload: Upload, plan: ConversationPlan, variant: Variant, num_tokens: int) -> list[TurnTimes]:
    """A conversation: media prepared, or found, then questions. It ends with the first error."""
    heard: list[TurnTimes] = []
    kind: Kind = "warm"
    start_s = time.perf_counter()
    try:
        media = await one.client.prepare(upload, timeout_s=PREPARE_S, **variant.prepare)
        kind = "warm" if media.reused else "cold"
        listener = TurnListener(one.ask, media.media_id, variant.options(num_tokens))
        for number in range(plan.num_turns):
            heard.append(await (listener.listen("later") if number else listener.listen(kind, start_s)))
        await one.leave(media, listener.conversation_id)
    except SparseVilaError as error:
        heard.append(TurnTimes("later" if heard else kind, error=type(error).__name__))
    return heard


async def closed_loop(target: str, plans: Sequence[ConversationPlan], concurrency: int, variant: Variant, num_tokens: int) -> Run:
    """`concurrency` conversations at a time, until all are held."""
    waiting = list(reversed(range(len(plans))))

    async def client(clients: Sequence[tuple[LoadClient, Upload]], heard: list[TurnTimes]) -> None:
        while waiting:
            number = waiting.pop()
            heard += await converse(*clients[number], plans[number], variant, num_tokens)

    return await _run(target, plans, [client] * concurrency)


async def open_loop(target: str, plans: Sequence[ConversationPlan], variant: Variant, num_tokens: int) -> Run:
    """Every conversation begins when its time has come."""

    def client(number: int) -> Any:
        async def come(clients: Sequence[tuple[LoadClient, Upload]], heard: list[TurnTimes]) -> None:
            await asyncio.sleep(plans[number].at_s)
            heard += await converse(*clients[number], plans[number], variant, num_tokens)

        return come

    return await _run(target, plans, [client(number) for number in range(len(plans))])


async def _run(target: str, plans: Sequence[ConversationPlan], workloads: Sequence[Any]) -> Run:
    async with AsyncExitStack() as stack:
        clients = []
        for plan in plans:
            one = await stack.enter_async_context(connected_client(target))
            clients.append((one, await one.client.upload(plan.video, timeout_s=CALL_S)))
        heard: list[TurnTimes] = []
        start_s = time.perf_counter()
        await asyncio.gather(*(workload(clients, heard) for workload in workloads))
        return Run(tuple(heard), time.perf_counter() - start_s)
