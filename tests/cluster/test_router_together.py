"""Routers over real workers in one process: what clients hear is what a local pipeline says, also when workers are lost."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from sparsevila_cluster.cluster.directory import Directory
from sparsevila_cluster.cluster.routing.conversation_table import ConversationToken
from sparsevila_cluster.cluster.routing.router import ClusterPipeline
from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, Replay
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from tests.cluster import worker_fixtures
from tests.cluster.local_pool import LocalPool
from tests.cluster.worker_fixtures import QUESTIONS, request_of, turn_of

NUM = 8


class InProcessCluster:
    """Workers, the directory that they report to, and routers."""

    def __init__(self, config, prefills, decodes):
        self.config, self.prefills, self.decodes = config, prefills, decodes
        self.prefill = LocalPool({worker.name: worker for worker in prefills})
        self.decode = LocalPool({worker.name: worker for worker in decodes})
        self.directory_pool = LocalPool({"directory": Directory(config.report_s)})
        self.sink, self.routers = Tally(), []

    @property
    def directory(self):
        return self.directory_pool.workers["directory"]

    def router(self, name="router"):
        self.routers.append(ClusterPipeline(self.config, self.prefill, self.decode, self.directory_pool, self.sink, name))
        return self.routers[-1]

    async def report(self):
        while True:
            for worker in (*self.prefill.workers.values(), *self.decode.workers.values()):
                if "directory" in self.directory_pool.workers and self.directory.report(worker.report(False)).send_all:
                    self.directory.report(worker.report(True))
            await asyncio.sleep(self.config.report_s)

    async def kill(self, name):
        """A decode worker dies: whoever calls it hears so, and its lanes break."""
        worker = self.decode.workers[name]
        self.decode.kill(name)
        await worker.close()

    @property
    def num_prefills(self):
        return sum(worker.sink.counts["prefills_total",] for worker in self.prefills)


@asynccontextmanager
async def in_process_cluster(checkpoint, endless, prefill=1, decode=2, **fields):
    config = worker_fixtures.config_of(checkpoint, "gloo", report_s=0.2, **fields)
    async with worker_fixtures.workers(config, prefill, decode, model=endless) as (prefills, decodes):
        cluster = InProcessCluster(config, prefills, decodes)
        reporting = asyncio.create_task(cluster.report())
        await asyncio.sleep(0.01)
        try:
            yield cluster
        finally:
            for router in cluster.routers:
                await router.close()
            reporting.cancel()


def run(scenario, checkpoint, endless, **fields):
    async def main():
        async with in_process_cluster(checkpoint, endless, **fields) as cluster:
            await scenario(cluster)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def local(checkpoint, endless, clips):
    """Of each clip: (media id, the answers that one process gives to three questions in a row)."""

    async def main():
        config = worker_fixtures.config_of(checkpoint)
        pipeline = LocalPipeline(config.engine, endless, config.secret)
        told = []
        for clip in clips:
            key = (await pipeline.prepare(request_of(clip))).media_id
            answers = []
            for question in QUESTIONS:
                events = [event async for event in pipeline.ask(turn_of(key, question, key, NUM, want_evidence=True))]
                answers.append(Answer.from_events(events))
            told.append((key, answers))
        await pipeline.close()
        return told

    return asyncio.run(main())


async def ask(router, key, number, name="", on_token=None):
    """(answer, name of the conversation); `on_token` is awaited with each index."""
    events = []
    async for event in router.ask(turn_of(key, QUESTIONS[number], name, NUM, want_evidence=True)):
        events.append(event)
        if event.kind == "token" and on_token is not None:
            await on_token(event.index)
    return Answer.from_events(events), events[-1].conversation_id


def same(answer, wanted):
    assert (answer.token_ids, answer.text, answer.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
    assert [(one.frame, one.share) for one in answer.evidence] == [
        (one.frame, pytest.approx(one.share, abs=1e-5)) for one in wanted.evidence
    ]
    assert answer.usage.prompt_tokens == wanted.usage.prompt_tokens and answer.usage.completion_tokens == NUM


def test_many_clients_hear_what_a_local_pipeline_says(checkpoint, endless, clips, local):
    async def scenario(cluster):
        routers = [cluster.router("a"), cluster.router("b")]
        await asyncio.gather(*(router.prepare(request_of(clips[0])) for router in routers))
        # The directory has to know which worker is the emptier one.
        await worker_fixtures.until(lambda: any(one.load.prefix_bytes for one in cluster.directory.snapshot().of("decode")))

        async def client(i):
            key, wanted = local[i % 2]
            handle = await routers[i % 2].prepare(request_of(clips[i % 2]))
            assert handle.media_id == key
            name = ""
            for number in range(3):
                answer, name = await ask(routers[(i + number) % 2], key, number, name)
                same(answer, wanted[number])
            return ConversationToken.parse(name).worker

        homes = await asyncio.gather(*(client(i) for i in range(6)))
        assert set(homes) == {"decode-0", "decode-1"} and cluster.num_prefills == 2
        assert not any(worker.sink.counts["conversations_replayed_total",] for worker in cluster.decodes)
        info = await routers[0].info()
        assert len(info["media"]) == 2 and info["conversations"] == 6 and info["lanes"]

    run(scenario, checkpoint, endless)


@pytest.mark.parametrize(("number", "index"), [(0, 0), (1, 2), (2, NUM - 2)])
def test_a_decode_worker_killed_in_mid_answer_costs_no_token_and_no_prefill(checkpoint, endless, clips, local, number, index):
    async def scenario(cluster):
        router, (key, wanted), name = cluster.router(), local[0], ""
        await router.prepare(request_of(clips[0]))

        async def kill(at):
            if at == index:
                await cluster.kill(next(worker.name for worker in cluster.decodes if key in worker.engine.prefixes))

        for i in range(3):
            answer, name = await ask(router, key, i, name, kill if i == number else None)
            same(answer, wanted[i])
        recovered.append(cluster.sink.counts["turns_recovered_total",])
        replayed = sum(worker.sink.counts["conversations_replayed_total",] for worker in cluster.decodes)
        assert cluster.num_prefills == 1 and recovered[-1] <= 1
        if recovered[-1]:
            assert replayed == (number > 0) and ConversationToken.parse(name).moves == 1

    recovered = []
    while not any(recovered):  # on a busy machine the rest of an answer may have left before the kill
        assert len(recovered) < 5, "no kill met a running answer"
        run(scenario, checkpoint, endless)


def test_sampling_without_a_seed_goes_on_with_the_same_draws(checkpoint, endless, clips, local):
    async def scenario(cluster):
        router, key, num = cluster.router(), local[0][0], 120  # so many that it is not over when its worker is killed
        await router.prepare(request_of(clips[0]))

        async def draw(turn_id, index=None):
            asked = replace(turn_of(key, QUESTIONS[0], "", num), turn_id=turn_id)
            asked, tokens = replace(asked, sampling=replace(asked.sampling, temperature=2.0)), []
            async for event in router.ask(asked):
                tokens += event.token_ids
                if event.kind == "token" and event.index == index:
                    await cluster.kill(next(worker.name for worker in cluster.decodes if key in worker.engine.prefixes))
            return tokens

        first, other = await draw("one"), await draw("another")
        assert len(first) == num and first != other
        assert await draw("one", index=3) == first and cluster.sink.counts["turns_recovered_total",] == 1

    run(scenario, checkpoint, endless)


def test_a_client_that_lost_its_stream_goes_on_through_another_router(checkpoint, endless, clips, local):
    async def scenario(cluster):
        router, (key, wanted) = cluster.router("a"), local[0]
        await router.prepare(request_of(clips[0]))
        _, name = await ask(router, key, 0)
        for heard in (3, NUM):
            asked = turn_of(key, QUESTIONS[1], name, NUM)
            tokens = []
            stream = router.ask(asked)
            async for event in stream:
                tokens += event.token_ids
                if len(tokens) == heard:
                    break
            other = cluster.router(f"b{heard}")
            events = [event async for event in other.ask(replace(asked, replay=Replay(tuple(tokens))))]
            assert (*tokens, *(t for e in events for t in e.token_ids)) == wanted[1].token_ids
            await stream.aclose()
            answer, _ = await ask(other, key, 2, events[-1].conversation_id)
            same(answer, wanted[2])
            await other.close_conversation(name)
            _, name = await ask(router, key, 0)

    run(scenario, checkpoint, endless)


def test_a_client_that_left_is_answered_as_if_its_turn_had_never_been(checkpoint, endless, clips, local):
    """The worker hears of it late: it still runs the turn, and ends it, when the next one is asked."""

    async def scenario(cluster):
        router, (key, wanted) = cluster.router(), local[0]
        await router.prepare(request_of(clips[0]))
        _, name = await ask(router, key, 0)
        token = ConversationToken.parse(name)
        (worker,) = [worker for worker in cluster.decodes if worker.name == token.worker]
        for number in (1, 2):
            left = turn_of(key, "never heard?", token.base, 40, after=number)
            running = asyncio.create_task(worker_fixtures.answer(worker, left))
            await worker_fixtures.until(lambda left=left: left.turn_id in worker.engine.turns)
            answer, name = await ask(router, key, number, name)
            same(answer, wanted[number])
            await running
        assert worker.sink.counts["conversations_replayed_total",] == 2 and ConversationToken.parse(name).num_turns == 3

    run(scenario, checkpoint, endless)


def test_the_directory_may_come_back_empty(checkpoint, endless, clips, local):
    async def scenario(cluster):
        router, (key, wanted) = cluster.router("a"), local[0]
        await router.prepare(request_of(clips[0]))
        _, name = await ask(router, key, 0)
        cluster.directory_pool.kill("directory")
        answer, name = await ask(router, key, 1, name)
        same(answer, wanted[1])
        cluster.directory_pool.workers["directory"] = Directory(cluster.config.report_s)
        other = cluster.router("b")
        answer, _ = await ask(other, key, 2, name)
        same(answer, wanted[2])
        assert (await other.prepare(request_of(clips[0]))).reused and cluster.num_prefills == 1

    run(scenario, checkpoint, endless)


def test_whoever_gives_up_leaves_no_byte_behind(checkpoint, endless, clips, local, monkeypatch):
    async def scenario(cluster):
        router = cluster.router()
        gate = worker_fixtures.Gate(monkeypatch)
        task = asyncio.create_task(router.prepare(request_of(clips[0])))
        await gate.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        with pytest.raises(DeadlineExceeded):
            await router.prepare(request_of(clips[1], deadline_s=0.01))
        with pytest.raises(BadMedia):
            await router.prepare(PrepareRequest((MediaSource(b"\x00\x00\x00\x18ftypmp42 no video"),)))
        for worker in cluster.prefills:
            await worker_fixtures.settled(worker)
        assert all(worker.engine.prefixes.arena.used_bytes == 0 for worker in cluster.decodes)
        assert (await router.prepare(request_of(clips[0]))).media_id == local[0][0]
        assert await router.delete_media(local[0][0])
        assert all(worker.engine.prefixes.arena.used_bytes == 0 for worker in cluster.decodes)
        assert all(worker.copies.used_bytes == 0 for worker in cluster.prefills)

    run(scenario, checkpoint, endless)
