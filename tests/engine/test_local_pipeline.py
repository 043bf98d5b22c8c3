"""The local pipeline and its simple face, with real files and threads: reuse, sharing, eviction, deadlines, early leaving."""

import asyncio
import shutil
import threading
import time

import pytest

from sparsevila_cluster import VideoQA
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import (
    BadCheckpoint,
    BadConfig,
    BadMedia,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    NotFound,
    SparseVilaError,
    Unavailable,
)  # fmt: skip
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.media.clips import write_clip
from tests.processes import stop


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{i}.mp4", seed=i, frames=12) for i in range(3)]


@pytest.fixture(scope="module")
def qa(checkpoint):
    with VideoQA(checkpoint, prune_keep=0.5, retrieve_keep=0.3, max_frames=8) as qa:
        yield qa


def test_ask_and_stream_give_the_same_answers(qa, clips):
    video = qa.prepare(clips[0])
    assert video.num_frames == 6 and video.visual_tokens_kept * 2 == pytest.approx(video.visual_tokens, abs=6)
    assert video.kv_bytes < video.dense_kv_bytes
    one, two = qa.conversation(video), qa.conversation(video)
    for question in ("what is it?", "and then?"):
        answer = one.ask(question, max_tokens=9)
        pieces = list(two.stream(question, max_tokens=9))
        assert "".join(pieces) == answer.text and two.turns[-1][1].token_ids == answer.token_ids
        assert answer.usage.completion_tokens == len(answer.token_ids) and answer.timeline["ttft"] > 0
        assert sum(frame.share for frame in answer.evidence) == pytest.approx(1.0)


def test_same_media_is_found_again_however_it_is_named(qa, clips, tmp_path):
    first = qa.prepare(clips[1])
    copy = tmp_path / "other name.mp4"
    shutil.copy(clips[1], copy)
    before = qa.info()["prefills"]
    again = [qa.prepare(copy), qa.prepare(clips[1].read_bytes())]
    assert all(h.media_id == first.media_id and h.reused for h in again)
    assert qa.info()["prefills"] == before
    assert qa.prepare(clips[1], max_frames=2).media_id != first.media_id
    assert qa.prepare(clips[1], prune_keep=0.25).media_id != first.media_id


