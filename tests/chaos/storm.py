"""A storm over a cluster of real processes: `python -m tests.chaos.storm --operations 3000 --seed 0`.

Clients ask, leave, hurry, prepare and delete while workers are killed, stopped and resumed and the directory is lost. The schedule
is the seed's; how it meets the clients is up to the machine, and every answer must be right in any case.
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

from sparsevila_cluster.core.errors import DeadlineExceeded, NotFound, PoisonRequest, QueueFull, SparseVilaError, Unavailable
from tests.chaos.checked_clients import QUESTIONS, CheckedClip, Client, checked_clip
from tests.chaos.process_cluster import ProcessCluster
from tests.engine.storm import unlogged

NUM_CLIENTS = 3
DEADLINE_S = 20.0
GRACE_S = 2.0  # of a client that was told later than its deadline
# What a client may be told in such a storm. Anything else, an Internal above all, is a bug. PoisonRequest is bad luck: a second
# worker was hit in the moments for which the turn was alone there.
LEGAL = (Unavailable, DeadlineExceeded, NotFound, QueueFull, PoisonRequest)
# One fault every so many operations.
OPERATIONS_PER_FAULT = 12
# How long a client waits that was told that nobody can do it.
REFUSED_PAUSE_S = 0.1


class StormClient:
    """A client that does what comes to its mind, and knows what it must hear."""

    def __init__(self, storm: Storm, rng: random.Random):
        self._storm, self._rng = storm, rng
        self._client = Client(storm.cluster.pipeline, rng.choice(storm.clips))

    async def run(self) -> None:
        while self._storm.take_operation():
            operation = self._rng.choices(("ask", "leave", "hurry", "prepare", "delete", "close"), (60, 15, 10, 8, 3, 4))[0]
            begun_s, outcomes = time.monotonic(), self._storm.outcomes
            try:
                await getattr(self, f"_{operation}")()
                outcomes[operation] += 1
            except LEGAL as error:
                outcomes[f"{operation}: {type(error).__name__}"] += 1
                if isinstance(error, NotFound):
                    await self._prepare_again()
                # Who asks again at once uses up the operations while a pool is empty.
                if isinstance(error, Unavailable | PoisonRequest):
                    await asyncio.sleep(REFUSED_PAUSE_S)
                await self._begin_conversation()
            late_s = time.monotonic() - begun_s - DEADLINE_S
            assert late_s < GRACE_S, f"{operation} told its client {late_s:.1f} s after its deadline"

    async def _ask(self, deadline_s: float = DEADLINE_S, leave_at: int | None = None) -> None:
        client = self._client
        if client.num_answers == len(QUESTIONS):
            await self._begin_conversation()
        try:
            await client.ask(client.next_turn(deadline_s), leave_at=leave_at)
        finally:
            self._storm.conversations.add(client.conversation_id)

    async def _leave(self) -> None:
        await self._ask(leave_at=self._rng.choice((0, 0, 1, 3, 6)))

    async def _hurry(self) -> None:
        await self._ask(deadline_s=self._rng.choice((0.005, 0.02, 0.05, 0.3)))

    async def _prepare(self) -> None:
        clip = self._rng.choice(self._storm.clips)
        handle = await self._storm.cluster.pipeline.prepare(clip.request)
        assert handle.media_id == clip.media_id

    async def _delete(self) -> None:
        await self._storm.cluster.pipeline.delete_media(self._rng.choice(self._storm.clips).media_id)

    async def _close(self) -> None:
        await self._begin_conversation()

    async def _prepare_again(self) -> None:
        """The clip was deleted by another client."""
        try:
            await self._storm.cluster.pipeline.prepare(self._client.clip.request)
        except LEGAL as error:
            self._storm.outcomes[f"prepare: {type(error).__name__}"] += 1

    async def _begin_conversation(self) -> None:
        """Another conversation, maybe about another clip. What could not be closed is closed in the end."""
        client, conversation_id = self._client, self._client.conversation_id
        client.forget()
        client.clip = self._rng.choice(self._storm.clips)
        if conversation_id and self._rng.random() < 0.7:
            try:
                await self._storm.cluster.pipeline.close_conversation(conversation_id)
            except LEGAL as error:
                self._storm.outcomes[f"close: {type(error).__name__}"] += 1


class Storm:
    def __init__(self, cluster: ProcessCluster, clips: Sequence[CheckedClip], seed: int, report: Callable[[], None] = lambda: None):
        self.cluster, self.clips = cluster, clips
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.conversations: set[str] = set()
        self._rng = random.Random(seed)
        self._report = report
        self._left = 0
        self._fault_is_due = asyncio.Event()
        self._repairs: set[asyncio.Task[None]] = set()

    def take_operation(self) -> bool:
        if self._left <= 0:
            return False
        self._left -= 1
        if self._left % OPERATIONS_PER_FAULT == 0:
            self._fault_is_due.set()
        self._report()
        return True

    async def run(self, num_operations: int) -> Counter[str]:
        """All of it. Raises AssertionError: a wrong token, a client told too late, an error that must not be, bytes not back."""
        cluster, self._left = self.cluster, num_operations
        await cluster.fill()
        for clip in self.clips:
            await cluster.pipeline.prepare(clip.request)
        clients = [asyncio.ensure_future(StormClient(self, random.Random(self._rng.random())).run()) for _ in range(NUM_CLIENTS)]
        faults_task = asyncio.ensure_future(self._inject_faults())
        try:
            await asyncio.gather(*clients)
        finally:
            for task in (*clients, faults_task):
                task.cancel()
            await asyncio.gather(*clients, faults_task, return_exceptions=True)
            await asyncio.gather(*self._repairs)
        await self._clear()
        return self.outcomes + self.faults

    async def _inject_faults(self) -> None:
        while True:
            await self._fault_is_due.wait()
            self._fault_is_due.clear()
            kind = self._rng.choices(("kill", "stop", "directory"), (50, 40, 10))[0]
            chosen, delay_s = self._rng.random(), self._rng.choice((0.0, 0.3, 1.0, 2.5))
            up = [one for one in self.cluster.processes if one.lives and not one.stopped]
            if kind == "directory" and not self._repairs:
                self.cluster.directory_pool.lose()
                self._repair(self._restart_directory(min(delay_s, 1.0)))
            elif kind != "directory" and len(up) > 1 and self.cluster.directory_pool.directory is not None:
                process = up[int(chosen * len(up))]
                number = signal.SIGKILL if kind == "kill" else signal.SIGSTOP
                process.signal(number)
                await process.wait_for_signal(number)
                self._repair(self._restart_worker(process, number, delay_s))
            else:
                continue
            self.faults[kind] += 1

    def _repair(self, work) -> None:
        task = asyncio.ensure_future(work)
        self._repairs.add(task)
        task.add_done_callback(self._repairs.discard)

    async def _restart_directory(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        self.cluster.directory_pool.come_back()
        # What only one worker knows is lost with it until all have reported.
        await asyncio.sleep(5 * self.cluster.config.report_s)

    async def _restart_worker(self, process, number: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        if number == signal.SIGSTOP:
            process.signal(signal.SIGCONT)
            return
        await self.cluster.remove(process.name)
        await self.cluster.spawn(process.kind)

    async def _clear(self) -> None:
        """All workers are back, every conversation closed, every clip deleted: nothing may take a byte any more."""
        cluster = self.cluster
        await cluster.fill()
        await asyncio.sleep(5 * cluster.config.report_s)
        for conversation_id in self.conversations - {""}:
            await cluster.pipeline.close_conversation(conversation_id)
        until_s = time.monotonic() + 20.0
        while any(memory["media"] for memory in (await cluster.memory_of_all()).values()):
            assert time.monotonic() < until_s, f"clips cannot be deleted: {await cluster.memory_of_all()}"
            for clip in self.clips:
                await cluster.pipeline.delete_media(clip.media_id)
            await asyncio.sleep(2 * cluster.config.report_s)
        await cluster.wait_until_idle(set())


async def run(num_operations: int, seed: int, report: Callable[[], None]) -> Counter[str]:
    from tests.chaos.process_cluster import config_of
    from tests.chaos.worker_processes import WorkerForker
    from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
    from tests.media.clips import write_clip

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = make_qwen2_5_vl(folder / "tiny", seed=0)
        forker = WorkerForker(checkpoint, folder)
        try:
            cluster = ProcessCluster(forker, config_of(checkpoint))
            clips = [await checked_clip(write_clip(folder / f"{i}.mp4", seed=i), cluster.config) for i in range(3)]
            counts = await Storm(cluster, clips, seed, report).run(num_operations)
            counts["prefills"] = forker.num_prefills()
            await cluster.close()
            return counts
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                print(f"== {log.name}\n{log.read_text()[-1500:]}", file=sys.stderr)
            raise
        finally:
            forker.close()


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
            counts = asyncio.run(run(options.operations, options.seed, lambda: bar.advance(task)))
        except (AssertionError, SparseVilaError) as error:
            Console(stderr=True).print_exception()
            print(f"storm FAILED: seed {options.seed}: {type(error).__name__}: {error}")
            return 1
    text = ", ".join(f"{name} {num}" for name, num in sorted(counts.items()))
    print(f"storm ok: seed {options.seed}, {options.operations} operations in {time.perf_counter() - started_s:.0f} s: {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
