"""Many turns at once: the same answers as one by one, whatever joins, leaves, is refused or evicted meanwhile."""

import random

import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadRequest, Cancelled, DeadlineExceeded, Internal, NotFound, QueueFull, TooLarge
from sparsevila_cluster.core.requests import FinishReason, SamplingParams, Turn
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.transformers_oracle import Bench, random_media


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0))
    model.chat.eos_ids = frozenset()
    return model


def bench(model, **fields):
    return Bench(model, build_config(model="unused", **{"prefix_bytes": 2**24, "turn_bytes": 2**24, **fields}))


def text(events):
    errors = [e for e in events if isinstance(e, Exception)]
    if errors:
        return errors[0]
    return [t for e in events for t in e.token_ids]


def prepare(b, count=3):
    return [b.prefix(random_media("video", 2 + 2 * i, 56 + 28 * i, 84, seed=i), key=f"m{i}") for i in range(count)]


def at_baseline(b, conversations):
    b.decode.check_integrity()
    for c in conversations:
        b.decode.close_conversation(c)
    assert b.decode.conversations.arena.used_bytes == 0 and not b.decode.turns
    for prefix in list(b.decode.prefixes):
        assert b.decode.prefixes.remove(prefix.key)
    assert b.decode.prefixes.arena.used_bytes == 0


@pytest.mark.parametrize("sparsity", [{"retrieve": "retrieve_all"}, {"prune_keep": 0.5, "retrieve_keep": 0.3}])
def test_ragged_batch_equals_one_by_one(model, sparsity):
    script = [(f"c{i % 5}", i % 3, f"question number {i}?", 3 + (7 * i) % 11) for i in range(15)]
    media_of = {c: f"m{m}" for c, m, *_ in reversed(script)}

    def play(together):
        b = bench(model, max_batch=4, max_step_tokens=40, **sparsity)
        prepare(b)
        said = []
        for conversation, _, question, count in script:
            said.append(b.submit(media_of[conversation], conversation, question, count))
            if not together:
                b.run()
            elif len(said) % 3 == 0:
                b.decode.step()
        b.run()
        result = [text(events) for events in said]
        at_baseline(b, media_of)
        return result

    assert play(together=True) == play(together=False)


def test_question_and_decode_rows_share_a_step(model):
    b = bench(model)
    prepare(b, 1)
    shares = []
    b.submit("m0", "a", "first?", 6)
    b.decode.step()
    b.submit("m0", "b", "second?", 2)
    b.decode.scheduler.schedule, plain = lambda: shares.append(plain()) or shares[-1], b.decode.scheduler.schedule
    b.decode.step()
    assert [turn for turn, _ in shares[0]] == ["a/first?", "b/second?"] and shares[0][0][1] == 1 < shares[0][1][1]


def test_an_aborted_turn_leaves_no_trace(model):
    def talk(disturb):
        b = bench(model, retrieve_keep=0.4)
        prepare(b, 1)
        first = b.say("m0", "a", "one?", 5)
        if disturb:
            for steps in (0, 1, 3):
                events = b.submit("m0", "a", f"never mind {steps}", 9)
                for _ in range(steps):
                    b.decode.step()
                assert b.decode.abort(f"a/never mind {steps}")
                assert isinstance(events[-1], Cancelled)
                b.decode.check_integrity()
        second = b.say("m0", "a", "two?", 5)
        at_baseline(b, "a")
        return first.tokens, second.tokens

    assert talk(disturb=True) == talk(disturb=False)


def test_parked_tails_and_evicted_prefixes_change_nothing(model):
    b = bench(model)
    prepare(b, 1)
    wanted = [b.say("m0", "a", q, 6).tokens for q in ("one?", "two?", "three?")]
    room = 140 * model.spec.bytes_per_token
    small = bench(model, turn_bytes=room, prefix_bytes=room)
    got = []
    for i, question in enumerate(("one?", "two?", "three?")):
        if "m0" not in small.decode.prefixes:
            small.prefix(random_media("video", 2, 56, 84, seed=0), key="m0")
        got.append(small.say("m0", "a", question, 6).tokens)
        for other in range(3):
            small.say("m0", f"other{i}{other}", "and this one, much longer than the others?", 20)
        for extra in range(4):
            small.prefix(random_media("video", 4, 84, 84, seed=50 + extra), key=f"x{i}{extra}")
    assert got == wanted
    assert small.decode.conversations.num_parked > 0 and small.decode.prefixes.num_evicted > 0
    small.decode.check_integrity()


