"""An answer, and the same one cut and replayed: how to make both, and what must be equal."""

from dataclasses import replace

import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.requests import Answer, Replay, SamplingParams, Turn, TurnRecord
from tests.checkpoints.transformers_oracle import Bench, random_media
from tests.engine.single_turn_reference import ATOL, recorded_logits

SPARSE = {"prune_keep": 0.5, "retrieve_keep": 0.3, "brownout_floor": 0.05}


def bench(model, slots=4000, frames=6, **fields):
    size = model.spec.bytes_per_token
    b = Bench(model, build_config(model="unused", **{"prefix_bytes": 2**24, "turn_bytes": slots * size, **SPARSE, **fields}))
    b.prefix(random_media("video", frames, 84, 112, seed=1), key="m")
    return b


def turn(question, conversation="c", max_tokens=12, **options):
    sampling = options.pop("sampling", SamplingParams(max_tokens=max_tokens))
    return Turn(f"{conversation}/{question}", conversation, "m", question, sampling, **options)


def submit(b, asked):
    events = []
    b.decode.submit(asked, events.append)
    return events


def run(b):
    while not b.decode.idle:
        b.decode.step()
        b.decode.check_integrity()


def ask(b, asked):
    """(events, logits of its sampled tokens) of a turn alone."""
    with recorded_logits() as heard:
        events = submit(b, asked)
        sampler = b.decode.turns[asked.turn_id].sampler
        run(b)
    assert not isinstance(events[-1], Exception), events[-1]
    return events, heard.get(sampler, [])


def tail_of(b, conversation="c"):
    """KV rows of the conversation's own text, all layers, [layers, 2, rows, Hkv, D]."""
    state = b.decode.conversations.get(conversation)
    layers = map(state.extent.rows, range(b.model.spec.num_layers))
    return torch.stack([torch.stack([rows[: state.length] for rows in pair]) for pair in layers]), state.next_pos, state.pending


def record(asked, events):
    answer = Answer.from_events(events)
    return TurnRecord(asked, answer.token_ids, answer.usage.brownout)


def again(made, count=None):
    """The recorded turn with its first `count` tokens as a replay; None = the whole answer."""
    return replace(made.turn, replay=Replay(made.token_ids[:count], made.brownout))


def assert_goes_on(events, logits, whole, whole_logits, count):
    """`events` are those of the uninterrupted `whole` behind its first `count` tokens."""
    told = [e for e in events if e.kind == "token"]
    wanted = [e for e in whole if e.kind == "token" and e.index >= count]
    assert told == wanted, f"replayed {count}"
    assert (events[-1].text, events[-1].finish_reason, events[-1].index) == (
        whole[-1].text, whole[-1].finish_reason, whole[-1].index,
    )  # fmt: skip
    assert len(logits) == len(told) and min(events[-1].usage.ms.values()) >= 0
    assert all((a - b).abs().max() < ATOL for a, b in zip(logits, whole_logits[count:], strict=True))


def assert_same_tail(got, wanted):
    assert got[1:] == wanted[1:] and got[0].shape == wanted[0].shape
    assert (got[0] - wanted[0]).abs().max() < ATOL


def check_every_cut(model, asked, counts=None, brownouts=(0.0, 0.0, 0.0), **fields):
    """Several turns of one conversation; each in turn is cut behind every token and goes on in an engine of its own."""
    whole = bench(model, **fields)
    records, tails = [], []
    for question, level in zip(asked, brownouts, strict=False):
        whole.decode.set_brownout(level)
        events, logits = ask(whole, question)
        records.append((record(question, events), events, logits))
        tails.append(tail_of(whole))
    for number, (made, events, logits) in enumerate(records):
        for count in counts or range(len(made.token_ids) + 1):
            b = bench(model, **fields)
            for earlier, *_ in records[:number]:
                replayed, sampled = ask(b, again(earlier))
                assert [e.kind for e in replayed] == ["accepted", "done"] and not sampled
            b.decode.set_brownout(0.0)
            got, got_logits = ask(b, replace(again(made, count), after=number))
            assert_goes_on(got, got_logits, events, logits, count)
            assert_same_tail(tail_of(b), tails[number])
            usage, was = got[-1].usage, events[-1].usage
            assert replace(usage, ms={}) == replace(was, ms={})
    return [made for made, *_ in records]
