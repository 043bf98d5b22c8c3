"""A cluster of scripted workers, a real directory and routers, and how tests speak to it."""

import asyncio
import uuid
from contextlib import asynccontextmanager

from sparsevila_cluster.cluster.directory import SETTLE_REPORTS, Directory
from sparsevila_cluster.cluster.routing.router import ClusterPipeline
from sparsevila_cluster.core.cluster_config import build_cluster_config
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, SamplingParams, Turn
from tests.cluster.local_pool import LocalPool
from tests.cluster.scripted_workers import ScriptedDecode, ScriptedPrefill

QUESTIONS = ("what is it?", "and then?", "is that all?")
NUM = 5


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Cluster:
    """Scripted workers, a real directory and any number of routers in one event loop."""

    def __init__(self, num_prefill=2, num_decode=2, **fields):
        router = {"call_timeout_s": 0.5, **fields.pop("router", {})}
        self.config = build_cluster_config(router=router, **fields)
        self.lanes, self.clock, self.sink = {}, Clock(), Tally()
        self.prefill, self.decode = LocalPool({}), LocalPool({})
        self.directory_pool = LocalPool({})
        self.routers = []
        self.start_directory()
        for i in range(num_prefill):
            self.add_prefill(f"p{i}")
        for i in range(num_decode):
            self.add_decode(f"d{i}")
        self.report()
        self.clock.now_s += SETTLE_REPORTS

    @property
    def directory(self):
        return self.directory_pool.workers["directory"]

    def start_directory(self):
        most, share = self.config.router.max_conversations, self.config.door.max_share
        self.directory_pool.workers["directory"] = Directory(1.0, most, share, clock=self.clock)

    def add_prefill(self, name):
        self.prefill.workers[name] = ScriptedPrefill(name, self.lanes)
        return self.prefill.workers[name]

    def add_decode(self, name, **fields):
        self.decode.workers[name] = self.lanes[name] = ScriptedDecode(name, self.lanes, **fields)
        return self.decode.workers[name]

    def kill(self, worker):
        self.lanes.pop(worker, None)
        (self.decode if worker in self.decode.workers else self.prefill).kill(worker)

    def report(self):
        """Every worker that lives reports, and again in full if it is asked to."""
        for pool in (self.prefill, self.decode):
            for worker in pool.workers.values():
                if self.directory.report(worker.report(False)).send_all:
                    self.directory.report(worker.report(True))

    def router(self, name="router"):
        self.routers.append(ClusterPipeline(self.config, self.prefill, self.decode, self.directory_pool, self.sink, name))
        return self.routers[-1]

    @property
    def decodes(self):
        return list(self.decode.workers.values())

    @property
    def num_encoded(self):
        return sum(worker.num_encoded for worker in self.prefill.workers.values())

    def count(self, name):
        return self.sink.counts[name,]

    async def settled(self):
        """Nothing is under way, and nothing is left of what was."""
        for _ in range(200):
            if not any(len(router._clients.background) for router in self.routers):
                break
            await asyncio.sleep(0.01)
        assert not any(worker.reserved for worker in self.decodes), "a reservation was left behind"
        assert not any(worker.running for worker in self.decodes), "a turn runs for nobody"
        assert not any(worker.num_making for worker in self.prefill.workers.values()), "media are made for nobody"
        for router in self.routers:
            assert not router._clients.num_under_way and not router._turns and not router._replicator._running
        if "directory" in self.directory_pool.workers:
            assert not self.directory._claims, "a claim was left behind"


async def until(true, within_s=5.0):
    """Wait until `true()`."""
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def cluster_of(*args, **fields):
    """A Cluster whose routers are closed at the end, with nothing left over."""
    cluster = Cluster(*args, **fields)
    try:
        yield cluster
        await cluster.settled()
    finally:
        for router in cluster.routers:
            await router.close()


def video(content=b"a video 20", **fields):
    """Among equals, the key of the default content prefers p0 and d0."""
    return PrepareRequest((MediaSource(b"\x00\x00\x00\x18ftypmp42" + content, "video"),), **fields)


def run(scenario, *args, **fields):
    """`await scenario(cluster, router)`, within ten seconds and without a trace."""

    async def main():
        async with cluster_of(*args, **fields) as cluster:
            await scenario(cluster, cluster.router())

    asyncio.run(asyncio.wait_for(main(), 10))


def run_prepared(scenario, *args, **fields):
    """`await scenario(cluster, router, key)` with one media prepared."""

    async def with_key(cluster, router):
        await scenario(cluster, router, (await router.prepare(video())).media_id)

    run(with_key, *args, **fields)


def turn(key, question, conversation_id="", **fields):
    fields = {"turn_id": uuid.uuid4().hex, "sampling": SamplingParams(max_tokens=NUM), **fields}
    return Turn(conversation_id=conversation_id, media_id=key, question=question, **fields)


async def listen(router, asked):
    return [event async for event in router.ask(asked)]


async def ask(router, key, question, conversation_id="", **fields):
    """(the whole answer, the conversation it belongs to)."""
    events = await listen(router, turn(key, question, conversation_id, **fields))
    assert [event.kind for event in events if event.kind != "token"][0] == "accepted" and events[-1].kind == "done"
    indices = [event.index for event in events if event.kind == "token"]
    assert indices == sorted(set(indices))
    return Answer.from_events(events), events[-1].conversation_id


def home(cluster, key):
    return next(worker.name for worker in cluster.decodes if key in worker.residents)


def holders(cluster, key):
    return sorted(worker.name for worker in cluster.decodes if key in worker.residents)