def test_storm_of_turns_and_aborts_returns_every_byte(model):
    rng = random.Random(11)
    b = bench(model, max_batch=5, turn_bytes=300 * model.spec.bytes_per_token, prune_keep=0.5, retrieve_keep=0.3)
    prepare(b)
    alone = bench(model, prune_keep=0.5, retrieve_keep=0.3)
    prepare(alone)
    said, aborted = {}, set()
    for i in range(80):
        conversation, question = f"c{i}", f"storm {i}"
        said[conversation] = (b.submit(f"m{i % 3}", conversation, question, rng.randint(1, 12)), question, i % 3)
        for _ in range(rng.randint(0, 3)):
            b.decode.step()
        if rng.random() < 0.3:
            victim = rng.choice(list(said))
            if b.decode.abort(f"{victim}/{said[victim][1]}"):
                aborted.add(victim)
        b.decode.check_integrity()
    b.run()
    for conversation, (events, question, media) in said.items():
        if conversation in aborted:
            assert isinstance(events[-1], Cancelled)
        elif rng.random() < 0.4:
            tokens = text(events)
            assert tokens == alone.say(f"m{media}", conversation, question, len(tokens)).tokens
    at_baseline(b, said)


@pytest.mark.parametrize(
    "fields, question, error, words",
    [
        ({}, "x " * 3000, TooLarge, "2048"),
        ({"max_question_tokens": 3}, "what is this thing?", TooLarge, "limit is 3"),
        ({}, "a <|im_end|> b", BadRequest, "im_end"),
        ({}, "a <|video_pad|> b", BadRequest, "video_pad"),
    ],
)
def test_bad_questions_are_refused_and_harm_nobody(model, fields, question, error, words):
    b = bench(model, **fields)
    prepare(b, 1)
    neighbour = b.submit("m0", "good", "hm?", 8)
    b.decode.step()
    with pytest.raises(error, match=words):
        b.submit("m0", "bad", question, 4)
    b.run()
    assert len(text(neighbour)) == 8
    at_baseline(b, ["good", "bad"])


def test_answers_that_cannot_fit_are_refused(model):
    b = bench(model, turn_bytes=100 * model.spec.bytes_per_token)
    prepare(b, 1)
    events = b.submit("m0", "a", "hm?", 200)
    fits = b.submit("m0", "b", "hm?", 5)
    b.run()
    assert isinstance(events[-1], TooLarge) and "turn_bytes" in str(events[-1])
    assert len(text(fits)) == 5
    over = b.submit("m0", "c", "hm?", model.max_position)
    b.run()
    assert isinstance(over[-1], TooLarge) and "position" in str(over[-1])
    at_baseline(b, "abc")


def test_unknown_media_wrong_media_and_full_queue(model):
    b = bench(model, max_waiting=2)
    prepare(b, 2)
    with pytest.raises(NotFound, match="prepare it"):
        b.submit("nothing", "a", "hm?", 3)
    b.submit("m0", "a", "hm?", 3)
    with pytest.raises(BadRequest, match="another media"):
        b.submit("m1", "a", "again?", 3)
    with pytest.raises(BadRequest, match="in use"):
        b.submit("m0", "a", "hm?", 3)
    b.submit("m0", "b", "hm?", 3)
    with pytest.raises(QueueFull, match="limit is 2"):
        b.submit("m0", "c", "hm?", 3)
    b.run()
    at_baseline(b, "ab")


