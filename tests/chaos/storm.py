"""A storm over a cluster of real processes: `python -m tests.chaos.storm --operations 3000 --seed 0`.

Knows: clients that ask, leave, hurry, prepare and delete; weather that kills, stops and resumes workers and loses the registry. The
schedule is the seed's; how it meets the clients is up to the machine, and every answer must be right in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsevila_cluster.core.errors import DeadlineExceeded, NotFound, QueueFull, SparseVilaError, Unavailable
from tests.chaos.checked_clients import QUESTIONS, Client, Film, film_of
from tests.chaos.process_cluster import Town
from tests.engine.storm import unlogged

NUM_CLIENTS = 3
DEADLINE_S = 20.0
LATE_S = 2.0  # of a client that was told later than its deadline
# What a client may be told in such weather. Anything else, an Internal above all, is a bug.
LEGAL = (Unavailable, DeadlineExceeded, NotFound, QueueFull)
# One fault every so many operations.
CALM = 12


class Walker:
    """A client that does what comes to its mind, and knows what it must hear."""

    def __init__(self, storm: Storm, rng: random.Random):
        self._storm, self._rng = storm, rng
        self._client = Client(storm.town.pipeline, rng.choice(storm.films))

    async def walk(self) -> None:
        while self._storm.takes_one():
            operation = self._rng.choices(("ask", "leave", "hurry", "prepare", "delete", "close"), (60, 15, 10, 8, 3, 4))[0]
            begun_s, told = time.monotonic(), self._storm.told
            try:
                await getattr(self, f"_{operation}")()
                told[operation] += 1
            except LEGAL as error:
                told[f"{operation}: {type(error).__name__}"] += 1
                if isinstance(error, NotFound):
                    await self._again()
                await self._anew()
            late_s = time.monotonic() - begun_s - DEADLINE_S
            assert late_s < LATE_S, f"{operation} told its client {late_s:.1f} s after its deadline"

    async def _ask(self, deadline_s: float = DEADLINE_S, leave_at: int | None = None) -> None:
        client = self._client
        if client.num_answers == len(QUESTIONS):
            await self._anew()
        try:
            await client.ask(client.next_turn(deadline_s), leave_at=leave_at)
        finally:
            self._storm.conversations.add(client.conversation_id)

    async def _leave(self) -> None:
        await self._ask(leave_at=self._rng.choice((0, 0, 1, 3, 6)))

    async def _hurry(self) -> None:
        await self._ask(deadline_s=self._rng.choice((0.005, 0.02, 0.05, 0.3)))

    async def _prepare(self) -> None:
        film = self._rng.choice(self._storm.films)
        handle = await self._storm.town.pipeline.prepare(film.request)
        assert handle.media_id == film.media_id

    async def _delete(self) -> None:
        await self._storm.town.pipeline.delete_media(self._rng.choice(self._storm.films).media_id)

    async def _close(self) -> None:
        await self._anew()

    async def _again(self) -> None:
        """The film was deleted by somebody."""
        try:
            await self._storm.town.pipeline.prepare(self._client.film.request)
        except LEGAL as error:
            self._storm.told[f"prepare: {type(error).__name__}"] += 1

    async def _anew(self) -> None:
        """Another conversation, maybe about another film. What could not be closed is closed in the end."""
        client, conversation_id = self._client, self._client.conversation_id
        client.forget()
        client.film = self._rng.choice(self._storm.films)
        if conversation_id and self._rng.random() < 0.7:
            try:
                await self._storm.town.pipeline.close_conversation(conversation_id)
            except LEGAL as error:
                self._storm.told[f"close: {type(error).__name__}"] += 1


class Storm:
    def __init__(self, town: Town, films: Sequence[Film], seed: int, report: Callable[[], None] = lambda: None):
        self.town, self.films = town, films
        self.told: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.conversations: set[str] = set()
        self._rng = random.Random(seed)
        self._report = report
        self._left = 0
        self._news = asyncio.Event()
        self._repairs: set[asyncio.Task[None]] = set()

    def takes_one(self) -> bool:
        if self._left <= 0:
            return False
        self._left -= 1
        if self._left % CALM == 0:
            self._news.set()
        self._report()
        return True

    async def blow(self, num_operations: int) -> Counter[str]:
        """All of it. Raises AssertionError: a wrong token, a client told too late, an error that must not be, bytes not back."""
        town, self._left = self.town, num_operations
        await town.fill()
        for film in self.films:
            await town.pipeline.prepare(film.request)
        walkers = [asyncio.ensure_future(Walker(self, random.Random(self._rng.random())).walk()) for _ in range(NUM_CLIENTS)]
        weather = asyncio.ensure_future(self._weather())
        try:
            await asyncio.gather(*walkers)
        finally:
            for task in (*walkers, weather):
                task.cancel()
            await asyncio.gather(*walkers, weather, return_exceptions=True)
            await asyncio.gather(*self._repairs)
        await self._clear()
        return self.told + self.faults

    async def _weather(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            kind = self._rng.choices(("kill", "stop", "registry"), (50, 40, 10))[0]
            chosen, delay_s = self._rng.random(), self._rng.choice((0.0, 0.3, 1.0, 2.5))
            up = [one for one in self.town.processes if one.lives and not one.stopped]
            if kind == "registry" and not self._repairs:
                self.town.registry.lose()
                self._repair(self._found_again(min(delay_s, 1.0)))
            elif kind != "registry" and len(up) > 1 and self.town.registry.directory is not None:
                process = up[int(chosen * len(up))]
                number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
                process.signal(number)
                await process.fallen(number)
                self._repair(self._replaced(process, number, delay_s))
            else:
                continue
            self.faults[kind] += 1

    def _repair(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _found_again(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self.town.registry.come_back()
        # Whoever falls before everybody has reported takes along what nobody else knows.
        await asyncio.sleep(5 * self.town.config.report_s)

    async def _replaced(self, process, number: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if number == signal.SIGSTOP:
            process.signal(signal.SIGCONT)
            return
        await self.town.bury(process.name)
        await self.town.spawn(process.kind)

    async def _clear(self) -> None:
        """Everybody is back, every conversation closed, every film deleted: nothing may take a byte any more."""
        town = self.town
        await town.fill()
        await asyncio.sleep(5 * town.config.report_s)
        for conversation_id in self.conversations - {""}:
            await town.pipeline.close_conversation(conversation_id)
        until_s = time.monotonic() + 20.0
        while any(books["media"] for books in (await town.ledgers()).values()):
            assert time.monotonic() < until_s, f"films cannot be deleted: {await town.ledgers()}"
            for film in self.films:
                await town.pipeline.delete_media(film.media_id)
            await asyncio.sleep(2 * town.config.report_s)
        await town.rests(set())


async def run(num_operations: int, seed: int, report: Callable[[], None]) -> Counter[str]:
    from tests.chaos.process_cluster import config_of
    from tests.chaos.worker_processes import Zygote
    from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
    from tests.cluster.worker_fixtures import write_clip

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_qwen2_5_vl(folder / "tiny", seed=0)
        zygote = Zygote(checkpoint, folder)
        try:
            town = Town(zygote, config_of(checkpoint))
            films = [await film_of(write_clip(folder / f"{i}.mp4", seed=i), town.config) for i in range(3)]
            told = await Storm(town, films, seed, report).blow(num_operations)
            told["prefills"] = zygote.num_prefills()
            await town.close()
            return told
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"== {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
            raise
        finally:
            zygote.close()


def main(argv: Sequence[str] | None = None) -> int:
    import torch
    from rich.console import Console
    from rich.progress import Progress

    parser = argparse.ArgumentParser(prog="python -m tests.chaos.storm", description=__doc__.split("\n")[0])
    parser.add_argument("--operations", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started_s = time.perf_counter()
    with unlogged(), Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("storm", total=options.operations)
        try:
            told = asyncio.run(run(options.operations, options.seed, lambda: bar.advance(task)))
        except (AssertionError, SparseVilaError) as error:
            Console(stderr=True).print_exception()
            print(f"storm FAILED: seed {options.seed}: {type(error).__name__}: {error}")
            return 1
    text = ", ".join(f"{name} {num}" for name, num in sorted(told.items()))
    print(f"storm ok: seed {options.seed}, {options.operations} operations in {time.perf_counter() - started_s:.0f} s: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
