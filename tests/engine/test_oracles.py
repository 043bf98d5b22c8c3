"""The engine against stock transformers: dense, pruned, packed, several turns, image and video; and that faults are noticed.

Teacher-forced logits in float32, not only tokens: greedy equality survives small damage to KV.
"""

from dataclasses import replace

import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.models import load_model
from tests.checkpoints.families import FAMILIES, type_ids
from tests.checkpoints.tiny_qwen2_5_vl import hf_model
from tests.checkpoints.transformers_oracle import Bench, Oracle, kept_of, random_media, worst

ATOL = 1e-4
QUESTIONS = [("What happens first?", 9), ("And then, what colour is it?", 6), ("Where?", 7)]
MEDIA = {
    "video": [("video", 6, 84, 112)],
    "odd video": [("video", 5, 56, 140)],
    "image": [("image", 1, 112, 84)],
    "two images": [("image", 1, 112, 84), ("image", 1, 50, 130)],
    "image and video": [("image", 1, 84, 84), ("video", 4, 56, 84)],
}
# The published names and configs in one file with an own head; what transformers 5 saves in shards, with a tied head.
LAYOUTS = {"hub": {"layout": "hub"}, "modern": {"layout": "modern", "shards": 3, "tie": True}}


@pytest.fixture(scope="module", params=[(f, layout) for f in sorted(FAMILIES) for layout in LAYOUTS], ids="-".join)
def checkpoint(request, tmp_path_factory):
    family, layout = request.param
    return FAMILIES[family].make(tmp_path_factory.mktemp(family), seed=0, **LAYOUTS[layout])


@pytest.fixture(scope="module")
def stock(checkpoint):
    return hf_model(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint):
    return endless(load_model(checkpoint))


@pytest.fixture(scope="module")
def hf_text_model(checkpoint):
    return endless(load_model(checkpoint, text_backend="hf"))


def endless(model):
    """Random weights would end answers by chance; the oracles need answers of known length."""
    model.chat.eos_ids = frozenset()
    return model


def bench(model, **fields):
    return Bench(model, build_config(model="unused", prefix_bytes=2**24, turn_bytes=2**24, **fields))


def converse(bench, prefix, **options):
    return [bench.say(prefix.key, "talk", q, n, **options) for q, n in QUESTIONS]


def medias_of(name, seed):
    return [random_media(*shape, seed=10 * seed + i) for i, shape in enumerate(MEDIA[name])]


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_dense_equals_generate(kind, backend, stock, model, request):
    family = FAMILIES[model.family.name]
    if not {media[0] for media in MEDIA[kind]} <= set(family.generates):
        pytest.skip("transformers' own generate takes no such media; the masked comparison below does")
    if backend == "hf":
        model = request.getfixturevalue("hf_text_model")
    b = bench(model, prune="keep_all", retrieve="retrieve_all", video_text_pos="hf5")
    medias = medias_of(kind, seed=1)
    inputs, plan = b.unpruned(medias)
    spoken = b.say(b.prefix(medias).key, "talk", QUESTIONS[0][0], 12)
    ids = torch.tensor([plan.ids.tolist() + spoken.question_ids])
    given = {**type_ids(model, plan, inputs, len(spoken.question_ids)), **family.stock_inputs(model, inputs)}
    stock.set_attn_implementation("sdpa")
    want = stock.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=12, do_sample=False, output_logits=True,
        return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert spoken.tokens == want.sequences[0, ids.shape[1] :].tolist()
    assert worst([spoken], [torch.cat(want.logits)]) < ATOL
    assert len(set(spoken.tokens)) > 1, "an answer of one repeated token proves little"


