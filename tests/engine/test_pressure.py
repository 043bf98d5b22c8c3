"""Turns that outgrow their room, wait for it, share steps and attend to less: the same answers, in bounded numbers of steps."""

import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadConfig, BadRequest, Cancelled, DeadlineExceeded, TooLarge
from sparsevila_cluster.core.requests import SamplingParams, Turn, kept_count
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.transformers_oracle import Bench, random_media
from tests.engine.single_turn_reference import ATOL, recorded_logits

SPARSE = {"prune_keep": 0.5, "retrieve_keep": 0.3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=2, hidden=32))
    model.chat.eos_ids = frozenset()
    return model


def bench(model, slots=2000, **fields):
    size = model.spec.bytes_per_token
    b = Bench(model, build_config(model="unused", **{"prefix_bytes": 2**24, "turn_bytes": slots * size, **SPARSE, **fields}))
    b.prefix(random_media("video", 8, 112, 112, seed=1), key="m")
    return b


def said(events):
    assert not isinstance(events[-1], Exception), events[-1]
    return [t for e in events for t in e.token_ids]


def play(b, script, submit_all_first=True):
    """Tokens and logits of turns (conversation, question, max_tokens, options)."""
    with recorded_logits() as heard:
        events, samplers = [], []
        for conversation, question, count, options in script:
            events.append(b.submit("m", conversation, question, count, **options))
            samplers.append(b.decode.turns[f"{conversation}/{question}"].sampler)
            if not submit_all_first:
                b.run()
        while not b.decode.idle:
            b.decode.step()
            b.decode.check_integrity()
        return [said(e) for e in events], [torch.stack(heard[s]) for s in samplers], [e[-1].usage for e in events]


SCRIPT = [(f"c{i}", f"question {i}?", 30 + 23 * (i % 4), {"refresh_every": 5} if i % 3 == 2 else {}) for i in range(8)]


def test_turns_that_outgrow_their_room_give_the_same_answers(model):
    wanted, logits, _ = play(bench(model, max_batch=1), SCRIPT)
    b = bench(model, slots=420)
    got, in_storm, usages = play(b, SCRIPT)
    assert got == wanted and all((a - b).abs().max() < ATOL for a, b in zip(logits, in_storm, strict=True))
    assert b.decode.scheduler.num_preempted == sum(u.num_preemptions for u in usages) >= 2
    assert usages[0].num_preemptions == 0, "the first in line never makes way"
    assert all((u.ms.get("preempted", 0) > 0) == (u.num_preemptions > 0) for u in usages)
    held = b.decode.conversations.arena.used_bytes
    assert held <= 420 * model.spec.bytes_per_token
    for i in range(8):
        b.decode.close_conversation(f"c{i}")
    assert b.decode.conversations.arena.used_bytes == 0


def test_long_limits_do_not_keep_others_out(model):
    """Eight answers that may have 400 tokens, and have a few: reserved at their longest, one would fit at a time."""
    b = bench(model, slots=700, max_batch=8)
    most = 0
    events = []
    for i in range(8):
        sampling = SamplingParams(max_tokens=400, stop=("e", "a", "t"))
        events.append([])
        b.decode.submit(Turn(f"t{i}", f"c{i}", "m", f"what is thing {i}?", sampling), events[-1].append)
    while not b.decode.idle:
        b.decode.step()
        most = max(most, b.decode.scheduler.num_running)
    assert most >= 7 and all(len(said(e)) < 400 for e in events)


def test_a_conversation_goes_on_after_its_turn_was_preempted(model):
    script = [("a", "one?", 70, {}), ("b", "two?", 70, {}), ("a", "three?", 30, {}), ("b", "four?", 30, {})]
    wanted, logits, _ = play(bench(model, max_batch=1), script)
    b = bench(model, slots=300)
    got, again, usages = play(b, script)
    assert got == wanted and all((a - b).abs().max() < ATOL for a, b in zip(logits, again, strict=True))
    assert sum(u.num_preemptions for u in usages) > 0


