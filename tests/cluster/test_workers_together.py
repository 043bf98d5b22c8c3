"""Prefill and decode workers with real engines in one process: what lands is what a local pipeline makes, answers too."""

import asyncio

import pytest
import torch

from sparsevila_cluster.core.requests import Answer
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import DECODE_PARTS, PREFILL_PARTS
from tests.checkpoints.families import FAMILIES
from tests.cluster import worker_fixtures
from tests.cluster.worker_fixtures import QUESTIONS, answer, events_of, prepared, request_of, tokens_of, turn_of

KINDS = ("inproc", "gloo", "objectstore")


def given_for(kind):
    return {"object_store": worker_fixtures.LocalObjectStore()} if kind == "objectstore" else {}


@pytest.fixture(scope="session")
def local(checkpoint, clips):
    """What one process with both engines makes of each clip: (handle, rows of KV, tokens of three answers in a row)."""

    async def main():
        config = worker_fixtures.config_of(checkpoint)
        pipeline = LocalPipeline(config.engine, load_model(checkpoint), config.secret)
        made = []
        for clip in clips:
            handle = await pipeline.prepare(request_of(clip))
            rows = await pipeline.decode.call(lambda engine, key=handle.media_id: worker_fixtures.rows_of(engine.prefixes.get(key)))
            answers = []
            for question in QUESTIONS:
                events = [event async for event in pipeline.ask(turn_of(handle.media_id, question, handle.media_id))]
                answers.append(tokens_of(events))
            made.append((handle, rows, answers))
        await pipeline.close()
        return made

    return asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_lands_bit_equal_and_is_answered_from(checkpoint, clips, local, kind):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, kind), **given_for(kind)) as ([prefill], [decode]):
            assert prefill.model.parts == PREFILL_PARTS and prefill.model.text.head_weight is None
            assert decode.model.parts == DECODE_PARTS
            for clip, (handle, rows, answers) in zip(clips, local, strict=True):
                got, report = await prepared(prefill, decode, request_of(clip))
                assert got.media_id == handle.media_id and not got.reused and set(got.ms) == {*handle.ms, "transfer"}
                assert (got.kv_bytes, got.visual_tokens_kept) == (handle.kv_bytes, handle.visual_tokens_kept)
                assert report["kind"] == kind and report["num_bytes"] >= handle.kv_bytes and report["attempts"] == 1
                prefix = decode.engine.prefixes.get(handle.media_id)
                assert all(torch.equal(a, b) for a, b in zip(worker_fixtures.rows_of(prefix), rows, strict=True))
                kept = prefill.copies.all()[-1]
                assert all(torch.equal(a, b) for a, b in zip(worker_fixtures.rows_of(kept), rows, strict=True))
                for question, tokens in zip(QUESTIONS, answers, strict=True):
                    assert await answer(decode, turn_of(handle.media_id, question, handle.media_id)) == tokens
            assert prefill.num_prefills == len(clips)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_and_a_resident_prefix_are_shipped_without_a_prefill(checkpoint, clips, local, kind):
    handle, rows, answers = local[0]
    key = handle.media_id

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, kind), decode=3, **given_for(kind)) as (
            [prefill],
            decodes,
        ):
            await prepared(prefill, decodes[0], request_of(clips[0]))
            await prefill.ship(key, await worker_fixtures.ticket_for(decodes[1], key, num_bytes=handle.kv_bytes))
            await decodes[1].ship(key, await worker_fixtures.ticket_for(decodes[2], key, num_bytes=handle.kv_bytes))
            # Who asks for it to be made once more gets the copy.
            again, _, progress = await worker_fixtures.made(
                prefill, request_of(clips[0]), key, await worker_fixtures.ticket_for(decodes[1], key, num_bytes=handle.kv_bytes)
            )
            assert again.reused and not progress and prefill.num_prefills == 1
            assert prefill.sink.counts[("prefills_total",)] == 1
            for decode in decodes:
                prefix = decode.engine.prefixes.get(key)
                assert all(torch.equal(a, b) for a, b in zip(worker_fixtures.rows_of(prefix), rows, strict=True))
                assert await answer(decode, turn_of(key)) == answers[0]
                assert decode.engine.prefixes.arena.used_bytes == handle.kv_bytes

    asyncio.run(main())