@pytest.mark.parametrize("kind", MEDIA)
@pytest.mark.parametrize(
    "sparsity",
    [
        {"prune": "keep_all", "retrieve": "retrieve_all"},
        {"prune": "salience", "prune_keep": 0.4, "retrieve": "retrieve_all"},
        {"prune": "keep_all", "retrieve": "query_topk", "retrieve_keep": 0.3},
        {"prune": "salience", "prune_keep": 0.5, "retrieve": "query_topk", "retrieve_keep": 0.2, "prefill_chunk": 7},
        {"prune": "random", "prune_keep": 0.3, "prune_scope": "global", "retrieve": "query_topk", "retrieve_keep": 0.5},
    ],
    ids=["dense", "pruned", "packed", "pruned+packed+in-chunks", "random+packed"],
)
def test_conversation_equals_masked_transformers(kind, sparsity, stock, model):
    b = bench(model, **sparsity)
    media = medias_of(kind, seed=2)
    prefix = b.prefix(media)
    inputs, plan = b.unpruned(media)
    oracle = Oracle(stock, model, inputs, plan, kept_of(prefix, inputs, plan), sparsity.get("retrieve_keep", 1.0))
    turns = converse(b, prefix)
    wanted = oracle.logits(turns)
    assert worst(turns, wanted) < ATOL
    assert [t.tokens for t in turns] == [w.argmax(-1).tolist() for w in wanted]
    b.decode.check_integrity()


def test_a_ragged_batch_equals_one_by_one(model):
    """Turns of many lengths on two prefixes in the same steps: tokens, and the KV of every conversation's text, layer by layer."""
    asked = [(kind, f"{kind} {i}", "what is it? " * (i + 1), 3 + 5 * i) for i in range(3) for kind in ("video", "image")]
    kept = {}
    for together in (True, False):
        b = bench(model, prune_keep=0.5, retrieve_keep=0.3, refresh_every=4, max_step_tokens=24)
        for kind in ("video", "image"):
            b.prefix(medias_of(kind, seed=8), key=kind)
        heard = {}
        for kind, name, question, num in asked:
            heard[name] = b.submit(kind, name, question, num)
            if not together:
                b.run()
        b.run()
        tokens = {name: [t for event in events for t in event.token_ids] for name, events in heard.items()}
        tails = {}
        for _, name, _, _ in asked:
            state = b.decode.conversations.get(name)
            tails[name] = [rows[: state.length].clone() for i in range(model.spec.num_layers) for rows in state.extent.rows(i)]
        kept[together] = tokens, tails
    assert kept[True][0] == kept[False][0] and {len(said) for said in kept[True][0].values()} == {3, 8, 13}
    for name, rows in kept[True][1].items():
        for one, other in zip(rows, kept[False][1][name], strict=True):
            torch.testing.assert_close(one, other, atol=ATOL, rtol=0)


@pytest.mark.smoke
def test_two_conversations_on_one_prefix_do_not_mix(stock, model):
    b = bench(model, prune_keep=0.5, retrieve_keep=0.3)
    media = medias_of("video", seed=3)
    prefix = b.prefix(media)
    inputs, plan = b.unpruned(media)
    oracle = Oracle(stock, model, inputs, plan, kept_of(prefix, inputs), 0.3)
    told = {name: [] for name in "ab"}
    for question, count in QUESTIONS:
        for name in "ab":
            told[name].append(b.say(prefix.key, name, f"{question} {name}", count))
    for turns in told.values():
        assert worst(turns, oracle.logits(turns)) < ATOL


def damage_one_row(prefix, inputs, plan):
    prefix.extent.rows(1)[0][int(prefix.visual_index[3])] = 0.0


def damage_one_position(prefix, inputs, plan):
    plan.positions[-1, int(plan.visual_mask.nonzero()[kept_of(prefix, inputs)[5], 0])] += 1


def damage_one_index(prefix, inputs, plan):
    """The first kept token of the first group is taken for one of its group that was pruned."""
    rows, cols = prefix.metadata.grids[0]
    taken = {tuple(place) for place in prefix.metadata.token_map[prefix.visual_index].tolist()}
    free = next((0, r, c) for r in range(rows) for c in range(cols) if (0, r, c) not in taken)
    prefix.metadata.token_map[int(prefix.visual_index[0])] = torch.tensor(free, dtype=torch.int32)


