"""The decoder with kernels between its products equals the one in plain torch, family by family, and writes the same KV."""

import pytest
import torch

from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.text.lean import LeanDecoder
from sparsevila_cluster.models.text.lean_kernels import KernelDecoder
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.models.quantized_files import as_awq
from tests.models.test_text_backends import OTHERS, TEXT, CausalBatch, a_prompt

ROWS = 20


class ArenaBatch(CausalBatch):
    """Rows go to scattered slots of an arena that is full of NaN; each attends to all rows before it."""

    def __init__(self, spec, num_rows, device="cpu"):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.slots = torch.randperm(3 * num_rows, generator=g)[:num_rows].to(device)
        shape = (spec.num_layers, 3 * num_rows, spec.num_kv_heads, spec.head_dim)
        self.k_all, self.v_all = (torch.full(shape, float("nan"), dtype=spec.dtype, device=device) for _ in range(2))

    def target(self, layer):
        return self.k_all[layer], self.v_all[layer], self.slots

    def attend_written(self, layer, q, scale):
        assert q.is_contiguous()
        return self.attend(layer, q, self.k_all[layer][self.slots], self.v_all[layer][self.slots], scale)

    def only_its_slots_are_written(self):
        free = torch.ones(self.k_all.shape[1], dtype=torch.bool, device=self.slots.device)
        free[self.slots] = False
        return all(bool(t[:, free].isnan().all()) for t in (self.k_all, self.v_all))


def two_decoders(model_type, kind=KernelDecoder):
    """A decoder in plain torch and one with kernels, of the same random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**TEXT, **OTHERS[model_type])
    spec = KVSpec(2, 2, getattr(config, "head_dim", None) or 12, torch.float32, "")
    decoders = []
    for make in (LeanDecoder, kind):
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(config)
        for weight in stock.parameters():
            weight.requires_grad_(False)
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
        embed = stock.model.embed_tokens.weight
        decoders.append(make.from_modules(config, spec, stock.model))
        decoders[-1].embed_weight = embed
    return decoders


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_it_equals_plain_torch(model_type):
    plain, fused = two_decoders(model_type)
    hidden, positions = plain.embed(torch.arange(ROWS)), torch.arange(5, 5 + ROWS)[None]
    levels, at = (torch.randn(2, 48), torch.randn(2, 48)), torch.tensor([3, 11])
    with torch.inference_mode():
        for extra in ((), (levels, at)):
            want, got = CausalBatch(), ArenaBatch(fused.spec, ROWS)
            expected = plain.forward(hidden, positions, want, *extra)
            torch.testing.assert_close(fused.forward(hidden, positions, got, *extra), expected, atol=2e-5, rtol=0)
            for layer in range(2):
                torch.testing.assert_close(got.k[layer], want.k[layer], atol=1e-5, rtol=0)
                torch.testing.assert_close(got.v[layer], want.v[layer], atol=1e-5, rtol=0)
            assert got.only_its_slots_are_written()


def test_kv_only_stops_after_the_last_keys_and_values():
    plain, fused = two_decoders("qwen3")
    hidden, positions = plain.embed(torch.arange(ROWS)), torch.arange(ROWS)[None]
    want, got = CausalBatch(), ArenaBatch(fused.spec, ROWS)
    with torch.inference_mode():
        plain.forward(hidden, positions, want)
        fused.forward(hidden, positions, got, kv_only=True)
    assert got.calls == [("attend", 0), ("write", 1)]
    for layer in range(2):
        torch.testing.assert_close(got.k[layer], want.k[layer], atol=1e-5, rtol=0)
        torch.testing.assert_close(got.v[layer], want.v[layer], atol=1e-5, rtol=0)


def test_positions_of_three_rows(hub):
    plain, fused = (load_model(hub, device="cpu", attention=name) for name in ("torch", "triton"))
    assert isinstance(fused.text, KernelDecoder) and not isinstance(plain.text, KernelDecoder)
    with torch.inference_mode():
        embeds, positions, _ = a_prompt(plain)
        expected = plain.text.logits(plain.text.forward(embeds, positions, CausalBatch()))
        got = fused.text.logits(fused.text.forward(embeds, positions, ArenaBatch(fused.spec, len(embeds))))
    assert positions[0].ne(positions[1]).any()
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_quantized_matrices_between_kernels(tmp_path):
    """In bfloat16, in which a CPU with AVX-512 multiplies 4-bit weights as they are stored: as near to float32 as plain torch."""
    directory = as_awq(make_qwen2_5_vl(tmp_path / "fp", layers=2), tmp_path / "awq", modules_to_not_convert=["visual"])
    ids, logits = torch.arange(ROWS) * 11 % 200, []
    for dtype, name in (("float32", "torch"), ("auto", "torch"), ("auto", "triton")):
        text = load_model(directory, device="cpu", dtype=dtype, attention=name).text
        batch = ArenaBatch(text.spec, ROWS)
        with torch.inference_mode():
            logits.append(text.logits(text.forward(text.embed(ids), ids.expand(3, -1), batch)))
    assert text.spec.dtype == torch.bfloat16
    plain, fused = (float((got - logits[0]).norm() / logits[0].norm()) for got in logits[1:])
    assert 0 < fused < 2 * plain < 0.2, (fused, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [("float32", 1e-3), ("bfloat16", 0.15)])
def test_on_a_gpu_it_equals_a_cpu(dtype, atol, hub):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    plain, fused = load_model(hub, device="cpu"), load_model(hub, device="cuda", dtype=dtype, attention="triton")
    with torch.inference_mode():
        embeds, positions, _ = a_prompt(plain)
        expected = plain.text.logits(plain.text.forward(embeds, positions, CausalBatch()))
        batch = ArenaBatch(fused.spec, len(embeds), "cuda")
        got = fused.text.logits(fused.text.forward(embeds.cuda().to(fused.spec.dtype), positions.cuda(), batch))
    torch.testing.assert_close(got.cpu(), expected, atol=atol, rtol=0)
