"""The storm, in short: seeded, drawn by hypothesis, through the threaded pipeline; and that it notices what it is there for."""

import asyncio
import io
import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsevila_cluster.attention.interface import Capture
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import Cancelled, NotFound, QueueFull
from sparsevila_cluster.core.requests import Answer, MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.engine.turn import RunningTurn
from sparsevila_cluster.engine.turn_retrieval import TurnRetrieval
from sparsevila_cluster.kvcache.conversation_store import ConversationStore
from tests.engine import storm
from tests.engine.single_turn_reference import recorded_logits
from tests.engine.storm_run import StormRun


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return storm.make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _quiet():
    with storm.unlogged():
        yield


def test_a_short_storm(model):
    total = storm.blow(model, random.Random(0), 700)
    for what in (
        "answers_checked", "preemptions", "answers_of_preempted_turns", "evictions", "aborts", "parked_tails", "degraded",
        "replays_checked",
    ):  # fmt: skip
        assert total[what] > 10, what
    assert total["operations"] == 700


@settings(derandomize=True, deadline=None, max_examples=15, database=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), num_operations=st.integers(1, 40))
def test_any_interleaving(model, rng, num_operations):
    with recorded_logits() as heard:
        run = StormRun(model, rng, heard)
        for _ in range(num_operations):
            run.operate()
        run.end()


# ---- it bites --------------------------------------------------------------------------------------------------------------


def keep_packed_kv(patch):
    patch.setattr(ConversationStore, "give_back", lambda self, conversation: self._rooms.pop(conversation.conversation_id, None))


def park_only_what_is_committed(patch):
    plain = ConversationStore._park

    def park(self, conversation, running=False):
        done = plain(self, conversation, running)
        for rows in conversation.parked or ():
            rows[:, conversation.length :] = 0.0
        return done

    patch.setattr(ConversationStore, "_park", park)


def forget_rows_of_an_aborted_turn(patch):
    patch.setattr(RunningTurn, "drop_rows", lambda self: None)


def score_every_piece_as_the_first(patch):
    patch.setattr(Capture, "overlap", lambda self, start, stop: (max(self.first_row - start, 0), min(self.stop_row, stop) - start))


def write_beyond_the_room(patch):
    patch.setattr(RunningTurn, "outgrown", property(lambda self: bool(self.tokens) and not self._packed))


def resume_at_the_first_token(patch):
    plain = RunningTurn.preempt

    def preempt(self):
        plain(self)
        if len(self.tokens) > 1:
            self.input_ids = [self.tokens[0]]

    patch.setattr(RunningTurn, "preempt", preempt)


def ignore_the_brownout(patch):
    patch.setattr(TurnRetrieval, "start", lambda self, brownout: _start(self, 0.0))


_start = TurnRetrieval.start


@pytest.mark.parametrize(
    "damage",
    [
        keep_packed_kv, park_only_what_is_committed, forget_rows_of_an_aborted_turn, score_every_piece_as_the_first,
        write_beyond_the_room, resume_at_the_first_token, ignore_the_brownout,
    ],
)  # fmt: skip
def test_the_storm_notices(model, damage, monkeypatch):
    with monkeypatch.context() as patch:
        damage(patch)
        with pytest.raises(AssertionError):
            for seed in range(1, 16):
                storm.blow(model, random.Random(seed), 100)


