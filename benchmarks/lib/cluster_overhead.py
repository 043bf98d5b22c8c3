"""What stands between an engine and a client, and what it costs: the same turns through the cluster and from the engine itself.

alone   one conversation at a time: over gRPC through the cluster | the engine in this process | a stream of plain grpc.aio
crowd   so many conversations at once: through the cluster | the engine in this process, with the threads of all decode workers
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import cpu_time
from benchmarks.lib.goodput import TurnTimes, paired_ms, percentile, rounded, spread_of
from benchmarks.lib.grpc_echo import echoing
from benchmarks.lib.load_clients import SPARSE, LoadClient, TurnListener, connected_client
from benchmarks.lib.stopwatch import Repeats
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.core.requests import MediaHandle, MediaSource, PrepareRequest, TurnEvent
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.gateway.grpc.translate import to_event

CLUSTER, ENGINE, PLAIN = "cluster", "engine", "grpc.aio"
# What a question takes on the wire, beside its text; a stream of plain messages is asked for with as many bytes.
REQUEST_BYTES = 160
PLAIN_STREAMS = 8


@dataclass(frozen=True)
class OverheadPlan:
    """How long to measure. crowd: conversations at once; limit_s: for all of it."""

    num_tokens: int = 24
    num_turns: int = 2
    alone: Repeats = Repeats(least=4, most=12, budget_s=45.0)
    crowd: int = 8
    crowded: Repeats = Repeats(least=2, most=4, budget_s=30.0)
    limit_s: float = 600.0


@dataclass
class Overhead:
    """What was heard, by way. pairs: (through the cluster, from the engine) of the same question, one soon after the other."""

    pairs: list[tuple[TurnTimes, TurnTimes]] = field(default_factory=list)
    plain: list[tuple[float, float]] = field(default_factory=list)
    crowd_tokens_per_s: dict[str, list[float]] = field(default_factory=lambda: {CLUSTER: [], ENGINE: []})
    cpu_s: dict[str, float] = field(default_factory=dict)
    num_crowd_tokens: int = 0

    @property
    def num_equal(self) -> int:
        """Pairs whose answers are the same, token by token."""
        return sum(ours.token_ids == theirs.token_ids for ours, theirs in self.pairs)

    def figures(self) -> dict[str, float]:
        """Milliseconds through the cluster minus from the engine, of medians of pairs; beside them what plain grpc.aio takes."""
        ours, theirs = zip(*self.pairs, strict=True)
        gaps = [(a.tpot_ms, b.tpot_ms) for a, b in self.pairs if a.tpot_ms is not None and b.tpot_ms is not None]
        crowd = {way: percentile(found, 50) for way, found in self.crowd_tokens_per_s.items()}
        found = {
            "router_ttft_ms": paired_ms([one.ttft_ms for one in ours], [one.ttft_ms for one in theirs]),
            "router_ms_per_token": paired_ms(*zip(*gaps, strict=True)),
            "grpc_ttft_ms": percentile([first for first, _ in self.plain], 50),
            "grpc_ms_per_message": percentile([each for _, each in self.plain], 50),
            "tokens_per_s_vs_engine": crowd[CLUSTER] / crowd[ENGINE],
        }
        if self.cpu_s.get("Router"):
            found["router_cpu_ms_per_token"] = self.cpu_s["Router"] / self.num_crowd_tokens * 1e3
        return {name: round(value, 4) for name, value in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        ways = {CLUSTER: [one for one, _ in self.pairs], ENGINE: [one for _, one in self.pairs]}
        rows: list[dict[str, Any]] = []
        for way, heard in ways.items():
            times = {"ttft": [one.ttft_ms for one in heard], "token": [one.tpot_ms for one in heard if one.tpot_ms is not None]}
            rows.append({"way": way, **_spreads(times), "tokens_per_s": rounded(percentile(self.crowd_tokens_per_s[way], 50))})
        plain = {"ttft": [first for first, _ in self.plain], "token": [each for _, each in self.plain]}
        return [*rows, {"way": PLAIN, **_spreads(plain), "tokens_per_s": None}]

    def cpu_rows(self) -> list[dict[str, Any]]:
        """Processor time of a token in a crowd, by process."""
        each = {role: spent / self.num_crowd_tokens * 1e3 for role, spent in self.cpu_s.items()}
        return [{"process": role, "cpu_ms_per_token": rounded(ms)} for role, ms in sorted(each.items(), key=lambda item: -item[1])]


def _spreads(times: dict[str, list[float]]) -> dict[str, float | None]:
    found = {name: spread_of(samples) for name, samples in times.items()}
    return {f"{name}_{p}_ms": rounded(value) for name, both in found.items() for p, value in zip(("p50", "p95"), both, strict=True)}


class ClusterAndEngine:
    """The cluster and the engine, each with the same media."""

    def __init__(
        self, clients: Sequence[LoadClient], pipeline: LocalPipeline, media: dict[str, list[MediaHandle]], num_tokens: int
    ):
        self._clients, self._pipeline, self._media = clients, pipeline, media
        self._options = SPARSE.options(num_tokens)

    def listener(self, way: str, number: int = 0) -> TurnListener:
        """A new conversation of client `number`."""
        media = self._media[way][number % len(self._media[way])]
        return TurnListener(self._clients[number].ask if way == CLUSTER else self._pipeline.ask, media.media_id, self._options)

    async def threads(self, num: int) -> None:
        """How many the engine's steps use: it is said in the thread that they run in."""
        await self._pipeline.decode.call(lambda _: torch.set_num_threads(num))


