"""An answer that goes on elsewhere: replayed up to any token, it is the one that was never cut, in tokens, text, logits and KV."""

from dataclasses import replace

import pytest
import torch

from sparsevila_cluster.attention import torch_backend
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import Answer, FinishReason, Replay, SamplingParams
from sparsevila_cluster.engine.sampling import Sampler
from sparsevila_cluster.engine.turn import RunningTurn
from sparsevila_cluster.engine.turn_answer import TurnAnswer
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.engine.replay_pairs import (
    again,
    ask,
    assert_goes_on,
    assert_same_tail,
    bench,
    check_every_cut,
    record,
    tail_of,
    turn,
)

QUESTIONS = ("what is it, and where?", "and then?", "why?")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=2, hidden=32))
    model.chat.eos_ids = frozenset()
    return model


@pytest.mark.parametrize(
    "options, fields",
    [
        ({}, {}),
        ({}, {"max_step_tokens": 5}),
        ({}, {"retrieve": "retrieve_all", "retrieve_keep": None}),
        ({"refresh_every": 1}, {}),
        ({"refresh_every": 4}, {"max_step_tokens": 3}),
        ({"retrieve_mass": 0.4}, {}),
        ({"retrieve_mass": 0.4, "refresh_every": 3}, {}),
        ({}, {"video_text_pos": "hf5", "frames": 30}),
    ],
)
def test_cut_behind_any_token_an_answer_goes_on_as_it_would_have(options, fields, model):
    check_every_cut(model, [turn(question, **options) for question in QUESTIONS], **fields)


def test_answers_that_stand_behind_a_gap_are_cut_there(model):
    b = bench(model, frames=30, video_text_pos="hf5")
    events, _ = ask(b, turn("why?"))
    prefix, rows = b.decode.prefixes.get("m"), len(model.chat.question_ids("why?", True, None)[0])
    assert prefix.metadata.generation_floor > prefix.metadata.next_pos + rows, "there is no gap"
    assert tail_of(b)[1] == prefix.metadata.generation_floor + 11 and len(events) == 14


@pytest.mark.parametrize("sampling", [{"temperature": 0.9}, {"temperature": 1.3, "top_k": 12, "top_p": 0.8}])
def test_seeded_sampling_goes_on(sampling, model):
    params = [SamplingParams(max_tokens=10, seed=seed, **sampling) for seed in (3, 4)]
    check_every_cut(model, [turn(q, sampling=p, refresh_every=4) for q, p in zip(QUESTIONS, params, strict=False)])


def test_the_pressure_of_then_counts(model):
    made = check_every_cut(model, [turn(question) for question in QUESTIONS], brownouts=(0.6, 0.0, 1.0))
    assert [m.brownout for m in made] == [0.6, 0.0, 1.0]
    b = bench(model)
    b.decode.set_brownout(0.6)
    events, _ = ask(b, turn("hm?"))
    assert {e.brownout for e in events if e.kind == "token"} == {0.6} and events[-1].usage.degraded


def test_answers_that_end_early_are_cut_like_others(model):
    tokens = [t for e in ask(bench(model), turn("what is it, and where?"))[0] for t in e.token_ids]
    ends, model.chat.eos_ids = model.chat.eos_ids, frozenset({tokens[5]})
    try:
        (made,) = check_every_cut(model, [turn("what is it, and where?")])
        assert made.token_ids == tuple(tokens[: tokens.index(tokens[5]) + 1])
    finally:
        model.chat.eos_ids = ends


def test_stop_strings_are_found_across_the_cut(model):
    text = Answer.from_events(ask(bench(model), turn("why?", max_tokens=40))[0]).text
    stop = text[9:14]
    assert len(stop) == 5 and stop not in text[:12]
    (made,) = check_every_cut(model, [turn("why?", sampling=SamplingParams(max_tokens=40, stop=(stop, "never said")))])
    assert 1 < len(made.token_ids) < 40


@pytest.mark.parametrize("stop", [(), ("world",), ("€",), ("é",), ("lo wörld €",), ("é😀!", "?")])
def test_text_is_told_as_if_nothing_had_happened(stop, model):
    """Characters of several bytes, each byte a token of its own, and stop strings, cut everywhere."""
    chat, plan = model.chat, "Hello wörld €5, é😀! and so on?"
    ids = [chat._core.token_to_id(c) for c in chat._core.encode(plan, add_special_tokens=False).tokens]
    assert len(ids) > len(plan), "no character is cut"
    whole = TurnAnswer(turn("x", sampling=SamplingParams(max_tokens=99, stop=stop)), model)
    pieces = []
    for token in ids:
        pieces.append(whole.add(token))
        if whole.finish_reason is not None:
            break
    ids, rest = ids[: len(pieces)], whole.flush()
    for count in range(len(ids) + 1):
        sampling = SamplingParams(max_tokens=99, stop=stop)
        cut = TurnAnswer(turn("x", sampling=sampling, replay=Replay(tuple(ids[:count]))), model)
        cut.take_known(count)
        assert [cut.add(token) for token in ids[count:]] == pieces[count:], count
        assert (cut.tokens, cut.finish_reason, cut.flush()) == (ids, whole.finish_reason, rest)


