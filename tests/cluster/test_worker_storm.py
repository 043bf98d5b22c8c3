"""Workers under a storm of callers who leave at any moment: right answers or typed errors, and every byte back in the end."""

import asyncio
import random
import uuid

import pytest

from sparsevila_cluster.core.errors import SparseVilaError
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.models import load_model
from tests.cluster import worker_fixtures
from tests.cluster.worker_fixtures import QUESTIONS, answer, events_of, made, request_of, settled, ticket_for, tokens_of, turn_of

NUM_CALLERS, NUM_CALLS = 5, 14


@pytest.fixture(scope="module")
def wanted(checkpoint, clips):
    """(request, question) -> tokens, and the bytes of the largest prefix, as one process with both engines has them."""

    async def main():
        pipeline, answers, most = LocalPipeline(worker_fixtures.config_of(checkpoint).engine, load_model(checkpoint)), {}, 0
        for clip in clips:
            for frames in (4, 8):
                request = request_of(clip, max_frames=frames)
                handle = await pipeline.prepare(request)
                most = max(most, handle.kv_bytes)
                for question in QUESTIONS:
                    turn = turn_of(handle.media_id, question, uuid.uuid4().hex)
                    answers[request, question] = tokens_of([event async for event in pipeline.ask(turn)])
        await pipeline.close()
        return answers, most

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["inproc", "gloo"])
def test_a_storm_leaves_right_answers_and_no_byte(checkpoint, wanted, kind):
    answers, most = wanted
    rng, asked, failed = random.Random(5), [], []

    async def call(prefill, decodes):
        request, question = rng.choice(list(answers))
        decode, other = rng.sample(decodes, 2)
        key = await prefill.key_of(request)
        ticket = await ticket_for(decode, key, lease_s=5.0, deadline_s=10.0)
        try:
            await made(prefill, request, key, ticket)
        finally:
            if rng.random() < 0.7:  # the rest is left to the lease, or has landed
                await decode.release(ticket.transfer_id)
        if rng.random() < 0.3:
            await decode.ship(key, await ticket_for(other, key, lease_s=5.0, deadline_s=10.0))
            decode = other
        turn = turn_of(key, question, uuid.uuid4().hex)
        if rng.random() < 0.3:
            stream = decode.ask(turn)
            await anext(stream)
            await stream.aclose()
            return
        tokens = await answer(decode, turn)
        assert tokens == answers[request, question]
        asked.append(tokens)
        await rng.choice((prefill.drop, decode.drop))(key)

    async def caller(prefill, decodes):
        for _ in range(NUM_CALLS):
            task = asyncio.ensure_future(call(prefill, decodes))
            try:
                async with asyncio.timeout(rng.choice((0.02, 0.1, 10.0, 10.0))):
                    await task
            except (TimeoutError, SparseVilaError) as error:
                failed.append(error)

    async def main():
        config = worker_fixtures.config_of(checkpoint, kind, engine={"prefix_bytes": 3 * most}, prefill={"copy_bytes": 3 * most})
        async with worker_fixtures.workers(config, decode=2) as ([prefill], decodes):
            await asyncio.gather(*(caller(prefill, decodes) for _ in range(NUM_CALLERS)))
            assert len(asked) > 10 and failed
            await settled(prefill)
            for decode in decodes:
                await settled(decode)
                for key in (await decode.info())["residents"]:
                    assert await decode.drop(key)
                assert decode.engine.prefixes.arena.used_bytes == 0 and decode.receiver.info()["bytes_in_flight"] == 0
            for key in (await prefill.info())["copies"]:
                assert await prefill.drop(key)
            assert prefill.copies.used_bytes == 0
            # And all of them are well: the next caller is served.
            request, question = next(iter(answers))
            handle, _ = await worker_fixtures.landed(prefill, decodes[0], request)
            events, _ = await events_of(decodes[0].ask(turn_of(handle.media_id, question)))
            assert tokens_of(events) == answers[request, question]

    asyncio.run(main())