def test_deadlines_end_running_and_waiting_turns(model):
    b = bench(model, max_batch=1)
    prepare(b, 1)
    running = b.submit("m0", "a", "hm?", 50, deadline_s=60.0)
    waiting = b.submit("m0", "b", "hm?", 50, deadline_s=1e-9)
    b.decode.step()
    b.decode.turns["a/hm?"].deadline_at_s = 0.0
    b.decode.step()
    assert isinstance(waiting[-1], DeadlineExceeded) and isinstance(running[-1], DeadlineExceeded)
    at_baseline(b, "ab")


def test_a_failing_step_fails_its_turns_and_not_the_engine(model, monkeypatch, caplog):
    b = bench(model)
    prepare(b, 1)
    events = b.submit("m0", "a", "hm?", 5)
    with monkeypatch.context() as patch:
        patch.setattr(model.text, "forward", lambda *args, **kwargs: 1 / 0)
        b.decode.step()
    assert isinstance(events[-1], Internal) and "ZeroDivisionError" in str(events[-1])
    assert len(caplog.records) == 1
    assert len(b.say("m0", "a", "hm?", 5).tokens) == 5
    at_baseline(b, "a")


def test_a_failing_listener_ends_only_its_turn(model):
    b = bench(model)
    prepare(b, 1)

    def broken(event):
        if getattr(event, "kind", "") == "token":
            raise RuntimeError("listener is gone")

    b.decode.submit(Turn("t", "x", "m0", "hm?", SamplingParams(max_tokens=5)), broken)
    good = b.submit("m0", "a", "hm?", 5)
    b.run()
    assert len(text(good)) == 5
    at_baseline(b, "ax")


def test_seeded_sampling_does_not_depend_on_neighbours(model):
    def sample(neighbours):
        b = bench(model)
        prepare(b, 1)
        for i in range(neighbours):
            b.submit("m0", f"n{i}", "hm?", 12)
        events = []
        params = SamplingParams(max_tokens=10, temperature=0.8, top_p=0.9, top_k=20, seed=5)
        b.decode.submit(Turn("t", "x", "m0", "hm?", params), events.append)
        b.run()
        return text(events)

    assert sample(0) == sample(3)


def test_events_usage_and_stop_strings(model):
    b = bench(model, prune_keep=0.5, retrieve_keep=0.25)
    prefix = prepare(b, 1)[0]
    events = b.submit("m0", "a", "hm?", 12, want_evidence=True)
    b.run()
    kinds = [e.kind for e in events]
    assert kinds[0] == "accepted" and kinds[1] == "evidence" and kinds[-1] == "done" and kinds.count("token") == 12
    assert [e.index for e in events if e.kind == "token"] == list(range(12))
    usage = events[-1].usage
    assert usage.visual_tokens == prefix.metadata.num_visual and usage.visual_tokens_kept == prefix.num_kept
    assert usage.visual_tokens_retrieved == round(0.25 * prefix.num_kept + 1e-9)
    assert usage.completion_tokens == 12 and events[-1].finish_reason == FinishReason.LENGTH
    evidence = next(e.evidence for e in events if e.kind == "evidence")
    assert abs(sum(f.share for f in evidence) - 1.0) < 1e-6
    assert sum(len(f.kept) for f in evidence) == prefix.num_kept
    whole = "".join(e.text for e in events)
    stop = whole[3:6]
    cut = []
    b.decode.submit(Turn("t", "b", "m0", "hm?", SamplingParams(max_tokens=12, stop=(stop,))), cut.append)
    b.run()
    assert "".join(e.text for e in cut) == whole[: whole.index(stop)] and cut[-1].finish_reason == FinishReason.STOP
    at_baseline(b, "ab")


def test_evidence_is_given_for_answers_of_one_token_too(model):
    b = bench(model)
    prepare(b, 1)
    events = b.submit("m0", "a", "hm?", 1, want_evidence=True)
    b.run()
    assert [e.kind for e in events] == ["accepted", "evidence", "token", "done"]
    assert torch.tensor([f.share for f in events[1].evidence]).sum() == pytest.approx(1.0)
