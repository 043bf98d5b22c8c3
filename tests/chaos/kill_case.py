"""What every case begins and ends with: a whole cluster, bystanders who must not notice, and every byte back in the end."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.chaos.checked_clients import Bystander, CheckedClip, Client, error_of
from tests.chaos.process_cluster import ProcessCluster
from tests.chaos.worker_processes import Process


class KillCase:
    """One case under way. `client` is the one whose worker is hit."""

    def __init__(self, cluster: ProcessCluster, clip: CheckedClip, other: CheckedClip):
        self.cluster, self.clip, self.other = cluster, clip, other
        self.client = Client(cluster.pipeline, clip)
        self.bystanders: list[Bystander] = []
        self.hit_s = 0.0

    @property
    def num_prefills(self) -> int:
        """How often the client's clip was encoded."""
        return self.cluster.forker.num_prefills(self.clip.media_id)

    async def prepare(self) -> None:
        handle = await self.cluster.pipeline.prepare(self.clip.request)
        assert handle.media_id == self.clip.media_id

    async def caught(self, token: Path, number: int) -> Process:
        """Wait for the trap."""
        process = await self.cluster.caught(token, number)
        self.hit_s = time.monotonic()
        return process

    async def send_signal(self, process: Process, number: int) -> None:
        """A signal without a trap: nothing in particular is under way."""
        process.signal(number)
        await process.wait_for_signal(number)
        self.hit_s = time.monotonic()

    def holder(self, kind: str) -> Process:
        """The worker that has the client's clip, as the directory knows it."""
        directory = self.cluster.directory_pool.directory
        assert directory is not None
        found = directory.find(None, self.clip.media_id)
        reports = found.holders if kind == "decode" else found.copies
        return self.cluster.pools[kind].processes[reports[0].worker]

    async def delete(self) -> None:
        await _forget(self.cluster, self.clip)

    async def bystanders_leave(self) -> None:
        """Of cases that leave them nobody to ask."""
        await asyncio.gather(*(one.leaves() for one in self.bystanders))
        self.bystanders = []

    async def bystanders_go_on(self) -> None:
        await asyncio.gather(*(one.hears_more(2) for one in self.bystanders))


@asynccontextmanager
async def kill_case(
    cluster: ProcessCluster, clip: CheckedClip, other: CheckedClip, num_prefill: int = 2, num_decode: int = 2
) -> AsyncGenerator[KillCase, None]:
    """Two bystanders ask about `other` all the time; in the end nothing but the prefix of `other` may take a byte anywhere."""
    await cluster.fill(num_prefill, num_decode)
    await _forget(cluster, clip)
    await cluster.pipeline.prepare(other.request)
    await cluster.until(lambda: _is_reported(cluster, other), "a report of the bystanders' clip")
    case = KillCase(cluster, clip, other)
    case.bystanders = [Bystander(cluster.pipeline, other) for _ in range(2)]
    try:
        await asyncio.gather(*(one.hears_more() for one in case.bystanders))
        yield case
        await case.bystanders_go_on()
        for process in cluster.processes:
            if process.stopped:
                process.signal(signal.SIGCONT)
        await cluster.disarm()
        await case.bystanders_go_on()
        await case.client.close()
        await case.bystanders_leave()
        await _forget(cluster, clip)
        await cluster.wait_until_idle({other.media_id})
    finally:
        # The rest is of a case that failed: the next one must find nothing of it.
        if cluster.directory_pool.directory is None:
            cluster.directory_pool.come_back()
        for leaving in [case.client.close(), *(one.drop() for one in case.bystanders)]:
            await error_of(asyncio.ensure_future(leaving))
        for process in cluster.processes:
            if process.stopped:
                process.signal(signal.SIGCONT)
        await error_of(asyncio.ensure_future(cluster.disarm()))


def _is_reported(cluster: ProcessCluster, clip: CheckedClip) -> bool:
    directory = cluster.directory_pool.directory
    return directory is not None and any(one.load.prefix_bytes for one in directory.holders(clip.media_id))


async def _forget(cluster: ProcessCluster, clip: CheckedClip, within_s: float = 10.0) -> None:
    """Delete a clip everywhere, also on workers that come back with it."""
    until_s = time.monotonic() + within_s
    while True:
        alive = {one.name for one in cluster.processes if one.lives}
        held = [name for name, memory in (await cluster.memory_of_all()).items() if clip.media_id in memory["media"]]
        if not held and alive <= cluster.reported:
            return
        assert time.monotonic() < until_s, f"{clip.media_id[:12]} cannot be deleted at {held}: {await cluster.memory_of_all()}"
        if alive <= cluster.reported:
            await cluster.pipeline.delete_media(clip.media_id)
        await asyncio.sleep(0.02)
