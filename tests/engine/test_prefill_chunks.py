"""A media prefix prefilled in chunks of any size is the one that transformers makes in one pass over the whole prompt.

Prompts are random, with runs of visual rows; the reference is a stock text model.
"""

from itertools import pairwise

import pytest
import torch

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import Cancelled
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.engine.prompt_rows import chunk_bounds, kept_prompt_rows
from sparsevila_cluster.kvcache.arena import Arena, KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import Model, PromptPlan, VisualTokens
from sparsevila_cluster.models.text import hf
from sparsevila_cluster.models.text.lean import LeanDecoder
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.transformers_oracle import random_media

LAYERS, HEAD_DIM = 3, 16
HEADS = {1: (4, 4), 2: (4, 2), 4: (4, 1), 7: (7, 1)}  # by how many share a KV head


def text_config(heads, kv_heads):
    from transformers import Qwen3VLTextConfig

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    return Qwen3VLTextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=HEAD_DIM, max_position_embeddings=512, rope_parameters=rope, initializer_range=0.2,
    )  # fmt: skip


def stock_text(heads, kv_heads, attention):
    """A text model of transformers with weights that its seed alone decides, sharpened so that a wrong row shows."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    torch.manual_seed(heads)
    config = text_config(heads, kv_heads)
    config._attn_implementation = attention
    model = Qwen3VLTextModel(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            weight.mul_(2.0)
    return model


def decoder(backend, heads, kv_heads):
    stock = stock_text(heads, kv_heads, hf.register())
    config, embed = stock.config, stock.embed_tokens.weight
    spec = KVSpec(LAYERS, kv_heads, HEAD_DIM, torch.float32, "")
    text = hf.HFDecoder(config, spec, stock) if backend == "hf" else LeanDecoder.from_modules(config, spec, stock)
    text.embed_weight = embed
    return text


def engine(text, chunk):
    model = Model(None, text, None, text.spec, "", (), torch.device("cpu"), None, "", 512, 0)
    return PrefillEngine(model, build_config(prefill_chunk=chunk))


def random_prompt(seed, num_levels, num_rows=61):
    """(plan, tokens, keep): text, then a few visual runs with text between them, of which `keep` survives."""
    g = torch.Generator().manual_seed(seed)
    runs = torch.randint(1, 9, (num_rows,), generator=g).tolist()
    visual_mask = torch.tensor([bool(i % 2) for i, length in enumerate(runs) for _ in range(length)])[:num_rows]
    ids = torch.randint(0, 40, (num_rows,), generator=g)
    positions = torch.randint(0, 5, (3, num_rows), generator=g).cumsum(1)
    num = int(visual_mask.sum())
    embeds, *levels = torch.randn(1 + num_levels, num, 32, generator=g)
    keep = (torch.rand(num, generator=g) < 0.7).nonzero()[:, 0]
    zeros = torch.zeros(num, dtype=torch.int32)
    tokens = VisualTokens(embeds, torch.ones(num), zeros, torch.zeros(num, 2, dtype=torch.int32), tuple(levels))
    return PromptPlan(ids, visual_mask, positions, 1000), tokens, keep


def empty_prefix(plan, keep, spec):
    rows = kept_prompt_rows(plan, keep)
    arena = Arena(spec, len(rows) + 3)
    arena.alloc(2)  # so that the extent begins elsewhere than the arena
    for tensor in (*arena.k, *arena.v):
        tensor.fill_(float("nan"))  # a row that is read before it is written shows
    metadata = PrefixMetadata(
        key="", spec=spec, is_visual=plan.visual_mask[rows], positions=plan.positions[:, rows],
        token_map=torch.zeros(len(rows), 3, dtype=torch.int32), next_pos=0, generation_floor=0, grids=(), media=(), frames=(),
        times_s=(), kind="video", num_frames=1, duration_s=0.0, num_visual=int(plan.visual_mask.sum()),
    )  # fmt: skip
    return rows, MediaPrefix(metadata, arena.alloc(len(rows)))


def run(text, chunk, prompt, progress=lambda *event: None):
    plan, tokens, keep = prompt
    rows, prefix = empty_prefix(plan, keep, text.spec)
    preparation = Preparation(PrepareRequest((MediaSource(b""),)), progress)
    with torch.inference_mode():
        engine(text, chunk)._run_text(preparation, plan, tokens, keep, rows, prefix)
    return prefix


def assert_same(got, expected):
    """Rows of K and V to 1e-5 of the layer's largest number."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, other.abs().max().item()), rtol=0)


