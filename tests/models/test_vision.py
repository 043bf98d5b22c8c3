"""The vision tower with our attention against the stock tower, and salience against weights written out."""

import threading

import pytest
import torch

from sparsevila_cluster.models import load_model, vision_attention
from sparsevila_cluster.models.families.qwen2_5_vl import window_order
from sparsevila_cluster.models.vision_attention import Segments
from tests.checkpoints import tiny_qwen2_5_vl

SIZES = [(84, 112), (28, 28), (56, 56), (140, 84), (196, 224), (37, 301)]


def stock_tower(model, oracle, inputs):
    """(merged tokens [N, D], attention weights of every layer as [H, S, S]) from transformers, eager, one media at a time."""
    merge = model.config.vision_config.spatial_merge_size
    tokens, weights = [], []
    for media in inputs:
        grid = torch.tensor([[media.grid[0], media.grid[1] * merge, media.grid[2] * merge]])
        tokens.append(oracle.model.visual(model.family.pixel_values(media), grid_thw=grid).pooler_output)
        weights.append(grid)
    return torch.cat(tokens)


@pytest.mark.parametrize("height,width", SIZES)
@pytest.mark.parametrize("kind", ["video", "image"])
def test_tokens_equal_the_stock_tower(model, oracle, kind, height, width):
    media = model.family.patchify(tiny_qwen2_5_vl.media(kind, frames=5, height=height, width=width))
    with torch.inference_mode():
        expected = stock_tower(model, oracle, [media])
    for needs in ((), ("salience",), ("taps",)):
        got = model.family.encode([media], needs)
        torch.testing.assert_close(got.embeds, expected, atol=1e-5, rtol=1e-5)
        assert (got.taps is None) == ("taps" not in needs)
    assert len(got.embeds) == media.num_tokens