def test_int8_on_the_wire_is_close_and_smaller(checkpoint, clips, local):
    plain, rows, _ = local[0]

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint, transport={"quantization": "int8"})) as (
            [prefill],
            [decode],
        ):
            handle, report = await prepared(prefill, decode, request_of(clips[0]))
            assert handle.media_id != plain.media_id and handle.kv_bytes == plain.kv_bytes
            assert report["num_bytes"] < 0.5 * handle.kv_bytes
            kept, landed_rows = (
                worker_fixtures.rows_of(prefill.copies.all()[0]),
                worker_fixtures.rows_of(decode.engine.prefixes.get(handle.media_id)),
            )
            assert all(torch.equal(a, b) for a, b in zip(kept, rows, strict=True))
            for a, b in zip(landed_rows, rows, strict=True):
                assert not torch.equal(a, b) and torch.allclose(a, b, atol=float(b.abs().max()) / 127)
            assert await answer(decode, turn_of(handle.media_id))

    asyncio.run(main())


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_other_families_are_served_by_workers_with_only_their_parts(family, tmp_path, clips):
    """Warmed first, as a worker is."""
    model_dir = FAMILIES[family].make(tmp_path / "model")

    async def main():
        room = 16 * 2**20
        config = worker_fixtures.config_of(model_dir, engine={"max_frames": 4, "prefix_bytes": room}, prefill={"copy_bytes": room})
        pipeline = LocalPipeline(config.engine, load_model(model_dir), config.secret)
        async with worker_fixtures.workers(config) as ([prefill], [decode]):
            await prefill.warm()
            await decode.warm()
            request = request_of(clips[0])
            handle = await pipeline.prepare(request)
            assert (await prepared(prefill, decode, request))[0].media_id == handle.media_id
            for question in QUESTIONS[:2]:
                events = [event async for event in pipeline.ask(turn_of(handle.media_id, question))]
                assert await answer(decode, turn_of(handle.media_id, question)) == tokens_of(events)
        await pipeline.close()

    asyncio.run(main())


def test_many_at_once_get_their_own_answers(checkpoint, clips, local):
    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint), prefill=2, decode=2) as (prefills, decodes):
            pairs = [(prefill, decode, clip) for prefill, clip in zip(prefills, clips, strict=True) for decode in decodes]
            await asyncio.gather(*(prepared(prefill, decode, request_of(clip)) for prefill, decode, clip in pairs))
            assert [prefill.num_prefills for prefill in prefills] == [1, 1]

            async def talk(decode, handle, answers, name):
                for question, tokens in zip(QUESTIONS, answers, strict=True):
                    assert await answer(decode, turn_of(handle.media_id, question, name)) == tokens

            talks = [(decode, handle, answers, f"{i}") for decode in decodes for handle, _, answers in local for i in range(3)]
            await asyncio.gather(*(talk(d, h, a, f"{h.media_id}-{n}") for d, h, a, n in talks))

    asyncio.run(main())


def test_an_answer_is_told_as_the_local_pipeline_tells_it(checkpoint, clips, local):
    handle, _, answers = local[0]

    async def main():
        async with worker_fixtures.workers(worker_fixtures.config_of(checkpoint)) as ([prefill], [decode]):
            await prepared(prefill, decode, request_of(clips[0]))
            events, _ = await events_of(decode.ask(turn_of(handle.media_id, want_evidence=True)))
            assert [event.kind for event in events[:1]] == ["accepted"] and events[-1].kind == "done"
            told = Answer.from_events(events)
            assert told.token_ids == answers[0] and told.usage.visual_tokens_kept == handle.visual_tokens_kept
            assert sum(frame.share for frame in told.evidence) == pytest.approx(1.0)
            assert [event.index for event in events if event.kind == "token"] == list(range(len(answers[0])))

    asyncio.run(main())