@asynccontextmanager
async def cluster_and_engine(
    target: str, config: ClusterConfig, videos: Sequence[Path], overhead: OverheadPlan
) -> AsyncIterator[ClusterAndEngine]:
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected_client(target)) for _ in range(overhead.crowd)]
        pipeline = LocalPipeline(config.engine)
        stack.push_async_callback(pipeline.close)
        media: dict[str, list[MediaHandle]] = {CLUSTER: [], ENGINE: []}
        for video in videos:
            media[CLUSTER].append(await clients[0].client.prepare(video))
            media[ENGINE].append(await pipeline.prepare(PrepareRequest((MediaSource(str(video)),))))
        for one in clients:  # connected before anything is measured
            await one.client.media(media[CLUSTER][0].media_id)
        yield ClusterAndEngine(clients, pipeline, media, overhead.num_tokens)


async def measure(
    target: str, config: ClusterConfig, videos: Sequence[Path], overhead: OverheadPlan, say: Callable[[str], None]
) -> Overhead:
    """All of it. videos: prepared already, or about to be. Raises DeadlineExceeded."""
    return await wait_within(_measure(target, config, videos, overhead, say), overhead.limit_s, "measuring the overhead")


async def _measure(
    target: str, config: ClusterConfig, videos: Sequence[Path], overhead: OverheadPlan, say: Callable[[str], None]
) -> Overhead:
    found = Overhead()
    say("load the engine")
    async with cluster_and_engine(target, config, videos, overhead) as both, echoing() as echo:
        await both.threads(config.decode.threads)
        num_bytes = message_bytes((await _converse(both, CLUSTER, 1))[0])
        await _converse(both, ENGINE, 1)
        for number in overhead.alone.rounds():
            say(f"one conversation at a time: round {number + 1}")
            ways = (CLUSTER, ENGINE) if number % 2 else (ENGINE, CLUSTER)
            heard = {way: await _converse(both, way, overhead.num_turns) for way in ways}
            found.pairs += zip(heard[CLUSTER], heard[ENGINE], strict=True)
            for _ in range(PLAIN_STREAMS):
                found.plain.append(await echo.listen(overhead.num_tokens, num_bytes, REQUEST_BYTES))
        await both.threads(config.decode.threads * config.decode.replicas)
        for number in overhead.crowded.rounds():
            say(f"{overhead.crowd} conversations at once: round {number + 1}")
            for way in (CLUSTER, ENGINE) if number % 2 else (ENGINE, CLUSTER):
                await _crowd(both, way, overhead.crowd, found)
    return found


async def _converse(both: ClusterAndEngine, way: str, num_turns: int) -> list[TurnTimes]:
    listener = both.listener(way)
    return [await listener.listen("later" if number else "warm") for number in range(num_turns)]


async def _crowd(both: ClusterAndEngine, way: str, num: int, found: Overhead) -> None:
    """One turn of each of `num` conversations, at once."""
    before, start_s = cpu_time.cpu_s(), time.perf_counter()
    heard = await asyncio.gather(*(both.listener(way, number).listen("warm") for number in range(num)))
    elapsed_s = time.perf_counter() - start_s
    num_tokens = sum(len(one.token_ids) for one in heard)
    found.crowd_tokens_per_s[way].append(num_tokens / elapsed_s)
    if way == CLUSTER:
        for role, spent in cpu_time.cpu_since(before).items():
            found.cpu_s[role] = found.cpu_s.get(role, 0.0) + spent
        found.num_crowd_tokens += num_tokens


def message_bytes(heard: TurnTimes) -> int:
    """Of a message that tells one token of this answer, on average."""
    ids = heard.token_ids
    events = [TurnEvent("token", "t", index=i, token_ids=(token,), text="ab") for i, token in enumerate(ids)]
    sizes = [to_event(one, num_tokens=0).ByteSize() for one in events]
    return round(sum(sizes) / max(1, len(sizes)))