def column_means(model, oracle, media, layer):
    """Of a full-attention layer, frame by frame, from the stock eager attention's own weights."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock

    layer = oracle.model.visual.blocks[layer].attn
    seen, original = [], stock.eager_attention_forward

    def watched(module, *args, **kwargs):
        out, weights = original(module, *args, **kwargs)
        if module is layer:
            seen.append(weights[0])
        return out, weights

    stock.eager_attention_forward = watched
    try:
        stock_tower(model, oracle, [media])
    finally:
        stock.eager_attention_forward = original
    groups, rows, cols = media.grid
    assert len(seen) == groups
    order, _ = window_order((1, rows, cols), 2)
    per_group = []
    for weights in seen:
        length = weights.shape[-1]
        patches = weights.mean(0).sum(0) / length * length
        per_group.append(torch.empty(rows * cols).scatter_(0, order, patches.view(-1, 4).mean(-1)))
    return torch.cat(per_group)


@pytest.mark.parametrize("height,width", [(84, 112), (140, 84)])
def test_salience_and_taps_equal_explicit_column_means(model, oracle, height, width):
    media = model.family.patchify(tiny_qwen2_5_vl.media(frames=4, height=height, width=width))
    with torch.inference_mode():
        layers = sorted(oracle.config.vision_config.fullatt_block_indexes)
        expected = torch.stack([column_means(model, oracle, media, layer) for layer in layers], 1)
    got, tapped = model.family.encode([media]).salience, model.family.encode([media], ("taps",))
    torch.testing.assert_close(got, expected[:, -1], atol=2e-5, rtol=0)
    torch.testing.assert_close(tapped.taps, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(tapped.salience, got, atol=1e-5, rtol=0)
    assert got.dtype == torch.float32 and got.std() > 0.02
    per_group = got.view(media.grid[0], -1).mean(1)
    torch.testing.assert_close(per_group, torch.ones(media.grid[0]))


def test_several_media_in_one_call(model):
    first = model.family.patchify(tiny_qwen2_5_vl.media("image", height=90))
    second = model.family.patchify(tiny_qwen2_5_vl.media(frames=5, seed=3))
    both, alone = model.family.encode([first, second]), model.family.encode([second])
    n = first.num_tokens
    torch.testing.assert_close(both.embeds[n:], alone.embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both.salience[n:], alone.salience, atol=1e-5, rtol=0)
    assert both.group[:n].unique().tolist() == [0]
    assert both.group[n:].unique().tolist() == [1, 2, 3]
    assert both.group.dtype == both.cell.dtype == torch.int32
    rows, cols = second.grid[1:]
    assert both.cell[n : n + rows * cols].tolist() == [[r, c] for r in range(rows) for c in range(cols)]


def test_passes_of_any_size_agree(hub):
    model = load_model(hub, device="cpu")
    media = model.family.patchify(tiny_qwen2_5_vl.media(frames=9))
    expected = model.family.encode([media])
    for patches in (1, 100, 10**6):
        model.family.patches_per_pass = patches
        got = model.family.encode([media])
        torch.testing.assert_close(got.embeds, expected.embeds, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.salience, expected.salience, atol=1e-5, rtol=0)


def test_salience_that_nobody_needs_is_flat(model):
    media = model.family.patchify(tiny_qwen2_5_vl.media())
    assert torch.equal(model.family.encode([media], needs=()).salience, torch.ones(media.num_tokens))


def test_concurrent_calls_do_not_share_state(model):
    inputs = [[model.family.patchify(tiny_qwen2_5_vl.media(frames=6 + 2 * i, seed=i))] for i in range(3)]
    expected = [model.family.encode(media) for media in inputs]
    wrong = []

    def work(i):
        for _ in range(5):
            got = model.family.encode(inputs[i])
            if not torch.allclose(got.salience, expected[i].salience, atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 3, 5), (3, 4, 4), (1, 7, 2), (2, 9, 13)])
@pytest.mark.parametrize("window", [2, 4])
def test_window_order_equals_transformers(grid, window):
    from transformers.vision_utils import get_vision_window_index

    stock, cu_seqlens = get_vision_window_index(torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]]), 2, window * 28, 14)
    order, lengths = window_order(grid, window)
    assert torch.equal(order, stock)
    assert (torch.tensor(lengths) * 4).tolist() == cu_seqlens.diff().tolist()


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 1, 4, 1, 5, 3], [700, 2]])
def test_segments_attend_only_to_themselves(lengths):
    q, k, v = torch.randn(3, sum(lengths), 2, 8).unbind(0)
    expected, means = [], []
    for a, b, c in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        weights = torch.softmax(torch.einsum("qhd,khd->hqk", a, b) * 0.3, -1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, c))
        means.append(weights.mean((0, 1)) * len(a))
    segments = Segments(lengths, torch.device("cpu"))
    out, received = segments.attend_scored(q, k, v, 0.3)
    torch.testing.assert_close(segments.attend(q, k, v, 0.3), torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received, torch.cat(means), atol=1e-5, rtol=1e-5)
    assert segments.cu_seqlens.diff().tolist() == lengths and segments.max_length == max(lengths)


@pytest.mark.parametrize("num, length, heads, dim", [(1, 5, 2, 16), (3, 64, 4, 24), (2, 131, 3, 80)])
def test_salience_from_log_sum_exps_is_that_of_weights(num, length, heads, dim):
    """The way of a GPU, with the fused kernel of a CPU."""
    q, k, v = torch.randn(3, num * length, heads, dim).unbind(0)
    out, received = vision_attention._scored_by_parts(q, k, v, length, dim**-0.5)
    at_once, received_at_once = vision_attention._scored_at_once(q, k, v, length, dim**-0.5)
    torch.testing.assert_close(at_once, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received_at_once, received, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(received.view(num, length).mean(1), torch.ones(num))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[256] * 6, [300, 17, 300, 1024]])
@pytest.mark.parametrize("heads, dim", [(16, 80), (4, 72)])
def test_salience_on_a_gpu_is_that_of_a_cpu(lengths, heads, dim):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v = torch.randn(3, sum(lengths), heads, dim).bfloat16().unbind(0)
    out, received = Segments(lengths, torch.device("cpu")).attend_scored(q.float(), k.float(), v.float(), dim**-0.5)
    got, got_received = Segments(lengths, torch.device("cuda")).attend_scored(q.cuda(), k.cuda(), v.cuda(), dim**-0.5)
    torch.testing.assert_close(got.float().cpu(), out, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got_received.cpu(), received, atol=1e-2, rtol=1e-2)


def test_what_flash_kernels_take(monkeypatch):
    """Turing has none, whatever the shape."""
    for capability, some in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        for dtype, dim, taken in (
            (torch.bfloat16, 80, True),
            (torch.float16, 72, True),
            (torch.float16, 256, True),
            (torch.float16, 264, False),
            (torch.bfloat16, 36, False),
            (torch.float32, 64, False),
        ):
            q = torch.empty(3, 2, dim, dtype=dtype)
            assert vision_attention._flash_takes(q) is (some and taken)
