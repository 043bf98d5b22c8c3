"""Many conversations at once: the answers of one at a time, each media prepared once, failures in their place, queues that fill."""

import asyncio
import sys
from io import StringIO

import pytest

from sparsevila_cluster import Ask, AsyncVideoQA, VideoQA
from sparsevila_cluster.core.errors import BadMedia, BadRequest, Cancelled, DeadlineExceeded, QueueFull, TooLarge
from tests.api.test_async_video_qa import FIELDS, checkpoint, clips, run, settled  # noqa: F401 (fixtures)
from tests.core.test_progress_line import Terminal

QUESTIONS = ("what is it?", "and then?", "where is the circle?")


def one_by_one(checkpoint, asks, **options):  # noqa: F811
    with VideoQA(checkpoint, **FIELDS) as qa:
        found = []
        for source, questions in asks:
            chat = qa.conversation(qa.prepare(source))
            found.append([chat.ask(question, **options).token_ids for question in questions])
        return found


def test_results_are_those_of_one_at_a_time_in_the_order_of_the_items(checkpoint, clips):  # noqa: F811
    asks = [(clips[i % 3], [f"{QUESTIONS[j]} {i}" for j in range(1 + i % 3)]) for i in range(10)]
    wanted = one_by_one(checkpoint, asks, max_tokens=5)

    async def work(qa):
        results = await qa.ask_many(iter(asks), max_tokens=5, progress=False)
        assert [[answer.token_ids for answer in result.answers] for result in results] == wanted
        assert all(result.error is None and result.answer is result.answers[-1] for result in results)
        assert [result.media.media_id for result in results[:3]] == [(await qa.prepare(clip)).media_id for clip in clips]
        info = await qa.info()
        assert info["prefills"] == 3 and info["conversations"] == 0
        # Together: far fewer steps than tokens.
        assert info["steps"] < sum(len(tokens) for answers in wanted for tokens in answers) / 2
        assert results[4].answers[1].evidence.show().size[0] > 900

    run(checkpoint, work)


def test_every_form_of_an_item(checkpoint, clips):  # noqa: F811
    with VideoQA(checkpoint, **FIELDS) as qa:
        handle = qa.prepare(clips[0])
        data = clips[1].read_bytes()
        results = qa.ask_many(
            [
                (clips[0], "one?"),
                (handle, ["one?"]),
                (str(clips[0]), ("one?", "two?")),
                ([clips[0], data], "one?"),
                Ask(data, "one?", {"max_tokens": 1}, {"max_frames": 2}),
                Ask(data, "one?", prepare={"max_frames": 2}),
            ],
            max_tokens=3,
            prepare={"fps": 2.0},
        )
        assert [len(result.answers) for result in results] == [1, 1, 2, 1, 1, 1]
        assert [len(result.answer.token_ids) for result in results] == [3, 3, 3, 3, 1, 3]
        assert results[0].answer.token_ids == qa.conversation(handle).ask("one?", max_tokens=3).token_ids
        assert [result.media.num_frames for result in results[3:]] == [8, 2, 2]
        assert qa.info()["prefills"] == 3
        assert qa.ask_many([]) == [] and qa.ask_many([(handle, "x")], max_tokens=1)[0].media is handle


def test_what_fails_is_told_in_its_place_and_harms_no_other(checkpoint, clips, tmp_path):  # noqa: F811
    text = tmp_path / "notes.mp4"
    text.write_text("this is no video")
    asks = [
        (clips[0], ["what?", "  ", "never asked"]),
        (text, ["what?", "and?"]),
        (clips[0], "what?"),
        (text, "what else?"),
        Ask(clips[1], "what?", {"colour": 3}),
        Ask(clips[1], "what?", prepare={"max_frames": 0}),
        (clips[1], "word " * 5000),
        (None, "what?"),
        (clips[1], "what?"),
    ]
    wanted = one_by_one(checkpoint, [(clips[0], ["what?"]), (clips[1], ["what?"])], max_tokens=4)
    counts = []

    async def work(qa):
        results = await qa.ask_many(asks, max_tokens=4, progress=lambda stage, done, total: counts.append((stage, done, total)))
        kinds = [BadRequest, BadMedia, None, BadMedia, BadRequest, BadRequest, TooLarge, BadRequest, None]
        assert [result.error and type(result.error) for result in results] == kinds
        assert [[answer.token_ids for answer in results[i].answers] for i in (0, 2, 8)] == [wanted[0], wanted[0], wanted[1]]
        with pytest.raises(BadMedia, match="notes.mp4"):
            results[1].answer  # noqa: B018 (raises)
        assert "notes.mp4" in repr(results[1]) and len(repr(results[0])) < 600
        await settled(qa)

    run(checkpoint, work)
    assert counts[0] == ("ask", 0, 12) and counts[-1] == ("ask", 12, 12)
    assert [done for _, done, _ in counts] == sorted(done for _, done, _ in counts)


