"""The events of one turn, on their way from an engine's thread to an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import DeadlineExceeded
from sparsevila_cluster.core.requests import TurnEvent
from sparsevila_cluster.engine.turn import EventSink


async def turn_events(
    submit: Callable[[EventSink], Awaitable[None]], abort: Callable[[], object], deadline_s: float, what: str, max_events: int
) -> AsyncGenerator[list[TurnEvent], None]:
    """Submit a turn and yield its events as they come, those that came while nobody read together, up to `max_events` of them.

    submit: queues the turn; its events, or one error, then go to the sink, from any thread. abort: called when the iteration ends
    before the turn does, also while it is being submitted; it must not wait.

    Raises:
        Whatever `submit` raises or the sink is given. DeadlineExceeded: neither `done` nor an error in time.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[TurnEvent | Exception] = asyncio.Queue()
    late = DeadlineExceeded(f"{what} took longer than {deadline_s:g} s")
    timer: asyncio.TimerHandle | None = None
    finished = False
    try:
        await submit(lambda event: _post(loop, events, event))
        timer = loop.call_later(deadline_s + GRACE_S, events.put_nowait, late)
        while not finished:
            event, ready = await events.get(), list[TurnEvent]()
            while not isinstance(event, Exception):
                ready.append(event)
                if len(ready) == max_events or events.empty():
                    break
                event = events.get_nowait()
            finished = event is not late if isinstance(event, Exception) else event.kind == "done"
            if ready:
                yield ready
            if isinstance(event, Exception):
                raise event
    finally:
        if timer is not None:
            timer.cancel()
        if not finished:
            abort()


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[TurnEvent | Exception], event: TurnEvent | Exception) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)
