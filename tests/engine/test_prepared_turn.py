"""What a turn costs is bounded before anything is done, and done outside the engine's thread."""

import asyncio
import threading
from collections import Counter

import pytest

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadRequest, TooLarge
from sparsevila_cluster.core.requests import Replay, SamplingParams, Turn, check_size
from sparsevila_cluster.engine.async_engine import AsyncDecodeEngine
from sparsevila_cluster.engine.prepared_turn import PreparedTurn
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.transformers_oracle import Bench, random_media


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0))


def turn(question="what is it?", num_said=0, token=1, **sampling):
    replay = Replay((token,) * num_said) if num_said else None
    return Turn("t", "c", "m", question, SamplingParams(**sampling), replay=replay)


CONFIG = build_config(model="unused", max_question_bytes=100, max_answer_tokens=50, max_question_tokens=40)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (turn("x" * 101), "max_question_bytes=100 bytes, got 101"),
        (turn("ü" * 51), "got 102"),
        (turn(max_tokens=51), "max_answer_tokens=50"),
        (turn(max_tokens=2**40, num_said=60_000), "max_answer_tokens=50"),
        (turn(max_tokens=5, num_said=6), "at most max_tokens=5 tokens, got 6"),
    ],
)
def test_sizes_over_the_bounds_are_refused_by_name(asked, word, model):
    with pytest.raises(BadRequest, match=word):
        check_size(asked, CONFIG)
    with pytest.raises(BadRequest, match=word):
        PreparedTurn.of(asked, model, CONFIG)


def test_what_is_at_the_bounds_is_prepared(model):
    for asked in (turn("x " * 20, max_tokens=50), turn(max_tokens=50, num_said=50, token=5)):
        prepared = PreparedTurn.of(asked, model, CONFIG)
        for first, pending in ((True, None), (False, None), (False, 7)):
            assert prepared.question_ids(first, pending) == model.chat.question_ids(asked.question, first, pending)
    with pytest.raises(TooLarge, match="tokens; the limit is 40"):
        PreparedTurn.of(turn("a b " * 25, max_tokens=5), model, CONFIG)
    with pytest.raises(TooLarge, match="positions"):
        generous = build_config(model="unused", max_answer_tokens=10**9)
        PreparedTurn.of(turn(max_tokens=model.max_position + 1, num_said=2), model, generous)


@pytest.mark.parametrize("question", ["\ud800", "what is \udfff?"])
def test_half_a_surrogate_pair_is_no_text(question):
    with pytest.raises(BadRequest, match="surrogate"):
        turn(question)


def test_nothing_of_it_runs_in_the_threads_that_serve_others(model, monkeypatch):
    """Neither the engine's thread nor the event loop's tokenises a question or reads a replay."""
    calls, num_said, num_new = Counter(), 150, 50
    for name in ("question_ids", "decode"):
        real = getattr(type(model.chat), name)

        def seen(self, *args, name=name, real=real, **kwargs):
            calls[name, threading.current_thread().name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(type(model.chat), name, seen)

    async def main():
        bench = Bench(model, build_config(model="unused", prefix_bytes=2**24, turn_bytes=2**24))
        bench.prefix([random_media("video", 2, 56, 84, seed=0)], key="m")
        engine = AsyncDecodeEngine(bench.decode, "test")
        try:
            events = engine.ask(turn("where?", max_tokens=num_said + num_new, num_said=num_said, token=5))
            async for (event,) in events:
                if event.kind == "accepted":
                    break
            await events.aclose()
            await engine.call(lambda _: None)  # the turn is aborted: nothing of it comes later
            assert {name for name in calls if name[0] == "question_ids"} == {("question_ids", "prepare-turn_0")}
            assert calls["decode", "prepare-turn_0"] >= num_said
            # The engine may have come to new tokens by now, of which each takes two calls.
            assert calls.pop(("decode", "decode"), 0) <= 2 * num_new + 2 < num_said
            assert {thread for _, thread in calls} == {"prepare-turn_0"}
            calls.clear()
            with pytest.raises(BadRequest):
                async for _ in engine.ask(turn("x" * 2**20)):
                    pass
            assert not calls, "what is too large is not looked at"
        finally:
            await engine.close(10.0)

    asyncio.run(asyncio.wait_for(main(), 60))
