"""What every case begins and ends with: a whole cluster, neighbours who must not notice, and every byte back in the end.

Knows: how to set a scene and how to clear it. Does not know: what goes wrong in between.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.chaos.checked_clients import Client, Film, Neighbour, typed
from tests.chaos.process_cluster import Town
from tests.chaos.worker_processes import Process


class Scene:
    """One case on its way. `client` is the one that is hit."""

    def __init__(self, town: Town, film: Film, other: Film):
        self.town, self.film, self.other = town, film, other
        self.client = Client(town.pipeline, film)
        self.neighbours: list[Neighbour] = []
        self.hit_s = 0.0

    @property
    def num_prefills(self) -> int:
        """How often the client's film was made."""
        return self.town.zygote.num_prefills(self.film.media_id)

    async def prepare(self) -> None:
        handle = await self.town.pipeline.prepare(self.film.request)
        assert handle.media_id == self.film.media_id

    async def hit(self, token: Path, number: int) -> Process:
        """Wait for the trap."""
        process = await self.town.caught(token, number)
        self.hit_s = time.monotonic()
        return process

    async def strike(self, process: Process, number: int) -> None:
        """A signal without a trap: nothing in particular is under way."""
        process.signal(number)
        await process.fallen(number)
        self.hit_s = time.monotonic()

    def holder(self, kind: str) -> Process:
        """The worker that has the client's film, as the registry knows it."""
        directory = self.town.registry.directory
        assert directory is not None
        found = directory.find(None, self.film.media_id)
        reports = found.holders if kind == "decode" else found.copies
        return self.town.pools[kind].processes[reports[0].worker]

    async def delete(self) -> None:
        await _forget(self.town, self.film)

    async def neighbours_leave(self) -> None:
        """Of cases that leave them nobody to ask."""
        await asyncio.gather(*(one.leaves() for one in self.neighbours))
        self.neighbours = []

    async def neighbours_go_on(self) -> None:
        await asyncio.gather(*(one.hears_more(2) for one in self.neighbours))


@asynccontextmanager
async def scene(town: Town, film: Film, other: Film) -> AsyncGenerator[Scene, None]:
    """Two neighbours ask about `other` all the time; in the end nothing but the prefix of `other` may take a byte anywhere."""
    await town.fill()
    await _forget(town, film)
    await town.pipeline.prepare(other.request)
    await town.until(lambda: _is_reported(town, other), "a report of the neighbours' film")
    made = Scene(town, film, other)
    made.neighbours = [Neighbour(town.pipeline, other) for _ in range(2)]
    try:
        await asyncio.gather(*(one.hears_more() for one in made.neighbours))
        yield made
        await made.neighbours_go_on()
        for process in town.processes:
            if process.stopped:
                process.signal(signal.SIGCONT)
        await town.disarm()
        await made.neighbours_go_on()
        await made.client.close()
        await made.neighbours_leave()
        await _forget(town, film)
        await town.rests({other.media_id})
    finally:
        for neighbour in made.neighbours:
            neighbour.drop()
        if town.registry.directory is None:
            town.registry.come_back()
        if made.client.conversation_id:  # of a case that failed; the next one begins with empty hands
            await typed(asyncio.ensure_future(made.client.close()))
        for process in town.processes:
            if process.stopped:
                process.signal(signal.SIGCONT)


def _is_reported(town: Town, film: Film) -> bool:
    directory = town.registry.directory
    return directory is not None and any(one.load.prefix_bytes for one in directory.holders(film.media_id))


async def _forget(town: Town, film: Film, within_s: float = 10.0) -> None:
    """Delete a film everywhere, also on workers that come back with it."""
    until_s = time.monotonic() + within_s
    while True:
        alive = {one.name for one in town.processes if one.lives}
        held = [name for name, books in (await town.ledgers()).items() if film.media_id in books["media"]]
        if not held and alive <= town.registered:
            return
        assert time.monotonic() < until_s, f"{film.media_id[:12]} cannot be deleted at {held}: {await town.ledgers()}"
        if alive <= town.registered:
            await town.pipeline.delete_media(film.media_id)
        await asyncio.sleep(0.02)