@pytest.mark.parametrize("retrieve_keep", [1.0, 0.5])
@pytest.mark.parametrize("damage", [damage_one_row, damage_one_position, damage_one_index])
def test_the_oracle_notices(damage, retrieve_keep, stock, model):
    """One KV row, one position or one kept index is enough to fail the comparison that the tests above pass."""
    b = bench(model, prune_keep=0.5, retrieve_keep=retrieve_keep)
    media = medias_of("video", seed=4)
    prefix = b.prefix(media)
    inputs, plan = b.unpruned(media)
    sound = Oracle(stock, model, inputs, plan, kept_of(prefix, inputs), retrieve_keep)
    turns = converse(b, prefix)
    assert worst(turns, sound.logits(turns)) < ATOL
    with torch.inference_mode():
        damage(prefix, inputs, plan)
    oracle = Oracle(stock, model, inputs, plan, kept_of(prefix, inputs), retrieve_keep)
    if damage is damage_one_row:
        turns = [b.say(prefix.key, "again", q, n) for q, n in QUESTIONS]
    assert worst(turns, oracle.logits(turns)) > 3 * ATOL


def test_compact_positions_of_several_media_equal_masked_transformers(stock, model):
    """The oracle is given the closed-up positions; rows of pruned tokens are hidden, so theirs do not matter."""
    b = bench(model, prune_keep=0.5, retrieve_keep=0.5, positions="compact", video_text_pos="hf5")
    media = medias_of("image and video", seed=7)
    prefix = b.prefix(media)
    inputs, plan = b.unpruned(media)
    keep = kept_of(prefix, inputs)
    stays = ~plan.visual_mask
    stays[plan.visual_mask.nonzero()[keep, 0]] = True
    plan.positions[:, stays] = prefix.metadata.positions
    oracle = Oracle(stock, model, inputs, replace(plan, question_start_pos=prefix.metadata.next_pos), keep, 0.5)
    turns = converse(b, prefix)
    assert worst(turns, oracle.logits(turns)) < ATOL


def test_compact_positions_change_positions_only(model):
    media = medias_of("video", seed=5)
    keep, compact = (bench(model, prune_keep=0.3, positions=p).prefix(media) for p in ("keep", "compact"))
    assert torch.equal(keep.metadata.token_map, compact.metadata.token_map)
    assert compact.metadata.next_pos <= keep.metadata.next_pos
    for row in compact.metadata.positions:
        assert row.unique().tolist() == list(range(int(row.max()) + 1)) or row.max() < compact.metadata.next_pos
    order = lambda row: row.unique(return_inverse=True)[1]  # noqa: E731
    for before, after in zip(
        keep.metadata.positions[:, keep.metadata.is_visual], compact.metadata.positions[:, compact.metadata.is_visual], strict=True
    ):
        assert torch.equal(order(before), order(after)), "the grid keeps its order"


def test_salience_keeps_every_frame_and_maps_back(model):
    b = bench(model, prune_keep=0.25)
    media = random_media("video", 8, 112, 112, seed=6)
    prefix = b.prefix(media)
    inputs, plan = b.unpruned(media)
    counts = torch.bincount(prefix.metadata.token_map[prefix.visual_index, 0].long(), minlength=len(prefix.metadata.grids))
    assert counts.tolist() == [kept_count_of(rows * cols) for rows, cols in prefix.metadata.grids]
    ordinals = kept_of(prefix, inputs)
    assert torch.equal(ordinals, ordinals.sort().values)
    stays = ~plan.visual_mask
    stays[plan.visual_mask.nonzero()[ordinals, 0]] = True
    assert torch.equal(prefix.metadata.positions, plan.positions[:, stays]), "original positions, gaps kept"


def kept_count_of(total):
    return max(1, int(0.25 * total + 0.5))
