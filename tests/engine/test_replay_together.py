"""Replays beside other turns: the same answers in one batch, when they make way for each other, and when one is aborted."""

from dataclasses import replace

import pytest

from sparsevila_cluster.core.errors import Cancelled
from sparsevila_cluster.core.requests import SamplingParams
from sparsevila_cluster.engine.turn import RunningTurn
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.engine.replay_pairs import again, ask, assert_goes_on, assert_same_tail, bench, record, run, submit, tail_of, turn
from tests.engine.single_turn_reference import recorded_logits


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=2, hidden=32))
    model.chat.eos_ids = frozenset()
    return model


def crowd(model, **fields):
    """Ten answers, alone: (turn, events, logits)."""
    b, alone = bench(model, **fields), []
    for i in range(10):
        options = ({}, {"refresh_every": 3}, {"retrieve_mass": 0.5}, {"retrieve_keep": 1.0})[i % 4]
        sampling = SamplingParams(max_tokens=14 + 9 * (i % 3), temperature=0.8 * (i % 2), seed=i)
        asked = turn(f"question {i}, what is it?", f"c{i}", sampling=sampling, **options)
        alone.append((asked, *ask(b, asked)))
    return b, alone


def play_together(b, alone):
    """All at once, every other one as a replay of a part of it. Phases in which turns made way."""
    preempted, plain = set(), RunningTurn.preempt

    def preempt(running):
        preempted.add(running.phase)
        plain(running)

    with recorded_logits() as heard, pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunningTurn, "preempt", preempt)
        got = []
        for i, (asked, events, _) in enumerate(alone):
            counts = (0, 11, 0, 14, 0, 5, 0, 1, 0, len(record(asked, events).token_ids))
            asked = again(record(asked, events), counts[i]) if i % 2 else asked
            got.append((submit(b, asked), b.decode.turns[asked.turn_id].sampler, counts[i]))
            b.decode.step()
        run(b)
        for (events, sampler, count), (_, whole, logits) in zip(got, alone, strict=True):
            assert not isinstance(events[-1], Exception), events[-1]
            assert_goes_on(events, heard.get(sampler, []), whole, logits, count)
    return preempted


@pytest.mark.parametrize("max_step_tokens", [16, 24, 512])
def test_replays_in_a_batch_with_others(max_step_tokens, model):
    roomy, alone = crowd(model)
    b = bench(model, max_step_tokens=max_step_tokens, max_batch=8)
    play_together(b, alone)
    for i in range(10):
        assert_same_tail(tail_of(b, f"c{i}"), tail_of(roomy, f"c{i}"))


def test_replays_that_make_way_go_on(model):
    roomy, alone = crowd(model)
    seen = set()
    for slots in (220, 260, 300):
        b = bench(model, slots=slots, max_step_tokens=9, slice_steps=3, max_batch=4)
        seen |= play_together(b, alone)
        for i in range(10):
            b.decode.close_conversation(f"c{i}")
        assert b.decode.conversations.arena.used_bytes == 0
    assert {"replay", "question", "decode"} <= seen, seen


def test_a_long_replay_stalls_nobody(model):
    """At 16 rows in a step: the answer under way has a token in every step of a replay of 60."""
    long = record(turn("on and on?", "long", 64), ask(bench(model), turn("on and on?", "long", 64))[0])
    b = bench(model, max_step_tokens=16)
    answer = submit(b, turn("hm?", "a", 100))
    b.decode.step()
    shares, plain = [], b.decode.scheduler.schedule
    b.decode.scheduler.schedule = lambda: shares.append(plain()) or shares[-1]
    events = submit(b, again(long, 60))
    while len(events) == 1:
        before = len(answer)
        b.decode.step()
        assert len(answer) == before + 1 and sum(rows for _, rows in shares[-1]) <= 16
    rows = [rows for share in shares for name, rows in share if name == "long/on and on?"]
    assert len(rows) <= 3 + -(-59 // 15) + 1 and sum(rows) == long_question_rows(b, long) + 60


def long_question_rows(b, made):
    return len(b.model.chat.question_ids(made.turn.question, True, None)[0])


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 8])
def test_an_aborted_replay_leaves_no_trace(steps, model):
    first, second = turn("why?"), turn("and then?")
    plain = bench(model)
    made = [record(t, ask(plain, t)[0]) for t in (first, second)]
    b = bench(model, max_step_tokens=4)
    ask(b, again(made[0]))
    events = submit(b, replace(again(made[1], 10), turn_id="cut"))
    for _ in range(steps):
        b.decode.step()
    assert b.decode.abort("cut") and isinstance(events[-1], Cancelled)
    b.decode.check_integrity()
    ask(b, again(made[1], 6))
    assert_same_tail(tail_of(b), tail_of(plain))
    assert b.decode.close_conversation("c") and b.decode.conversations.arena.used_bytes == 0