def test_sampling_goes_on_where_it_was(model):
    def sample(slots):
        b = bench(model, slots=slots, slice_steps=7)
        events = []
        for i in range(4):
            events.append([])
            params = SamplingParams(max_tokens=60, temperature=0.8, seed=i)
            b.decode.submit(Turn(f"t{i}", f"c{i}", "m", "hm?", params), events[-1].append)
        b.run()
        return [said(e) for e in events], b.decode.scheduler.num_preempted

    roomy, small = sample(2000), sample(250)
    assert roomy[0] == small[0] and roomy[1] == 0 < small[1]


def test_what_could_not_run_alone_is_refused_before_it_starts(model):
    b = bench(model, slots=128)
    size = model.spec.bytes_per_token
    fits = b.submit("m", "fits", "hm?", 60)
    never = b.submit("m", "never", "hm?", 128)
    b.run()
    assert len(said(fits)) == 60
    assert isinstance(never[-1], TooLarge) and f"turn_bytes allows {128 * size}" in str(never[-1])
    assert [e.kind for e in never[:-1]] == ["accepted"], "not a token of it was made"
    again = b.submit("m", "fits", "and now, with its text so far?", 60)
    b.run()
    assert isinstance(again[-1], TooLarge), "with its own text it could not run alone"
    assert len(said(b_run(b, "fits", "short?", 5))) == 5


def b_run(b, conversation, question, count):
    events = b.submit("m", conversation, question, count)
    b.run()
    return events


@pytest.mark.parametrize("how", ["abort", "expire", "close"])
def test_ending_a_turn_in_every_state(how, model):
    """waiting, in the middle of its question, decoding, preempted in either, and first in line again."""
    seen, fresh = set(), bench(model)
    first, second = (said(b_run(fresh, "victim", question, 6)) for question in ("first?", "second?"))
    for steps in range(0, 60, 4):
        b = bench(model, slots=256, max_step_tokens=8, slice_steps=6, max_batch=3)
        assert said(b_run(b, "victim", "first?", 6)) == first
        events = {i: b.submit("m", f"c{i}", f"question number {i}, which is longer than a step?", 30) for i in range(4)}
        ended = b.submit("m", "victim", "this question is going to end too early, or is it not?", 30)
        for _ in range(steps):
            b.decode.step()
        running = next((t for t in b.decode.turns.values() if t.conversation.conversation_id == "victim"), None)
        if running is None:
            break
        seen.add((running.phase, running.room is not None))
        if how == "abort":
            assert b.decode.abort(running.turn.turn_id)
        elif how == "close":
            assert b.decode.close_conversation("victim")
        else:
            running.deadline_at_s = 0.0
            b.decode.step()
        b.decode.check_integrity()
        assert isinstance(ended[-1], DeadlineExceeded if how == "expire" else Cancelled)
        b.run()
        assert all(len(said(e)) == 30 for e in events.values())
        if how != "close":
            assert said(b_run(b, "victim", "second?", 6)) == second, "the turn left a trace"
        for name in ("victim", "c0", "c1", "c2", "c3"):
            b.decode.close_conversation(name)
        assert b.decode.conversations.arena.used_bytes == 0
    assert {("waiting", False), ("question", True), ("question", False), ("decode", True), ("decode", False)} <= seen, seen


@pytest.mark.parametrize("rows", ["all", "question", "last"])
@pytest.mark.parametrize("max_step_tokens", [1, 5, 16])
def test_questions_in_pieces_are_as_in_one(rows, max_step_tokens, model):
    script = [("a", "what is it that happens first of all, and then?", 9, {}), ("a", "where?", 6, {"retrieve_mass": 0.5})]
    whole = play(bench(model, retrieve_rows=rows), script)
    b = bench(model, retrieve_rows=rows, max_step_tokens=max_step_tokens)
    pieces = play(b, script)
    assert whole[0] == pieces[0]
    assert all((a - b).abs().max() < ATOL for a, b in zip(whole[1], pieces[1], strict=True))
    assert [u.visual_tokens_retrieved for u in whole[2]] == [u.visual_tokens_retrieved for u in pieces[2]]
    assert b.decode.num_steps >= 2 * 15 // max_step_tokens


