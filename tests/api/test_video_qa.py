"""VideoQA, which blocks: waits that end, threads that share it, Ctrl-C, callbacks; what it answers is tested in test_pipeline."""

import asyncio
import os
import signal
import threading
import time

import pytest

from sparsevila_cluster import VideoQA
from sparsevila_cluster.api import async_video_qa, video_qa
from sparsevila_cluster.core import event_loop_thread
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, NotFound, Unavailable
from tests.api.test_async_video_qa import FIELDS, checkpoint, clips  # noqa: F401 (fixtures)


@pytest.fixture
def qa(checkpoint):  # noqa: F811
    with VideoQA(checkpoint, **FIELDS) as qa:
        yield qa


def in_thread(call):
    """Start `call` in a thread; a list that will hold its result or its error."""
    told = []

    def work():
        try:
            told.append(call())
        except Exception as error:
            told.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, told


def test_evidence_shows_itself_also_after_closing(qa, clips):  # noqa: F811
    chat = qa.conversation(qa.prepare([clips[0], clips[1].read_bytes()], max_frames=4))
    answer = chat.ask("what?", max_tokens=3)
    assert {one.media for one in answer.evidence} == {0, 1}
    assert {one.frame for one in answer.evidence if one.media == 1} == {0, 2}
    *_, last = chat.stream("and?", max_tokens=3)
    qa.close()
    one, two, both = answer.evidence.show(), chat.turns[1][1].evidence.show(), chat.show()
    assert one.size[0] == both.size[0] and both.size[1] > one.size[1] == two.size[1]


def test_no_wait_is_endless_when_the_event_loop_hangs(qa, monkeypatch):
    for module in (async_video_qa, event_loop_thread, video_qa):
        monkeypatch.setattr(module, "GRACE_S", 0.05)
    hang = threading.Event()
    qa._thread.loop.call_soon_threadsafe(hang.wait, 20)
    with pytest.raises(DeadlineExceeded, match="no answer within 0.15 s"):
        qa._run(asyncio.sleep(0), 0.1)
    hang.set()
    assert qa.info()["steps"] == 0


def test_threads_that_wait_are_told_when_it_is_closed(qa, clips):  # noqa: F811
    media = qa.prepare(clips[0])
    qa.pipeline.model.chat.eos_ids = frozenset()
    asking = in_thread(lambda: qa.conversation(media).ask("on and on", max_tokens=2000))
    streaming = in_thread(lambda: list(qa.conversation(media).stream("on and on", max_tokens=2000)))
    waiting = in_thread(lambda: qa._run(asyncio.sleep(60), 60))
    give_up_at = time.time() + 20
    while qa.info()["turns_running"] < 2:
        assert time.time() < give_up_at
    qa.close()
    for thread, told in (asking, streaming, waiting):
        thread.join(20)
        assert [type(error) for error in told] == [Unavailable], told
    for call in (qa.info, lambda: qa.prepare(clips[0]), lambda: qa.ask_many([(clips[0], "x")]), lambda: qa.pipeline):
        with pytest.raises(Unavailable, match="closed"):
            call()
    assert not qa._thread.thread.is_alive() and qa._thread.loop.is_closed()


def test_control_c_ends_a_preparation(qa, clips, interruptible):  # noqa: F811
    reached, release = threading.Event(), threading.Event()

    def progress(stage, done, total):
        if stage == "encode":
            if not reached.is_set():
                reached.set()
                os.kill(os.getpid(), signal.SIGINT)
            assert release.wait(20)

    with pytest.raises(KeyboardInterrupt):
        qa.prepare(clips[0], progress=progress)
    qa.info()  # the event loop has cancelled the preparation by now
    release.set()
    assert reached.is_set() and not qa.prepare(clips[0]).reused and qa.info()["prefills"] == 1


def test_a_callback_that_calls_back_is_told_so(qa, clips):  # noqa: F811
    told = []

    def progress(stage, done, total):
        with pytest.raises(BadRequest, match="progress function"):
            qa.info()
        told.append(done)

    assert qa.ask_many([(clips[0], "what?")], max_tokens=2, progress=progress)[0].answer.text is not None
    assert told == [0, 1]


def test_mistakes_show_before_a_stream_is_read(qa, clips):  # noqa: F811
    chat = qa.conversation(qa.prepare(clips[0]))
    with pytest.raises(BadRequest, match="non-empty"):
        chat.stream(" ")
    chat.close()
    with pytest.raises(NotFound):
        stale = qa.conversation(qa.prepare(clips[0], prune_keep=0.9))
        qa._run(qa.pipeline.delete_media(stale.media.media_id))
        stale.ask("x")
