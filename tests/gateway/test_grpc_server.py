"""Answers over gRPC are those of the pipeline behind it: streaming and unary, several turns, clients at the same time."""

import asyncio
import json

import numpy as np
import pytest

import sparsevila_cluster
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.gateway.running_servers import ask, locally, prepare, run, running_server, streamed, upload

QUESTIONS = ["what is it?", "and then?", "where is the star?"]


def test_three_turns_streamed_and_whole_are_those_of_the_pipeline(checkpoint, clips):
    async def work(served):
        wanted = await locally(served.pipeline, clips[0], QUESTIONS)
        media = await prepare(served.stub, clips[0])
        assert media.reused and media.visual_tokens_kept < media.visual_tokens and media.kv_bytes < media.dense_kv_bytes
        one = two = ""
        for question, answer in zip(QUESTIONS, wanted, strict=True):
            request = ask(media.media_id, question, conversation_id=one, want_evidence=True)
            text, ids, events = await streamed(served.stub, request)
            assert (text, ids) == (answer.text, answer.token_ids)
            one = events[-1].done.conversation_id
            assert events[0].accepted.conversation_id == one and events[0].accepted.turn_id
            whole = await served.stub.Answer(ask(media.media_id, question, conversation_id=two, want_evidence=True))
            two = whole.conversation_id
            assert (whole.text, tuple(whole.token_ids), whole.finish_reason) == (text, ids, str(answer.finish_reason))
            (evidence,) = (event.evidence for event in events if event.HasField("evidence"))
            assert evidence == whole.evidence and sum(f.share for f in evidence.frames) == pytest.approx(1)
            assert [(f.frame, f.time_s) for f in evidence.frames] == [(f.frame, f.time_s) for f in answer.evidence if f.cells]
            told = events[-1].done.usage
            assert (told.visual_tokens, told.visual_tokens_kept) == (answer.usage.visual_tokens, answer.usage.visual_tokens_kept)
            assert told.prompt_tokens == answer.usage.prompt_tokens and told.ms["total"] > 0
        assert one != two and (await served.pipeline.info())["prefills"] == 1
        await served.settled()
        counts, observed = served.sink.counts, served.sink.observed
        assert counts["requests_total", "Ask", "OK"] == counts["requests_total", "Answer", "OK"] == 3
        assert observed["request_ttft_seconds", "first", "warm"] == 2 and observed["request_ttft_seconds", "later", "warm"] == 4
        assert observed["request_e2e_seconds", "later"] == 4 and observed["request_tpot_seconds",] == 6

    run(checkpoint, work)


def test_clients_at_the_same_time_get_their_own_answers(checkpoint, clips):
    async def work(served):
        wanted = [await locally(served.pipeline, data, QUESTIONS, 12, str(i)) for i, data in enumerate(clips)]

        async def client(i):
            media = await prepare(served.stub, clips[i % 3])
            conversation_id, got = "", []
            for question in QUESTIONS:
                text, ids, events = await streamed(served.stub, ask(media.media_id, question, 12, conversation_id=conversation_id))
                conversation_id = events[-1].done.conversation_id
                got.append((text, ids))
            return got

        for i, got in enumerate(await asyncio.gather(*(client(i) for i in range(9)))):
            assert got == [(answer.text, answer.token_ids) for answer in wanted[i % 3]]
        assert (await served.pipeline.info())["prefills"] == 3

    run(checkpoint, work)