def test_queues_that_are_full_do_not_make_it_fail(checkpoint, clips):  # noqa: F811
    """More conversations than may wait, while somebody else fills the queue as well."""
    asks = [(clips[i % 2], ["a?", "b?"]) for i in range(12)]
    wanted = one_by_one(checkpoint, asks, max_tokens=4)

    async def work(qa):
        media, full = await qa.prepare(clips[2]), 0

        async def rival(i):
            nonlocal full
            try:
                await qa.conversation(media).ask("me first", max_tokens=20)
            except QueueFull:
                full += 1

        rivals = [asyncio.create_task(rival(i)) for i in range(6)]
        results = await qa.ask_many(asks, max_tokens=4, max_parallel=12)
        await asyncio.gather(*rivals)
        assert [[answer.token_ids for answer in result.answers] for result in results] == wanted
        assert full, "the queue was never full"

    run(checkpoint, work, max_waiting=1, max_batch=2)


def test_a_queue_that_stays_full_is_told_at_the_deadline(checkpoint, clips, monkeypatch):  # noqa: F811
    from sparsevila_cluster.api import ask_many, async_video_qa
    from sparsevila_cluster.core import conversation

    monkeypatch.setattr(async_video_qa, "GRACE_S", 0.0)

    async def work(qa):
        async def full(self, question, **options):
            raise QueueFull("256 turns wait already", retry_after_s=0.03)

        monkeypatch.setattr(conversation.AsyncChat, "ask", full)
        results = await qa.ask_many([(clips[0], ["a?", "b?"])], timeout_s=0.1)
        assert isinstance(results[0].error, QueueFull) and results[0].answers == ()
        assert ask_many.ask_many_limit_s(qa, [Ask("x", ["a?", "b?"])], {"timeout_s": 1}, {"timeout_s": 0.1}) == pytest.approx(2.4)

    run(checkpoint, work)


def test_media_that_do_not_fit_together_take_turns(checkpoint, clips, monkeypatch):  # noqa: F811
    """Without waiting for room, each preparation would drive out media that are still asked about."""
    from sparsevila_cluster.api import ask_many
    from sparsevila_cluster.core import conversation

    with VideoQA(checkpoint, **FIELDS) as qa:
        room = max(qa.prepare(clip).kv_bytes for clip in clips)
    asks = [(clips[i % 3], ["a?", "b?", "c?"]) for i in range(9)]
    wanted = one_by_one(checkpoint, asks, max_tokens=6)

    async def work(qa):
        results = await qa.ask_many(asks, max_tokens=6)
        assert [[answer.token_ids for answer in result.answers] for result in results] == wanted
        info = await qa.info()
        assert info["prefills"] == 3 and info["prefixes_evicted"] == 2 and info["prefixes"] == 1

    run(checkpoint, work, prefix_bytes=int(1.5 * room))

    async def stuck(qa):
        answered = asyncio.Event()

        async def ask(self, question, **options):
            await answered.wait()
            raise BadMedia("at last")

        monkeypatch.setattr(conversation.AsyncChat, "ask", ask)
        monkeypatch.setattr(ask_many, "ask_many_limit_s", lambda *call: 0.5)
        working = asyncio.create_task(qa.ask_many([(clip, "?") for clip in clips], progress=False))
        await asyncio.sleep(1.0)
        answered.set()
        assert [type(result.error) for result in await working] == [BadMedia, DeadlineExceeded, DeadlineExceeded]

    run(checkpoint, stuck, prefix_bytes=int(1.5 * room))


MALFORMED = [
    "clip.mp4", ("clip.mp4",), ("clip.mp4", "a?", "b?"), ["clip.mp4", "a?"], ("clip.mp4", []), None, ("clip.mp4", 3),
    ("clip.mp4", ["a?", None]), (3, "a?"), (["clip.mp4", 3], "a?"),
]  # fmt: skip