def test_evidence_is_told_again(model):
    b = bench(model)
    events, _ = ask(b, turn("why?", want_evidence=True))
    made = record(turn("why?", want_evidence=True), events)
    got, _ = ask(bench(model), again(made, 7))
    assert [e.kind for e in got][:2] == ["accepted", "evidence"]
    for one, other in zip(got[1].evidence, events[1].evidence, strict=True):
        assert one.kept == other.kept and one.share == pytest.approx(other.share, abs=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------------


def test_replays_that_no_answer_begins_with_are_refused(model):
    b = bench(model)
    tokens = tuple(t for e in ask(bench(model), turn("why?"))[0] for t in e.token_ids)
    text = model.chat.decode(tokens[:4])
    num_ids = len(model.text.embed_weight)
    for asked, words in (
        (turn("why?", replay=Replay((*tokens, 5))), "at most max_tokens=12 tokens, got 13"),
        (turn("why?", sampling=SamplingParams(stop=(text,)), replay=Replay(tokens)), "ends with token . .stop"),
        (turn("why?", replay=Replay((3, num_ids))), rf"token 2 of the replay must be in \[0, {num_ids}\), got {num_ids}"),
        (turn("why?", replay=Replay((-1,))), "got -1"),
        (turn("why?", replay=Replay(("a",))), "got 'a'"),
    ):
        with pytest.raises(BadRequest, match=words):
            b.decode.submit(asked, lambda event: None)
        assert b.decode.conversations.get("c") is None and b.decode.idle
        b.decode.check_integrity()
    for level in (-0.1, 1.5, float("nan"), "low"):
        with pytest.raises(BadRequest, match="brownout level"):
            Replay(tokens, level)
    assert len(ask(b, turn("why?"))[0]) == 14


def test_an_empty_replay_is_a_turn_under_the_pressure_of_then(model):
    wanted = bench(model)
    wanted.decode.set_brownout(0.5)
    events, logits = ask(wanted, turn("why?"))
    got, got_logits = ask(bench(model), turn("why?", replay=Replay((), 0.5)))
    assert_goes_on(got, got_logits, events, logits, 0)


# ---- it bites --------------------------------------------------------------------------------------------------------------


def see_the_whole_prefix(patch):
    plain = RunningTurn.segment

    def segment(self, first, num):
        made = plain(self, first, num)
        return replace(made, body=self.retrieval.whole()) if self.phase == "replay" else made

    patch.setattr(RunningTurn, "segment", segment)


def refresh_never(patch):
    plain = RunningTurn._next_rows

    def next_rows(self):
        known = len(self.tokens) < self.answer.num_known
        with pytest.MonkeyPatch.context() as inner:
            if known:
                inner.setattr(type(self.retrieval), "refreshes_at", lambda *_: False)
            plain(self)

    patch.setattr(RunningTurn, "_next_rows", next_rows)


def draw_from_the_beginning(patch):
    patch.setattr(Sampler, "skip", lambda self, num: None)


def see_what_comes_later(patch):
    plain = torch_backend.attend_question

    def attend(q, body, tail, scale, capture, layer=0):
        if capture is not None or len(q) == 1:
            return plain(q, body, tail, scale, capture, layer)
        return torch.cat([plain(row[None], body, tail, scale, None, layer) for row in q])

    patch.setattr(torch_backend, "attend_question", attend)


def stand_where_the_question_ended(patch):
    patch.setattr(RunningTurn, "input_pos", property(lambda self: self.conversation.next_pos + min(self._rows, self._prompt_rows)))


def start_under_today_s_pressure(patch):
    patch.setattr(RunningTurn, "start", lambda self, brownout: self.retrieval.start(brownout))


@pytest.mark.parametrize(
    "damage",
    [
        see_the_whole_prefix, refresh_never, draw_from_the_beginning, see_what_comes_later, stand_where_the_question_ended,
        start_under_today_s_pressure,
    ],
)  # fmt: skip
def test_damage_is_noticed(damage, model):
    asked = [turn(QUESTIONS[0], refresh_every=4, sampling=SamplingParams(max_tokens=12, temperature=0.9, seed=1))]
    check_every_cut(model, asked, counts=(1, 4, 7, 11), brownouts=(0.8,))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        if damage is stand_where_the_question_ended:
            asked = [replace(asked[0], refresh_every=0)]
        damage(patch)
        check_every_cut(model, asked, counts=(1, 4, 7, 11), brownouts=(0.8,))


def test_a_wrong_token_in_a_replay_changes_what_follows(model):
    plain = bench(model)
    made = record(turn("why?"), ask(plain, turn("why?"))[0])
    wrong = list(made.token_ids[:9])
    wrong[4] = (wrong[4] + 1) % 300
    b = bench(model)
    ask(b, replace(made.turn, replay=Replay(tuple(wrong))))
    with pytest.raises(AssertionError):
        assert_same_tail(tail_of(b), tail_of(plain))


def test_finish_reasons_of_replays(model):
    events, _ = ask(bench(model), turn("why?", max_tokens=3))
    done = ask(bench(model), again(record(turn("why?", max_tokens=3), events)))[0][-1]
    assert done.finish_reason == FinishReason.LENGTH and done.usage.completion_tokens == 3 and done.index == 3