def test_callers_at_the_same_time_share_one_prefill(checkpoint, clips):
    with VideoQA(checkpoint) as qa:
        handles = []
        threads = [threading.Thread(target=lambda: handles.append(qa.prepare(clips[0]))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({h.media_id for h in handles}) == 1 and len(handles) == 6
        assert qa.info()["prefills"] == 1 and sum(not h.reused for h in handles) == 1


def test_threads_asking_at_once_get_their_own_answers(qa, clips):
    videos = [qa.prepare(clip) for clip in clips]
    questions = [f"question {i}?" for i in range(9)]
    alone = [qa.conversation(videos[i % 3]).ask(q, max_tokens=8).token_ids for i, q in enumerate(questions)]
    together = [None] * 9

    def ask(i):
        together[i] = qa.conversation(videos[i % 3]).ask(questions[i], max_tokens=8).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_leaving_a_stream_early_aborts_and_forgets_the_turn(qa, clips):
    chat, fresh = (qa.conversation(qa.prepare(clips[0])) for _ in range(2))
    stream = chat.stream("tell me everything", max_tokens=500)
    next(stream)
    stream.close()
    deadline = time.time() + 10
    while qa.info()["turns_running"] and time.time() < deadline:
        time.sleep(0.01)
    assert qa.info()["turns_running"] == 0 and chat.turns == []
    assert chat.ask("what?", max_tokens=6).token_ids == fresh.ask("what?", max_tokens=6).token_ids


def test_an_evicted_video_is_made_again_when_its_conversation_goes_on(checkpoint, clips):
    with VideoQA(checkpoint, prune="keep_all") as plain:
        chat = plain.conversation(plain.prepare(clips[0]))
        wanted = [chat.ask(q, max_tokens=5).token_ids for q in ("a?", "b?")]
        room = plain.prepare(clips[0]).kv_bytes
    with VideoQA(checkpoint, prune="keep_all", prefix_bytes=int(room * 1.5)) as qa:
        chat = qa.conversation(qa.prepare(clips[0]))
        got = [chat.ask("a?", max_tokens=5).token_ids]
        other = qa.prepare(clips[1])
        assert qa.info()["prefixes"] == 1 and qa.info()["prefixes_evicted"] == 1
        got.append(chat.ask("b?", max_tokens=5).token_ids)
        assert got == wanted and qa.info()["prefills"] == 3
        qa._run(qa.pipeline.delete_media(chat.media.media_id))
        with pytest.raises(NotFound, match="prepare it"):
            chat.ask("c?")
        assert qa.conversation(other).ask("d?", max_tokens=3).token_ids


def test_a_source_that_changed_is_not_mistaken_for_the_old_one(checkpoint, clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copy(clips[0], path)
    with VideoQA(checkpoint) as qa:
        chat = qa.conversation(qa.prepare(path))
        chat.ask("a?", max_tokens=2)
        shutil.copy(clips[1], path)
        qa._run(qa.pipeline.decode.call(lambda engine: engine.prefixes.remove(chat.media.media_id)))
        with pytest.raises(NotFound, match="changed"):
            chat.ask("b?", max_tokens=2)


def test_deadlines(checkpoint, clips):
    with VideoQA(checkpoint) as qa:
        with pytest.raises(DeadlineExceeded, match="1e-09 s"):
            qa.prepare(clips[0], timeout_s=1e-9)
        chat = qa.conversation(qa.prepare(clips[0]))
        qa.pipeline.model.chat.eos_ids = frozenset()  # nothing but the deadline ends this answer early
        with pytest.raises(DeadlineExceeded):
            chat.ask("a?", max_tokens=2000, timeout_s=0.02)
        assert chat.ask("a?", max_tokens=2).token_ids
        assert qa.info()["prefix_bytes"] == qa.prepare(clips[0]).kv_bytes


def test_a_preparation_that_ends_early_gives_its_bytes_back(checkpoint, clips):
    with VideoQA(checkpoint) as qa:
        for stop_at in ("decode", "encode", "prune", "prefill", "last layer"):

            def progress(stage, done, total, stop_at=stop_at):
                if stage == stop_at or (stop_at == "last layer" and stage == "prefill" and 1 < done == total):
                    raise Cancelled("enough")

            with pytest.raises(Cancelled):
                qa.prepare(clips[0], progress=progress)
            qa._run(qa.pipeline.decode.call(lambda engine: engine.check_integrity()))
            assert qa.info()["prefix_bytes"] == 0
        assert qa.prepare(clips[0]).kv_bytes == qa.info()["prefix_bytes"]


def test_bad_sources_and_parameters_leave_the_engine_well(qa, clips, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("this is no video")
    video = qa.prepare(clips[0])
    chat, used = qa.conversation(video), qa.info()["prefix_bytes"]
    for call, error in (
        (lambda: qa.prepare(text), BadMedia),
        (lambda: qa.prepare(tmp_path / "missing.mp4"), BadMedia),
        (lambda: qa.prepare([]), BadRequest),
        (lambda: qa.prepare(clips[0], max_frames=0), BadRequest),
        (lambda: qa.prepare(clips[0], max_frames=100000), SparseVilaError),
        (lambda: qa.prepare(clips[0], fps=-1), BadRequest),
        (lambda: qa.prepare(clips[0], prune_keep=1.5), BadRequest),
        (lambda: chat.ask("  "), BadRequest),
        (lambda: chat.ask("x", stop=[""]), BadRequest),
        (lambda: chat.ask("x", retrieve_keep=0), BadRequest),
        (lambda: chat.ask("x", colour=3), BadRequest),
        (lambda: chat.ask("x", max_tokens=0), BadRequest),
    ):
        with pytest.raises(error):
            call()
    assert chat.ask("fine?", max_tokens=4).token_ids and qa.info()["prefix_bytes"] == used


def test_bad_configuration_and_checkpoints(tmp_path):
    cases = (({"prune_keep": 0.0}, "prune_keep"), ({"colour": 1}, "legal keys"), ({"retrieve": "magic"}, "query_topk"))
    for fields, words in cases:
        with pytest.raises(BadConfig, match=words):
            VideoQA("demo", **fields)
    with pytest.raises(BadCheckpoint):
        VideoQA(tmp_path)


def test_dense_and_sparse_requests_differ_only_in_what_they_attend_to(checkpoint, clips):
    with VideoQA(checkpoint, prune="keep_all", retrieve_keep=0.1) as qa:
        video = qa.prepare(clips[0])
        assert video.visual_tokens == video.visual_tokens_kept
        sparse = qa.conversation(video).ask("hm?", max_tokens=4).usage
        dense = qa.conversation(video).ask("hm?", max_tokens=4, retrieve_keep=1.0).usage
        assert sparse.visual_tokens_retrieved < dense.visual_tokens_retrieved == video.visual_tokens


def test_a_question_may_choose_how_it_retrieves(checkpoint, clips):
    with VideoQA(checkpoint, prune_keep=0.5, retrieve_keep=0.4, brownout_floor=0.1) as qa:
        video, kept = qa.prepare(clips[0]), qa.prepare(clips[0]).visual_tokens_kept

        def used(**options):
            return qa.conversation(video).ask("hm?", max_tokens=8, **options).usage

        assert used(retrieve_mass=0.05).visual_tokens_retrieved < used().visual_tokens_retrieved
        assert used(retrieve_mass=1.0, refresh_every=2).visual_tokens_retrieved == used().visual_tokens_retrieved
        qa._run(qa.pipeline.set_brownout(1.0))
        assert qa.info()["brownout"] == 1.0
        low = used()
        assert low.degraded and low.effective_keep == low.visual_tokens_retrieved / kept < 0.2
        qa._run(qa.pipeline.set_brownout(0.0))
        assert not used().degraded and qa.info()["brownout"] == 0.0 and qa.info()["turns_preempted"] == 0
        for bad in ({"retrieve_mass": 2}, {"refresh_every": -3}):
            with pytest.raises(BadRequest, match=next(iter(bad))):
                used(**bad)


def test_closing_refuses_new_work_and_ends_old_work(checkpoint, clips):
    qa = VideoQA(checkpoint)
    pipeline, video = qa.pipeline, qa.prepare(clips[0])
    stream = qa.conversation(video).stream("on and on", max_tokens=2000)
    next(stream)
    qa.close()
    qa.close()
    assert not pipeline.decode.engine.turns
    pipeline.decode.engine.check_integrity()


def test_a_decoder_that_hangs_costs_one_preparation(checkpoint, clips):
    with VideoQA(checkpoint, decode_timeout_s=5.0) as qa:
        sandbox = qa.pipeline.prefill.engine.sandbox
        assert qa.conversation(qa.prepare(clips[0])).ask("what?", max_tokens=2).text is not None
        for pid in sandbox.pids():
            stop(pid)
        with pytest.raises(DeadlineExceeded, match="hung and was killed.*decode_timeout_s = 5 s"):
            qa.prepare(clips[1])
        assert qa.prepare(clips[1]).num_frames == 6 and sandbox.num_started == 2
    assert sandbox.pids() == []


def test_a_caller_who_leaves_while_the_turn_is_taken_leaves_no_turn(checkpoint, clips):
    async def main():
        pipeline = LocalPipeline(build_config(model=str(checkpoint)), load_model(checkpoint))
        handle = await pipeline.prepare(PrepareRequest((MediaSource(str(clips[0])),)))
        inside, go_on, plain = threading.Event(), threading.Event(), pipeline.decode.engine.submit

        def slow_submit(*args):
            inside.set()
            assert go_on.wait(10)
            plain(*args)

        pipeline.decode.engine.submit = slow_submit
        turn = Turn("t", "c", handle.media_id, "on and on?", SamplingParams(max_tokens=2000))
        caller = asyncio.ensure_future(anext(pipeline.ask(turn)))
        await asyncio.to_thread(inside.wait, 10)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        go_on.set()
        assert (await pipeline.info())["turns_running"] == 0 and not pipeline.decode.engine.turns
        await pipeline.close()

    asyncio.run(main())


def test_pipeline_in_one_event_loop(checkpoint, clips):
    async def main():
        pipeline = LocalPipeline(build_config(model=str(checkpoint)), load_model(checkpoint))
        stages = []
        request = PrepareRequest((MediaSource(str(clips[0])),))
        handle = await pipeline.prepare(request, lambda stage, done, total: stages.append(stage))
        assert list(dict.fromkeys(stages)) == ["decode", "encode", "prune", "prefill"]
        assert set(handle.ms) == {"decode", "encode", "prune", "prefill"}
        await pipeline.close()
        with pytest.raises(Unavailable):
            await pipeline.prepare(request)

    asyncio.run(main())
