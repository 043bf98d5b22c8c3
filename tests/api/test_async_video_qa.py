"""AsyncVideoQA with a real engine: many tasks, cancelling at any moment, leaving early, deadlines, closing."""

import asyncio
import gc
import threading
import time

import numpy as np
import pytest

from sparsevila_cluster import AsyncVideoQA, VideoQA
from sparsevila_cluster.api import async_video_qa
from sparsevila_cluster.core.call_options import ASK_OPTIONS, PREPARE_OPTIONS, AskOptions, PrepareOptions
from sparsevila_cluster.core.errors import BadConfig, BadRequest, DeadlineExceeded, NotFound, Unavailable
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn
from sparsevila_cluster.engine import turn_events
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.media.media_files import video_bytes

FIELDS = {"prune_keep": 0.5, "retrieve_keep": 0.3, "max_frames": 8}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0)


def noise(seed, num=8, side=112):
    """A short video, a few blurred colours in each frame."""
    rng = np.random.default_rng(seed)
    draw = rng.integers(0, 256, (num, side // 8, side // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return video_bytes(num, fps=4, size=(side, side), draw=lambda i: draw[i])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{seed}.mp4" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(noise(seed))
    return paths


def run(checkpoint, work, **fields):
    """`await work(qa)` on an open AsyncVideoQA, within a minute."""

    async def main():
        async with AsyncVideoQA(checkpoint, **FIELDS | fields) as qa:
            return await work(qa)

    return asyncio.run(asyncio.wait_for(main(), 60))


async def until(condition, what, within_s=20):
    give_up_at = time.time() + within_s
    while not await condition():
        assert time.time() < give_up_at, what
        await asyncio.sleep(0.01)


async def settled(qa):
    """Nothing runs, and every byte has an owner."""

    async def idle():
        info = await qa.info()
        return info["turns_running"] == info["turns_waiting"] == 0

    await until(idle, "turns go on for nobody")
    await (await qa.ready()).decode.call(lambda engine: engine.check_integrity())


# ---- the same as blocking ----------------------------------------------------------------------------------------------------


def test_it_answers_as_the_blocking_face_does(checkpoint, clips):
    questions = ("what is it?", "and then?")
    with VideoQA(checkpoint, **FIELDS) as blocking:
        chat = blocking.conversation(blocking.prepare(clips[0]))
        wanted = [chat.ask(question, max_tokens=7) for question in questions]
        drawn = chat.show()

    async def work(qa):
        media = await qa.prepare(clips[0])
        one, two = qa.conversation(media), qa.conversation(media)
        for question, answer in zip(questions, wanted, strict=True):
            got = await one.ask(question, max_tokens=7)
            assert (got.text, got.token_ids, got.evidence) == (answer.text, answer.token_ids, answer.evidence)
            assert "".join([piece async for piece in two.stream(question, max_tokens=7)]) == answer.text
        assert [question for question, _ in one.turns] == list(questions) and one.turns[1][1] == got
        assert two.turns[1][1].token_ids == got.token_ids and (await qa.info())["prefills"] == 1
        assert (await one.show()).tobytes() == drawn.tobytes()
        return got

    answer = run(checkpoint, work)
    assert answer.evidence.show().size[0] > 900  # after closing, too


def test_many_tasks_get_their_own_answers(checkpoint, clips):
    questions = [f"question {i}?" for i in range(9)]

    async def ask(qa, i):
        media = await qa.prepare(clips[i % 3])
        return (await qa.conversation(media).ask(questions[i], max_tokens=6)).token_ids

    async def work(qa):
        together = await asyncio.gather(*(ask(qa, i) for i in range(9)))
        assert (await qa.info())["prefills"] == 3
        assert [await ask(qa, i) for i in range(9)] == together

    run(checkpoint, work)


def test_options_are_known_by_name(checkpoint, clips):
    """A check on each side: what type checkers read is what is taken, and that is every field of a turn that users may set."""
    assert set(AskOptions.__annotations__) == ASK_OPTIONS and set(PrepareOptions.__annotations__) == PREPARE_OPTIONS
    fixed = {"turn_id", "conversation_id", "media_id", "question", "sampling", "want_evidence", "deadline_s"}
    fixed |= {"tenant", "owner", "after", "replay"}  # the gateway and a router set these
    assert set(Turn.__dataclass_fields__) - fixed <= ASK_OPTIONS
    assert set(PrepareRequest.__dataclass_fields__) - {"sources", "deadline_s", "tenant", "owner"} <= PREPARE_OPTIONS

    async def work(qa):
        chat = qa.conversation(await qa.prepare(clips[0]))
        for call in (lambda: chat.ask("x", colour=3), lambda: chat.stream("x", colour=3), lambda: qa.prepare(clips[0], colour=3)):
            with pytest.raises(BadRequest, match="unknown option 'colour'; legal: "):
                await call()
        for source in (None, 3, [clips[0], 3], []):
            with pytest.raises(BadRequest):
                await qa.prepare(source)
        for timeout_s in (0, -1, "1", True):
            with pytest.raises(BadRequest, match="deadline_s"):
                await qa.prepare(clips[0], timeout_s=timeout_s)
        answer = await chat.ask("x", max_tokens=2, evidence=False, retrieve_keep=1.0)
        assert not answer.evidence and answer.usage.effective_keep == 1.0
        with pytest.raises(BadRequest, match="evidence=True"):
            answer.evidence.show()

    run(checkpoint, work)
    with pytest.raises(BadConfig, match="legal keys"):
        AsyncVideoQA(checkpoint, colour=1)


# ---- cancelling and leaving --------------------------------------------------------------------------------------------------


def test_a_cancelled_task_aborts_its_turn_at_any_moment(checkpoint, clips):
    async def work(qa):
        media = await qa.prepare(clips[0])
        chat, fresh = qa.conversation(media), qa.conversation(media)
        (await qa.ready()).model.chat.eos_ids = frozenset()  # nothing ends an answer early
        for pause_s in (None, 0, 0.001, 0.003, 0.01, 0.03):
            task = asyncio.create_task(chat.ask("tell me everything", max_tokens=2000))
            if pause_s is not None:
                await asyncio.sleep(pause_s)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(qa)
        assert chat.turns == []
        assert (await chat.ask("what?", max_tokens=6)).token_ids == (await fresh.ask("what?", max_tokens=6)).token_ids

    run(checkpoint, work)


def test_a_turn_that_was_refused_is_not_aborted_under_its_owner(checkpoint, clips):
    """A second turn of the same id is an error, and the first one goes on."""

    async def work(qa):
        media, engine = await qa.prepare(clips[0]), await qa.ready()
        turn = Turn("one", "c", media.media_id, "what?")
        first = engine.ask(turn)
        assert (await anext(first)).kind == "accepted"
        with pytest.raises(BadRequest, match="already in use"):
            await anext(engine.ask(turn))
        assert [event.kind async for event in first][-1] == "done"

    run(checkpoint, work)


def test_leaving_a_stream_aborts_and_forgets_the_turn(checkpoint, clips):
    async def work(qa):
        media = await qa.prepare(clips[0])
        chat, fresh = qa.conversation(media), qa.conversation(media)
        (await qa.ready()).model.chat.eos_ids = frozenset()
        async for _ in chat.stream("tell me everything", max_tokens=2000):
            break
        gc.collect()
        await settled(qa)  # nobody holds the iterator any more
        open_stream = chat.stream("tell me everything", max_tokens=2000)
        await anext(open_stream)
        await open_stream.aclose()
        await settled(qa)
        assert chat.turns == []
        assert (await chat.ask("what?", max_tokens=6)).token_ids == (await fresh.ask("what?", max_tokens=6)).token_ids

    run(checkpoint, work)


def test_a_cancelled_preparation_ends_and_gives_its_bytes_back(checkpoint, clips):
    async def work(qa):
        reached, release = threading.Event(), threading.Event()

        def progress(stage, done, total):
            if stage == "prefill":
                reached.set()
                assert release.wait(20)

        task = asyncio.create_task(qa.prepare(clips[0], progress=progress))
        await asyncio.to_thread(reached.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        info = await qa.info()
        assert info["prefills"] == 0
        assert not (await qa.prepare(clips[0])).reused
        await settled(qa)
        assert (await qa.info())["prefix_bytes"] == (await qa.prepare(clips[0])).kv_bytes

    run(checkpoint, work)


def test_of_several_callers_one_may_leave(checkpoint, clips):
    async def work(qa):
        callers = [asyncio.create_task(qa.prepare(clips[0])) for _ in range(3)]
        await asyncio.sleep(0.02)
        callers[0].cancel()
        told = await asyncio.gather(*callers, return_exceptions=True)
        assert isinstance(told[0], asyncio.CancelledError | MediaHandle)
        assert told[1].media_id == told[2].media_id and (await qa.info())["prefixes"] == 1

    run(checkpoint, work)


# ---- deadlines and the end ---------------------------------------------------------------------------------------------------


@pytest.fixture
def short_grace(monkeypatch):
    for module in (async_video_qa, turn_events):
        monkeypatch.setattr(module, "GRACE_S", 0.05)


def test_a_turn_has_a_deadline_even_when_the_engine_hangs(checkpoint, clips, short_grace):
    async def work(qa):
        chat, hang = qa.conversation(await qa.prepare(clips[0])), threading.Event()
        engine = await qa.ready()
        engine.decode.post(lambda engine: hang.wait(20))
        started = time.perf_counter()
        with pytest.raises(DeadlineExceeded, match="of at most 0.2 s"):
            await chat.ask("what?", max_tokens=3, timeout_s=0.1)
        assert time.perf_counter() - started < 5
        hang.set()
        await settled(qa)
        assert (await chat.ask("what?", max_tokens=3)).token_ids and len(chat.turns) == 1

    run(checkpoint, work)


def test_a_slow_reader_gets_what_has_arrived(checkpoint, clips, short_grace):
    async def work(qa):
        chat = qa.conversation(await qa.prepare(clips[0]))
        (await qa.ready()).model.chat.eos_ids = frozenset()
        pieces = []
        async for piece in chat.stream("what?", max_tokens=30, timeout_s=5):
            if not pieces:
                await settled(qa)
                await asyncio.sleep(0.1)
            pieces.append(piece)
        assert "".join(pieces) == chat.turns[0][1].text and len(chat.turns[0][1].token_ids) == 30

    run(checkpoint, work)


def test_closing_has_a_deadline_even_when_the_engine_hangs(checkpoint, short_grace):
    async def main():
        qa, hang = AsyncVideoQA(checkpoint, close_timeout_s=0.05), threading.Event()
        thread = (await qa.ready()).decode._thread
        thread.post(lambda engine: hang.wait(20))
        started = time.perf_counter()
        with pytest.raises(DeadlineExceeded):
            await qa.close()
        assert time.perf_counter() - started < 5
        await qa.close()  # idempotent
        hang.set()
        await asyncio.to_thread(thread._thread.join, 20)
        assert not thread._thread.is_alive()

    asyncio.run(main())


def test_closing_ends_what_runs_and_refuses_the_rest(checkpoint, clips):
    async def main():
        qa = await AsyncVideoQA(checkpoint, **FIELDS).load()
        media, engine = await qa.prepare(clips[0]), await qa.ready()
        engine.model.chat.eos_ids = frozenset()
        chat = qa.conversation(media)
        asking = asyncio.create_task(chat.ask("on and on", max_tokens=2000))
        stream = chat.stream("on and on", max_tokens=2000)
        reached = threading.Event()
        preparing = [
            asyncio.create_task(qa.prepare(clips[i], progress=lambda *_: reached.set() or time.sleep(0.05))) for i in (1, 2)
        ]
        await asyncio.to_thread(reached.wait, 20)
        await qa.close()
        told = await asyncio.gather(asking, *preparing, return_exceptions=True)
        assert [type(error) for error in told] == [Unavailable] * 3, told
        for call in (chat.ask("x"), anext(stream), qa.prepare(clips[0]), qa.info(), chat.close(), qa.load()):
            with pytest.raises(Unavailable, match="closed"):
                await call
        engine.decode.engine.check_integrity()
        assert not engine.decode.engine.turns
        await qa.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_conversation_about_media_from_elsewhere_has_no_picture(checkpoint, clips):
    async def work(qa):
        media = await qa.prepare(clips[0])
        elsewhere = MediaHandle(**{**vars(media), "origin": None})
        chat = qa.conversation(elsewhere)
        answer = await chat.ask("what?", max_tokens=2)
        assert elsewhere == media
        with pytest.raises(NotFound):
            await chat.show()
        with pytest.raises(NotFound):
            answer.evidence.show()

    run(checkpoint, work)