def test_the_command_names_seed_and_operation(capsys, monkeypatch):
    assert storm.main(["--operations", "25", "--seed", "7"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("storm ok: seed=7 operations=25 ") and " preemptions=" in told and " peak_bytes=" in told
    keep_packed_kv(monkeypatch)
    assert storm.main(["--operations", "400", "--seed", "7"]) == 1
    assert "storm FAILED: seed 7, operation " in capsys.readouterr().out


# ---- through threads -------------------------------------------------------------------------------------------------------


def png(seed):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (8, 6 + seed, 3), dtype=np.uint8).repeat(14, 0).repeat(14, 1)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return PrepareRequest((MediaSource(file.getvalue()),))


async def held_talk(pipeline, number, requests):
    """One caller: some turns are heard to the end, some are left, cancelled or aborted. Returns the turns that were answered."""
    rng, heard = random.Random(number), []
    request = requests[number % len(requests)]
    for i in range(5):
        media_id = (await until_there_is_room(lambda: pipeline.prepare(request))).media_id
        sampling = SamplingParams(max_tokens=rng.choice((1, 4, 12, 30)))
        options = {"retrieve_mass": 0.6} if rng.random() < 0.3 else {"refresh_every": 3} if rng.random() < 0.5 else {}
        turn = Turn(f"{number}.{i}", f"talk {number}", media_id, f"question {i}, which is it?", sampling, **options)
        listening_to = asyncio.ensure_future(until_there_is_room(lambda turn=turn: prepared(pipeline, request, turn)))
        fate = rng.random()
        if fate < 0.2:
            await asyncio.sleep(rng.random() * 0.05)
            listening_to.cancel()
        elif fate < 0.3:
            await asyncio.sleep(rng.random() * 0.05)
            await pipeline.abort(turn.turn_id)
        elif fate < 0.4:
            await pipeline.set_brownout(rng.choice((0.0, 0.5, 1.0)))
        try:
            heard.append((turn, await listening_to))
        except (Cancelled, asyncio.CancelledError):
            if await num_turns(pipeline, turn.conversation_id) > len(heard):
                break  # the last token came first: the conversation has a turn that nobody heard
        if rng.random() < 0.1:
            await pipeline.delete_media(media_id)
    return heard


async def num_turns(pipeline, conversation_id):
    conversation = await pipeline.decode.call(lambda engine: engine.conversations.get(conversation_id))
    return 0 if conversation is None else conversation.num_turns


async def until_there_is_room(call):
    give_up_at_s = time.monotonic() + 60
    while time.monotonic() < give_up_at_s:
        try:
            return await call()
        except (QueueFull, NotFound):
            await asyncio.sleep(0.005)
    raise AssertionError("no room for a minute")


async def prepared(pipeline, request, turn):
    await pipeline.prepare(request)  # another caller may have deleted it
    return await listen(pipeline, turn)


async def listen(pipeline, turn):
    return Answer.from_events([event async for event in pipeline.ask(turn)])


SECRET = b"s" * 32  # two pipelines name the same media alike


def test_callers_in_threads_that_come_and_go(model):
    requests = [png(seed) for seed in range(4)]
    size = model.spec.bytes_per_token
    tiny = {"prefix_bytes": 90 * size, "turn_bytes": 320 * size, "max_batch": 4, "max_step_tokens": 16, "slice_steps": 8}

    async def main():
        pipeline = LocalPipeline(build_config(model="unused", max_waiting=4, **tiny), model, SECRET)
        talks = await asyncio.wait_for(asyncio.gather(*(held_talk(pipeline, n, requests) for n in range(10))), 180)
        while (await pipeline.info())["turns_running"]:
            await asyncio.sleep(0.01)  # turns that were left end with the next step
        for number in range(10):
            await pipeline.close_conversation(f"talk {number}")
        for media_id in {turn.media_id for talk in talks for turn, _ in talk}:
            await pipeline.delete_media(media_id)
        info = await pipeline.info()
        await pipeline.decode.call(lambda engine: engine.check_integrity())
        assert info["turn_bytes"] == info["prefix_bytes"] == info["conversations"] == info["turns_waiting"] == 0
        await pipeline.close()
        assert info["turns_preempted"] > 0 and info["prefixes_evicted"] > 0
        return talks

    async def alone(talks):
        """Every talk again, by itself, in a pipeline with room for all."""
        pipeline = LocalPipeline(build_config(model="unused"), model, SECRET)
        for request in requests:
            await pipeline.prepare(request)
        for talk in talks:
            for turn, answer in talk:
                assert turn.retrieve_mass is None or answer.usage.effective_keep <= 0.5
                again = Turn(**{**vars(turn), "retrieve_keep": answer.usage.effective_keep, "retrieve_mass": None})
                assert (await listen(pipeline, again)).token_ids == answer.token_ids, turn
        await pipeline.close()

    talks = asyncio.run(main())
    assert sum(map(len, talks)) > 20
    asyncio.run(alone(talks))