def kv_of(prefix):
    return [torch.stack(prefix.extent.rows(layer)) for layer in range(prefix.spec.num_layers)]


def stock_kv(heads, kv_heads, prompt):
    """K and V of every layer, from transformers' own attention and cache, all rows at once."""
    plan, tokens, keep = prompt
    rows = kept_prompt_rows(plan, keep)
    model, visual = stock_text(heads, kv_heads, "eager"), plan.visual_mask[rows]
    with torch.inference_mode():
        hidden = model.embed_tokens(plan.ids[rows])
        hidden[visual] = tokens.embeds[keep]
        levels = [level[keep] for level in tokens.deepstack]
        extra = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": levels} if levels else {}
        out = model(inputs_embeds=hidden[None], position_ids=plan.positions[:, None, rows], use_cache=True, **extra)
    return [torch.stack((layer.keys[0], layer.values[0])).transpose(1, 2) for layer in out.past_key_values.layers]


@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize("num_levels", [0, 2])
@pytest.mark.parametrize("shared", HEADS)
def test_chunks_of_any_size_equal_one_pass_of_transformers(backend, num_levels, shared):
    text, prompt = decoder(backend, *HEADS[shared]), random_prompt(shared, num_levels)
    want = stock_kv(*HEADS[shared], prompt)
    num_rows = want[0].shape[1]
    inside_a_run = 0
    for chunk in (1, 2, 3, 7, 16, 23, num_rows - 1, num_rows, num_rows + 9):
        prefix = run(text, chunk, prompt)
        assert_same(kv_of(prefix), want)
        cuts = chunk_bounds(num_rows, chunk)[1:-1]
        inside_a_run += sum(bool(prefix.metadata.is_visual[cut - 1 : cut + 1].all()) for cut in cuts)
    assert inside_a_run > 9, "no chunk began in the middle of a visual run"


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_whole_engine_in_chunks_equals_one_shot(backend, tmp_path):
    """The public way, from frames: several media with text between them, pruned, positions closed up."""
    model = load_model(make_qwen2_5_vl(tmp_path), text_backend=backend)
    medias = [random_media("video", 5, 84, 112, seed=1), random_media("image", 1, 56, 140, seed=2)]
    made = {}
    for chunk in (1, 5, 13, 10**6):
        config = build_config(prefill_chunk=chunk, prune_keep=0.6, positions="compact")
        arena = Arena(model.spec, 100)
        preparation = Preparation(PrepareRequest((MediaSource(b""),)))
        made[chunk] = PrefillEngine(model, config).prefill(preparation, list(medias), "key", arena.alloc)
    whole = made.pop(10**6)
    for prefix in made.values():
        assert (
            torch.equal(prefix.metadata.token_map, whole.metadata.token_map) and prefix.metadata.next_pos == whole.metadata.next_pos
        )
        assert_same(kv_of(prefix), kv_of(whole))