@pytest.mark.parametrize("api", [VideoQA, AsyncVideoQA])
def test_items_of_another_form_are_told_in_their_place_and_harm_no_other(checkpoint, clips, api):  # noqa: F811
    unusual = [
        Ask(clips[0], "a?", {"stop": 5}), Ask(clips[0], "a?", {"timeout_s": "soon"}), Ask(clips[0], "a?", {"max_tokens": []}),
        Ask(clips[0], "a?", prepare={"timeout_s": "soon"}), Ask(clips[0], "a?", prepare={"prune_keep": {}}),
    ]  # fmt: skip
    items = [(clips[0], "first?"), *MALFORMED, *unusual, (clips[0], "last?")]
    if api is VideoQA:
        with VideoQA(checkpoint, **FIELDS) as qa:
            results = qa.ask_many(items, max_tokens=2)
    else:
        results = asyncio.run(_ask_all(checkpoint, items))
    assert [result.error is None for result in results] == [True, *[False] * (len(items) - 2), True]
    for item, result in zip(items[1:-1], results[1:-1], strict=True):
        assert type(result.error) is BadRequest and (result.ask is item or not isinstance(item, Ask)), item
        assert "error" in repr(result)
    assert len(results[0].answer.token_ids) == len(results[-1].answer.token_ids) == 2


async def _ask_all(checkpoint, items):  # noqa: F811
    async with AsyncVideoQA(checkpoint, **FIELDS) as qa:
        return await qa.ask_many(iter(items), max_tokens=2)


@pytest.mark.parametrize("fields", [{"questions": 3}, {"questions": [b"a?"]}, {"options": None}, {"prepare": ["fps"]}])
def test_an_ask_that_cannot_be_one_is_refused_where_it_is_made(fields):
    with pytest.raises(BadRequest, match="ask_many"):
        Ask(**{"media": "clip.mp4", "questions": "a?", **fields})


def test_mistakes_that_concern_all_items_are_raised(checkpoint, clips):  # noqa: F811
    async def work(qa):
        for options in (
            {"colour": 3}, {"max_tokens": 0}, {"prepare": {"colour": 3}}, {"prepare": {"fps": -1}}, {"max_parallel": 0},
            {"max_parallel": 1.5}, {"timeout_s": -1},
        ):  # fmt: skip
            with pytest.raises(BadRequest):
                await qa.ask_many([(clips[0], "a?")], **options)
        assert (await qa.info())["prefills"] == 0

    run(checkpoint, work)


def test_no_more_conversations_than_wanted_run_at_once(checkpoint, clips):  # noqa: F811
    async def work(qa):
        most = 0

        def progress(stage, done, total):
            nonlocal most
            most = max(most, len(engine.decode.engine.turns))

        engine = await qa.ready()
        results = await qa.ask_many([(clips[0], "a?")] * 8, max_tokens=8, max_parallel=2, progress=progress)
        assert all(result.answers for result in results) and most <= 2

    run(checkpoint, work)


def test_cancelling_it_ends_everything(checkpoint, clips):  # noqa: F811
    async def work(qa):
        (await qa.ready()).model.chat.eos_ids = frozenset()
        task = asyncio.create_task(qa.ask_many([(clip, "on and on") for clip in clips for _ in range(2)], max_tokens=2000))
        while not (await qa.info())["turns_running"]:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(qa)
        assert (await qa.info())["conversations"] == 0

    run(checkpoint, work)


def test_what_progress_raises_ends_it(checkpoint, clips):  # noqa: F811
    def progress(stage, done, total):
        if done == 2:
            raise Cancelled("enough")

    async def work(qa):
        with pytest.raises(Cancelled, match="enough"):
            await qa.ask_many([(clip, ["a?", "b?"]) for clip in clips], max_tokens=4, progress=progress)
        await settled(qa)

    run(checkpoint, work)


def test_a_line_shows_on_a_terminal_and_when_wanted(checkpoint, clips, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TERM", "xterm")
    with VideoQA(checkpoint, **FIELDS) as qa:
        shown = {}
        cases = ("terminal", Terminal, None), ("file", StringIO, None), ("wanted", StringIO, True), ("unwanted", Terminal, False)
        for name, kind, progress in cases:
            screen = kind()
            monkeypatch.setattr(sys, "stderr", screen)
            qa.ask_many([(clips[0], ["a?", "b?"])], max_tokens=2, progress=progress)
            shown[name] = "ask" in screen.getvalue()
        assert shown == {"terminal": True, "file": False, "wanted": True, "unwanted": False}
