"""Every switch of sparsity against stock transformers with masks per row and layer: what is kept, retrieved, and where it stands.

Teacher-forced logits in float32 over conversations of several turns, with the retrieval recomputed by the oracle.
"""

from dataclasses import replace

import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadConfig, BadRequest
from sparsevila_cluster.core.requests import kept_count
from sparsevila_cluster.models import load_model
from tests.checkpoints.families import FAMILIES
from tests.checkpoints.tiny_qwen2_5_vl import hf_model
from tests.checkpoints.transformers_oracle import Bench, Spoken, kept_of, random_media, worst
from tests.engine.retrieval_reference import RetrievalOracle, Way
from tests.engine.single_turn_reference import recorded_logits

ATOL = 1e-4
QUESTIONS = [("What happens first?", 9), ("And then, what colour is it?", 6), ("Where?", 11)]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava_next"])
def checkpoint(request, tmp_path_factory):
    """A family of three position rows, and one with structural tokens."""
    return FAMILIES[request.param].make(tmp_path_factory.mktemp(request.param), seed=0)


@pytest.fixture(scope="module")
def stock(checkpoint):
    return hf_model(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    model = load_model(checkpoint)
    model.chat.eos_ids = frozenset()
    return model


def bench(model, **fields):
    return Bench(model, build_config(model="unused", prefix_bytes=2**24, turn_bytes=2**24, **fields))


def oracle_of(b, stock, media, prefix):
    inputs, plan = b.unpruned(media)
    return RetrievalOracle(stock, b.model, inputs, plan, kept_of(prefix, inputs), b.model.chat.decode)


def converse(b, stock, ways, media=None, **options):
    """Hold the conversation with each turn's options and compare it with the oracle. Returns what was said, and the oracle."""
    media = media or random_media("video", 8, 112, 140, seed=2)
    prefix = b.prefix(media)
    oracle = oracle_of(b, stock, media, prefix)
    turns = [b.say(prefix.key, "talk", q, n, **o) for (q, n), o in zip(QUESTIONS, options.get("each", [{}] * 3), strict=True)]
    wanted = oracle.logits(turns, ways, [q for q, _ in QUESTIONS])
    assert worst(turns, wanted) < ATOL
    assert [t.tokens for t in turns] == [w.argmax(-1).tolist() for w in wanted]
    b.decode.check_integrity()
    return turns, oracle


@pytest.mark.parametrize("rows", ["all", "question", "last"])
@pytest.mark.parametrize("normalise", ["full_row", "visual"])
def test_rows_and_normalisation(rows, normalise, stock, model):
    b = bench(model, prune_keep=0.5, retrieve_keep=0.3, retrieve_rows=rows, normalise=normalise)
    converse(b, stock, [Way(keep=0.3, rows=rows, normalise=normalise)] * 3)


def test_the_switches_choose_differently(stock, model):
    """Else the test above could not tell them apart."""
    said = {}
    for rows in ("all", "question", "last"):
        for normalise in ("full_row", "visual"):
            b = bench(model, prune_keep=0.5, retrieve_keep=0.1, retrieve_rows=rows, normalise=normalise)
            prefix = b.prefix(random_media("video", 8, 112, 140, seed=2))
            spoken = b.say(prefix.key, "talk", *QUESTIONS[1])
            said[rows, normalise] = torch.stack(spoken.logits[1:])
    for one in said:
        for other in said:
            assert one == other or not torch.allclose(said[one], said[other], atol=10 * ATOL), (one, other)


@pytest.mark.parametrize("mass, keep", [(0.3, 1.0), (0.9, 1.0), (0.9, 0.25)], ids=["0.3", "0.9", "capped"])
@pytest.mark.parametrize("normalise", ["full_row", "visual"])
def test_mass(mass, keep, normalise, stock, model):
    b = bench(model, prune_keep=0.5, retrieve_mass=mass, retrieve_keep=keep, normalise=normalise)
    _, oracle = converse(b, stock, [Way(keep=keep, mass=mass, normalise=normalise)] * 3)
    most = kept_count(keep, len(oracle.kept_columns))
    assert all((count == most) if keep < 1 else 1 < count < most for counts in oracle.counts for count in counts)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_refresh(every, stock, model):
    b = bench(model, prune_keep=0.5, retrieve_keep=0.15, refresh_every=every)
    _, oracle = converse(b, stock, [Way(keep=0.15, refresh_every=every)] * 3)
    assert [len(counts) for counts in oracle.counts] == [1 + (n - 1) // every for _, n in QUESTIONS]


def test_refresh_chooses_other_rows(model):
    """A refresh that changed nothing would pass the test above with a oracle that never refreshes."""
    said = []
    for every in (0, 3):
        b = bench(model, prune_keep=0.5, retrieve_keep=0.1, refresh_every=every)
        spoken = b.say(b.prefix(random_media("video", 8, 112, 140, seed=2)).key, "talk", "What happens first?", 9)
        said.append(torch.stack(spoken.logits[:9]))
    assert torch.equal(said[0][:3], said[1][:3]), "tokens 0, 1, 2 come before the first refresh"
    assert not torch.allclose(said[0][3], said[1][3], atol=10 * ATOL)


def test_each_turn_in_a_way_of_its_own(stock, model):
    """Overrides of one turn: mass with refreshes, whose packed KV shrinks and grows; nothing but the cap; everything."""
    b = bench(model, prune_keep=0.6, retrieve_keep=0.2, retrieve_mass=0.5, refresh_every=4, normalise="visual")
    each = [
        {"retrieve_mass": 0.35, "retrieve_keep": 0.9, "refresh_every": 2},
        {"retrieve_mass": 1.0, "refresh_every": 0},
        {"retrieve_keep": 1.0, "retrieve_mass": 1.0},
    ]
    ways = [
        Way(keep=0.9, mass=0.35, refresh_every=2, normalise="visual"),
        Way(keep=0.2, normalise="visual"),
        Way(keep=1.0),
    ]
    turns, oracle = converse(b, stock, ways, each=each)
    assert len(set(oracle.counts[0])) > 1, "the set changed its size: packed KV had to follow"


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_mass_and_refresh_in_a_batch_in_pieces(backend, checkpoint, stock):
    """Turns of all kinds in one batch, questions cut into pieces of a few rows: each is judged as if it had run alone."""
    model = load_model(checkpoint, text_backend=backend)
    model.chat.eos_ids = frozenset()
    ways = {
        "a": ({"refresh_every": 2}, Way(keep=0.2, refresh_every=2)),
        "b": ({"retrieve_mass": 0.5, "retrieve_keep": 0.6, "refresh_every": 3}, Way(keep=0.6, mass=0.5, refresh_every=3)),
        "c": ({}, Way(keep=0.2)),
        "d": ({"retrieve_keep": 1.0}, Way()),
    }
    b = bench(model, prune_keep=0.5, retrieve_keep=0.2, max_step_tokens=9, max_batch=4)
    media = random_media("video", 5, 56, 140, seed=3)
    prefix = b.prefix(media)
    oracle = oracle_of(b, stock, media, prefix)
    events, samplers = {}, {}
    with recorded_logits() as heard:
        for question, count in QUESTIONS[:2]:
            for name, (options, _) in ways.items():
                asked = f"{question} {name}"
                events[asked] = b.submit(prefix.key, name, asked, count, **options)
                samplers[asked] = b.decode.turns[f"{name}/{asked}"].sampler
        b.run()
    for name, (_, way) in ways.items():
        turns, questions, pending = [], [f"{q} {name}" for q, _ in QUESTIONS[:2]], None
        for i, asked in enumerate(questions):
            tokens = [t for e in events[asked] for t in e.token_ids]
            turns.append(Spoken(model.chat.question_ids(asked, i == 0, pending)[0], tokens, heard[samplers[asked]]))
            pending = tokens[-1]
        wanted = oracle.logits(turns, [way] * 2, questions)
        assert worst(turns, wanted) < ATOL
        assert [t.tokens for t in turns] == [w.argmax(-1).tolist() for w in wanted]


@pytest.mark.parametrize("scope", ["auto", "global", "per_group"])
@pytest.mark.parametrize("kind", ["video", "image"])
def test_prune_scope(scope, kind, stock, model):
    """Which visual tokens stay, ranked and cut here in plain Python, and the conversation on what stayed."""
    b = bench(model, prune_keep=0.3, prune_scope=scope, retrieve_keep=0.4)
    media = random_media(kind, 6 if kind == "video" else 1, 112, 84, seed=8)
    prefix = b.prefix(media)
    inputs, _ = b.unpruned(media)
    with torch.inference_mode():
        tokens = model.family.encode(inputs)
    salience, group = tokens.salience.tolist(), tokens.group.tolist()
    per_group = scope == "per_group" or (scope == "auto" and kind == "video")
    scored = [i for i, s in enumerate(salience) if s == s]  # row ends have none, and always stay
    pools = [[i for i in scored if group[i] == one or not per_group] for one in (sorted(set(group)) if per_group else [0])]
    best = [i for pool in pools for i in sorted(pool, key=lambda i: -salience[i])[: kept_count(0.3, len(pool))]]
    keep = sorted(best + [i for i in range(len(salience)) if i not in scored])
    assert kept_of(prefix, inputs).tolist() == keep
    b = bench(model, prune_keep=0.3, prune_scope=scope, retrieve_keep=0.4)
    converse(b, stock, [Way(keep=0.4)] * 3, media=media)


def compact(plan, rows):
    """The plan with the positions of `rows` closed up, one run of text or media after the other, in plain Python."""
    positions, offset, i = plan.positions.clone(), 0, 0
    while i < len(rows):
        run = [rows[i]]
        while i + len(run) < len(rows) and plan.visual_mask[rows[i + len(run)]] == plan.visual_mask[run[0]]:
            run.append(rows[i + len(run)])
        for axis in positions:
            seen = sorted({int(axis[row]) for row in run})
            for at, row in enumerate(run):
                axis[row] = offset + (seen.index(int(axis[row])) if plan.visual_mask[run[0]] else at)
        offset, i = int(positions[:, run].max()) + 1, i + len(run)
    return replace(plan, positions=positions, question_start_pos=offset)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_compact_positions(kind, stock, model):
    b = bench(model, prune_keep=0.2, prune_scope="global", retrieve_keep=0.4, positions="compact")
    media = random_media(kind, 8 if kind == "video" else 1, 112, 140, seed=5)
    prefix = b.prefix(media)
    inputs, plan = b.unpruned(media)
    kept = set(plan.visual_mask.nonzero()[:, 0][kept_of(prefix, inputs)].tolist())
    rows = [row for row in range(len(plan.ids)) if row in kept or not plan.visual_mask[row]]
    closed = compact(plan, rows)
    assert closed.question_start_pos < plan.question_start_pos, "something closed up"
    oracle = RetrievalOracle(stock, model, inputs, closed, kept_of(prefix, inputs), model.chat.decode)
    turns = [b.say(prefix.key, "talk", q, n) for q, n in QUESTIONS]
    assert worst(turns, oracle.logits(turns, [Way(keep=0.4)] * 3, [q for q, _ in QUESTIONS])) < ATOL


def test_the_judge_notices_another_way(stock, model):
    b = bench(model, prune_keep=0.5, retrieve_keep=0.2, refresh_every=3)
    media = random_media("video", 8, 112, 140, seed=2)
    prefix = b.prefix(media)
    oracle = oracle_of(b, stock, media, prefix)
    questions = [q for q, _ in QUESTIONS]
    turns = [b.say(prefix.key, "talk", q, n) for q, n in QUESTIONS]
    sound = Way(keep=0.2, refresh_every=3)
    assert worst(turns, oracle.logits(turns, [sound] * 3, questions)) < ATOL
    for wrong in (Way(keep=0.2), Way(keep=0.2, refresh_every=4), Way(keep=0.24, refresh_every=3), Way(0.2, 0.3, 3)):
        assert worst(turns, oracle.logits(turns, [wrong] * 3, questions)) > 3 * ATOL, wrong


def test_usage_and_evidence_tell_what_was_chosen(model):
    b = bench(model, prune_keep=0.5, retrieve_mass=0.5, retrieve_keep=0.8)
    prefix = b.prefix(random_media("video", 8, 112, 140, seed=2))
    used = {}
    for mass in (0.2, None, 0.95, 1.0):
        events = b.submit(prefix.key, f"mass {mass}", "What?", 3, retrieve_mass=mass, want_evidence=True)
        b.run()
        usage, evidence = events[-1].usage, next(e.evidence for e in events if e.kind == "evidence")
        used[mass] = usage.visual_tokens_retrieved
        assert usage.effective_keep == usage.visual_tokens_retrieved / prefix.num_kept and not usage.degraded
        by_layer = sum(len(frame.cells) for frame in evidence)
        assert usage.visual_tokens_retrieved <= by_layer <= prefix.num_kept
    assert 1 <= used[0.2] < used[None] < used[0.95] <= used[1.0] == kept_count(0.8, prefix.num_kept)
    assert b.decode.conversations.arena.used_bytes < 10 * prefix.kv_bytes


def test_evidence_is_of_the_question(model):
    shares = []
    for every in (0, 2):
        b = bench(model, prune_keep=0.5, retrieve_keep=0.2, refresh_every=every)
        prefix = b.prefix(random_media("video", 8, 112, 140, seed=2))
        events = b.submit(prefix.key, "a", "What?", 9, want_evidence=True)
        b.run()
        assert [e.kind for e in events].count("evidence") == 1 and events[1].kind == "evidence"
        shares.append(events[1].evidence)
    assert shares[0] == shares[1]


@pytest.mark.parametrize("retrieve", ["random", "retrieve_all"])
def test_wishes_that_a_policy_without_scores_cannot_fulfil(retrieve, model):
    for field, value in (("retrieve_mass", 0.9), ("refresh_every", 4)):
        with pytest.raises(BadConfig, match=f"{field}.*query_topk"):
            bench(model, retrieve=retrieve, **{field: value})
    b = bench(model, retrieve=retrieve, refresh_every=0)
    prefix = b.prefix(random_media("video", 2, 56, 84, seed=0))
    for field, value in (("retrieve_mass", 0.9), ("refresh_every", 4)):
        with pytest.raises(BadRequest, match=f"{field}.*query_topk"):
            b.submit(prefix.key, "a", "hm?", 3, **{field: value})
    assert not b.decode.turns and len(b.decode.conversations) == 0
    assert len(b.say(prefix.key, "a", "hm?", 3, refresh_every=0).tokens) == 3


@pytest.mark.parametrize("bad", [{"retrieve_mass": 0.0}, {"retrieve_mass": 1.1}, {"refresh_every": -1}, {"refresh_every": 1.5}])
def test_illegal_wishes_are_named(bad, model):
    b = bench(model)
    prefix = b.prefix(random_media("video", 2, 56, 84, seed=0))
    with pytest.raises(BadRequest, match=next(iter(bad))):
        b.submit(prefix.key, "a", "hm?", 3, **bad)