def test_a_cold_media_is_told_stage_by_stage_and_found_again_however_it_is_sent(checkpoint, clips, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clips[0])

    async def work(served):
        sent = await upload(served.stub, clips[0], step=500)
        assert sent.num_bytes == len(clips[0]) and sent.expires_in_s > 0
        request = pb.PrepareMediaRequest(sources=[pb.MediaSource(upload_id=sent.upload_id)])
        statuses = [status async for status in served.stub.PrepareMedia(request)]
        stages = [status.stage for status in statuses[:-1]]
        assert list(dict.fromkeys(stages)) == ["decode", "encode", "prune", "prefill"]
        media = statuses[-1].media
        assert not media.reused and set(media.ms) == {"decode", "encode", "prune", "prefill"}
        again = [pb.MediaSource(inline=clips[0]), pb.MediaSource(file="clip.mp4"), pb.MediaSource(file=str(tmp_path / "clip.mp4"))]
        for source in again:
            found = await prepare(served.stub, source)
            assert found.reused and found.media_id == media.media_id
        assert (await prepare(served.stub, clips[0], prune_keep=0.25)).media_id != media.media_id
        known = await served.stub.GetMedia(pb.GetMediaRequest(media_id=media.media_id))
        assert (known.prefix_tokens, known.kv_bytes) == (media.prefix_tokens, media.kv_bytes)
        await streamed(served.stub, ask(media.media_id))
        assert served.sink.observed["request_ttft_seconds", "first", "cold"] == 1
        for deleted in (True, False):
            assert (await served.stub.DeleteMedia(pb.DeleteMediaRequest(media_id=media.media_id))).deleted == deleted
        assert served.service._spool.num_bytes == len(clips[0])  # the upload stays; what came inline is gone

    run(checkpoint, work, file_root=str(tmp_path))


def test_several_sources_make_one_media(checkpoint, clips):
    async def work(served):
        sources = [pb.MediaSource(inline=clip) for clip in clips[:2]]
        both = [s async for s in served.stub.PrepareMedia(pb.PrepareMediaRequest(sources=sources))][-1].media
        alone = await prepare(served.stub, clips[0])
        assert both.num_frames == 2 * alone.num_frames and both.media_id != alone.media_id
        _, _, events = await streamed(served.stub, ask(both.media_id, want_evidence=True))
        (evidence,) = (event.evidence for event in events if event.HasField("evidence"))
        assert {frame.media for frame in evidence.frames} <= {0, 1} and evidence.frames

    run(checkpoint, work)


def test_a_broken_stream_goes_on_behind_what_was_said(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        text, ids, _ = await streamed(served.stub, ask(media.media_id, max_tokens=12))
        rest, all_ids, _ = await streamed(served.stub, ask(media.media_id, max_tokens=12, said_token_ids=ids[:5]))
        assert all_ids == ids and text.endswith(rest.lstrip("\ufffd"))

    run(checkpoint, work)


def test_the_server_tells_its_limits_and_what_it_does(checkpoint, clips):
    async def work(served):
        await prepare(served.stub, clips[0])
        info = await served.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.fingerprint == served.pipeline.model.fingerprint and info.version
        assert (info.max_inline_bytes, info.max_message_bytes) == (1 << 20, 2 << 20)
        details = json.loads(info.details_json)
        assert details["prefixes"] == 1 and details["door"] == {"calls": 1, "spool_bytes": 0}

    run(checkpoint, work, max_inline_bytes=1 << 20, max_message_bytes=2 << 20)


def test_the_demo_model_answers_rightly_over_grpc(tmp_path):
    model = next(iter(sparsevila_cluster.__path__)) + "/demo/checkpoint"
    scene, frames = make_video(500)
    write_mp4(frames, tmp_path / "film.mp4")
    asked = make_questions(scene, np.random.default_rng(0), 6)

    async def main():
        pipeline = LocalPipeline(build_config(model=model))
        async with running_server(model, pipeline=pipeline) as served:
            media = await prepare(served.stub, (tmp_path / "film.mp4").read_bytes())
            replies = await asyncio.gather(*(served.stub.Answer(ask(media.media_id, q.text, 32)) for q in asked))
            return [reply.text.strip() for reply in replies]

    right = [said == q.answer for said, q in zip(asyncio.run(asyncio.wait_for(main(), 60)), asked, strict=True)]
    assert sum(right) >= 5, right