@pytest.mark.parametrize("scope", ["global", "per_group"])
def test_a_video_encoded_in_pieces_is_pruned_as_a_whole(scope, tmp_path):
    """Passes of the tower of any size give the same tokens and salience, and the cut is made over all of them at once."""
    model = load_model(make_qwen2_5_vl(tmp_path))
    medias = [random_media("video", 7, 84, 112, seed=1), random_media("image", 1, 56, 140, seed=2)]
    inputs = [model.family.patchify(media) for media in medias]
    config = build_config(prune_keep=0.4, prune_scope=scope, prefill_chunk=9)
    made = []
    for patches in (model.family.patches_per_pass, 1, 100):
        model.family.patches_per_pass = patches
        arena = Arena(model.spec, 100)
        preparation = Preparation(PrepareRequest((MediaSource(b""),)))
        tokens = model.family.encode(inputs)
        made.append((tokens, PrefillEngine(model, config).prefill(preparation, list(medias), "key", arena.alloc)))
    whole, prefix = made.pop(0)
    kept = torch.bincount(prefix.metadata.token_map[prefix.metadata.is_visual, 0])
    shares = kept / torch.bincount(whole.group)
    assert (shares.std() > 0.05) == (scope == "global"), "the cut over the whole video was made frame by frame, or the other way"
    for tokens, other in made:
        assert_same([tokens.embeds], [whole.embeds])
        torch.testing.assert_close(tokens.salience, whole.salience, atol=1e-5, rtol=0)
        assert torch.equal(other.metadata.token_map, prefix.metadata.token_map)
        assert_same(kv_of(other), kv_of(prefix))


class Witness:
    """A text model that remembers how many rows it was given, and how many layers of them it was asked for."""

    def __init__(self, text):
        self._text, self.most_rows, self.embedded = text, 0, []

    def __getattr__(self, name):
        return getattr(self._text, name)

    def embed(self, ids):
        self.embedded.append(len(ids))
        return self._text.embed(ids)

    def forward(self, hidden, positions, batch, deepstack, visual_rows, kv_only):
        assert len(hidden) == positions.shape[1] == self.embedded[-1] and kv_only
        assert all(len(level) == len(visual_rows) for level in deepstack)
        return self._text.forward(hidden, positions, batch, deepstack, visual_rows, kv_only)


def test_no_pass_is_longer_than_a_chunk():
    text = Witness(decoder("lean", 4, 2))
    prefix = run(text, 16, random_prompt(0, 1))
    assert sum(text.embedded) == prefix.length and max(text.embedded) <= 16
    assert max(text.embedded) - min(text.embedded) <= 1, "a chunk of a few rows pays for a whole pass over the weights"


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_blocks_are_told_as_they_become_final(backend):
    """Each (layer, rows) once, in order, and no byte of it changes later: it could have been sent at that moment."""
    from sparsevila_cluster.engine import prefill_engine

    text, blocks, events = decoder(backend, 4, 2), {}, []

    class Told(prefill_engine.MediaBatch):
        def __init__(self, extent, start, stop, wrote):
            def note(layer, start, stop):
                assert (layer, start) not in blocks
                blocks[layer, start] = torch.stack(extent.rows(layer))[:, start:stop].clone()
                wrote(layer, start, stop)

            super().__init__(extent, start, stop, note)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill_engine, "MediaBatch", Told)
        prefix = run(text, 9, random_prompt(3, 2), lambda *event: events.append(event))
    bounds = chunk_bounds(prefix.length, 9)
    assert list(blocks) == [(layer, start) for start in bounds[:-1] for layer in range(LAYERS)]
    for (layer, start), block in blocks.items():
        assert torch.equal(block, kv_of(prefix)[layer][:, start : start + block.shape[1]])
    assert [stage for stage, *_ in events] == ["prefill"] * len(blocks)
    done = [done for _, done, _ in events]
    assert done == sorted(done) and 0 < done[0] and done[-1] == prefix.length == events[0][2]


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_an_abandoned_prefill_ends_within_a_layer_of_a_chunk(backend):
    events = []

    def progress(*event):
        events.append(event)
        if len(events) == 2 * LAYERS + 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        run(decoder(backend, 4, 2), 9, random_prompt(3, 0), progress)
    assert len(events) == 2 * LAYERS + 2


@pytest.mark.parametrize("num_rows, most", [(1, 1), (1, 7), (10, 3), (4097, 4096), (4096, 4096), (20742, 2048), (5, 10**9)])
def test_chunks_tile_the_rows_evenly(num_rows, most):
    bounds = chunk_bounds(num_rows, most)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == num_rows and sum(lengths) == num_rows
    assert 1 <= min(lengths) <= max(lengths) <= min(most, min(lengths) + 1)
    assert len(lengths) == -(-num_rows // most)