def test_a_long_question_stalls_neither_answers_nor_short_questions(model):
    """At 16 rows in a step: the answer under way has a token in every step, and a short question is answered in a few."""
    b = bench(model, max_step_tokens=16)
    answer = b.submit("m", "answer", "hm?", 100)
    b.decode.step()
    long = b.submit("m", "long", "what " * 600, 3)
    b.decode.step()
    short = b.submit("m", "short", "hm?", 100)
    steps = 0
    while len(short) == 1:
        before, steps = len(answer), steps + 1
        b.decode.step()
        assert len(answer) == before + 1
    assert steps <= -(-20 // 7), "20 rows, of which 7 in each step"
    assert len(long) == 1, "the long question goes on"
    b.run()
    assert len(said(long)) == 3 and len(said(short)) == 100


# ---- brownout --------------------------------------------------------------------------------------------------------------


def test_brownout_lowers_what_starts_and_is_undone(model):
    b = bench(model, retrieve_keep=0.5, brownout_floor=0.1)
    kept = b.decode.prefixes.get("m").num_kept

    def ask(conversation, **options):
        return b.submit("m", conversation, "hm?", 12, **options)

    before = ask("before")
    b.decode.step()
    b.decode.set_brownout(0.5)
    waiting, own = ask("half"), ask("own", retrieve_keep=0.9)
    low, mass = ask("low", retrieve_keep=0.08), ask("mass", retrieve_mass=0.99, retrieve_keep=0.5)
    small_mass = ask("small mass", retrieve_mass=0.05, retrieve_keep=0.5)
    b.decode.step()
    b.decode.set_brownout(1.0)
    floor = ask("floor")
    b.decode.step()
    b.decode.set_brownout(0.0)
    after = ask("after")
    b.run()
    wanted = {
        "before": (before, 0.5, False), "half": (waiting, 0.3, True), "own": (own, 0.5, True), "low": (low, 0.08, False),
        "mass": (mass, 0.3, True), "floor": (floor, 0.1, True), "after": (after, 0.5, False),
    }  # fmt: skip
    for name, (events, keep, degraded) in wanted.items():
        usage = events[-1].usage
        assert (usage.visual_tokens_retrieved, usage.degraded) == (kept_count(keep, kept), degraded), name
        assert usage.effective_keep == kept_count(keep, kept) / kept
    assert not small_mass[-1].usage.degraded, "it needed less than the lowered cap: it got all that it wished for"


def test_brownout_answers_as_if_asked_for_less(model):
    b, plain = bench(model, brownout_floor=0.1), bench(model)
    b.decode.set_brownout(1.0)
    for question in ("one?", "two?"):
        low = b.submit("m", "a", question, 9)
        wish = plain.submit("m", "a", question, 9, retrieve_keep=0.1)
        b.run(), plain.run()
        assert said(low) == said(wish) and low[-1].usage.degraded and not wish[-1].usage.degraded


def test_brownout_takes_dense_engines_at_their_word(model):
    b = bench(model, retrieve="retrieve_all", retrieve_keep=None)
    b.decode.set_brownout(1.0)
    usage = b_run(b, "a", "hm?", 3)[-1].usage
    assert usage.effective_keep == 1.0 and not usage.degraded


def test_a_preempted_turn_keeps_its_budget(model):
    b = bench(model, slots=200, slice_steps=5, max_batch=2, brownout_floor=0.05)
    turns = [b.submit("m", f"c{i}", "hm?", 40) for i in range(3)]
    b.decode.step()
    b.decode.set_brownout(1.0)
    b.run()
    assert [t[-1].usage.degraded for t in turns] == [False, False, True] and turns[0][-1].usage.num_preemptions > 0


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan"), "high", True, None])
def test_illegal_levels_are_named(level, model):
    with pytest.raises(BadRequest, match="brownout level"):
        bench(model).decode.set_brownout(level)
    with pytest.raises(BadConfig, match="brownout_floor"):
        bench(model, brownout_floor=0.0)
