"""Text decoders against the stock transformers model, teacher-forced, in float32."""

import pytest
import torch
import torch.nn.functional as F

from sparsevila_cluster.models import DECODE_PARTS, load_model
from sparsevila_cluster.models.text.lean import LeanDecoder
from sparsevila_cluster.models.text.rotary import Rotary, mrope_rows
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import qwen_inputs, type_ids


class CausalBatch:
    """A step batch that remembers every row and lets each attend to all rows before it."""

    def __init__(self):
        self.k, self.v, self.calls = {}, {}, []

    def write(self, layer, k, v):
        self.calls.append(("write", layer))
        self.k[layer] = torch.cat((self.k[layer], k)) if layer in self.k else k
        self.v[layer] = torch.cat((self.v[layer], v)) if layer in self.v else v

    def attend(self, layer, q, k, v, scale):
        self.write(layer, k, v)
        self.calls[-1] = ("attend", layer)
        num, past = len(q), len(self.k[layer]) - len(q)
        mask = torch.arange(past + num, device=q.device) <= past + torch.arange(num, device=q.device)[:, None]
        q, k, v = (t.transpose(0, 1)[None] for t in (q, self.k[layer], self.v[layer]))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


def a_prompt(model):
    """(embeddings, positions, what transformers takes for the same) of an image, a video and a question."""
    inputs = [
        model.family.patchify(tiny_qwen2_5_vl.media("image", height=90)),
        model.family.patchify(tiny_qwen2_5_vl.media(frames=5)),
    ]
    plan = model.family.plan(model.chat.prefix_ids(["image", "video"], None), inputs, "hf5")
    question, _, _ = model.chat.question_ids("what colour is the star?", True, None)
    ids = torch.cat((plan.ids, torch.tensor(question)))
    after = plan.question_start_pos + torch.arange(len(question)).expand(3, -1)
    embeds = model.text.embed(ids)
    embeds[: len(plan.ids)][plan.visual_mask] = model.family.encode(inputs).embeds
    types = type_ids(model, plan, inputs, len(question))
    stock = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], **types, **qwen_inputs(model, inputs)}
    return embeds, torch.cat((plan.positions, after), dim=1), stock


@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize("layout", ["hub", "modern"])
def test_teacher_forced_logits_equal_transformers(request, layout, backend):
    directory = request.getfixturevalue(layout)
    model = load_model(directory, device="cpu", text_backend=backend)
    with torch.inference_mode():
        embeds, positions, stock = a_prompt(model)
        expected = tiny_qwen2_5_vl.hf_model(directory)(**stock).logits[0]
        got = model.text.logits(model.text.forward(embeds, positions, CausalBatch()))
    assert model.text.name == backend
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5, "logits that say nothing prove nothing"


def test_rows_one_by_one_equal_all_at_once(model):
    with torch.inference_mode():
        embeds, positions, _ = a_prompt(model)
        whole = model.text.forward(embeds, positions, CausalBatch())
        batch, rows = CausalBatch(), []
        for i in range(len(embeds)):
            rows.append(model.text.forward(embeds[i : i + 1], positions[:, i : i + 1], batch))
    torch.testing.assert_close(torch.cat(rows), whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_kv_only_gives_the_same_kv(hub, backend):
    model = load_model(hub, device="cpu", text_backend=backend)
    with torch.inference_mode():
        embeds, positions, _ = a_prompt(model)
        full, short = CausalBatch(), CausalBatch()
        model.text.forward(embeds, positions, full)
        model.text.forward(embeds, positions, short, kv_only=True)
    for layer in range(model.spec.num_layers):
        torch.testing.assert_close(short.k[layer], full.k[layer], atol=1e-5, rtol=0)
        torch.testing.assert_close(short.v[layer], full.v[layer], atol=1e-5, rtol=0)
    assert len(short.calls) == model.spec.num_layers
    assert short.calls[-1][0] == ("write" if backend == "lean" else "attend")


def test_the_caller_s_hidden_state_is_left_alone(model):
    with torch.inference_mode():
        embeds, positions, _ = a_prompt(model)
        before = embeds.clone()
        model.text.forward(embeds, positions, CausalBatch())
    assert torch.equal(embeds, before)


def test_deepstack_levels_are_added_to_visual_rows_after_their_layer(model):
    """A level added after the last layer shows directly; added after an earlier one, only through that layer's successors."""
    with torch.inference_mode():
        embeds, positions, _ = a_prompt(model)
        rows = torch.tensor([3, 5])
        extra = torch.randn(2, model.text.hidden_size)
        zero = torch.zeros_like(extra)
        plain = model.text.forward(embeds, positions, CausalBatch())
        same = model.text.forward(embeds, positions, CausalBatch(), (zero, zero, zero), rows)
        late = model.text.forward(embeds, positions, CausalBatch(), (zero, zero, extra), rows)
    torch.testing.assert_close(same, plain)
    changed = (late - plain).abs().amax(-1) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == rows.tolist()


def test_bfloat16_keeps_rotary_frequencies_in_float32(hub):
    model = load_model(hub, DECODE_PARTS, device="cpu", dtype="bfloat16")
    assert model.text.embed_weight.dtype == torch.bfloat16 == model.spec.dtype
    assert model.text._rope._inv_freq.dtype == torch.float32
    hidden = model.text.embed(torch.arange(5))
    out = model.text.forward(hidden, torch.arange(5).expand(3, -1), CausalBatch())
    assert out.dtype == torch.bfloat16 and model.text.logits(out).dtype == torch.float32


TEXT = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip
OTHERS = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 64}, "attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen2": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}},
    "qwen3": {"head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(OTHERS))
def test_lean_runs_the_text_models_of_other_families(model_type):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from sparsevila_cluster.kvcache.arena import KVSpec

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**TEXT, **OTHERS[model_type])
    stock = AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        for name, weight in stock.named_parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
            if "q_proj.weight" in name or "k_proj.weight" in name:
                weight.mul_(2.0)
        ids = torch.randint(0, 64, (20,))
        expected = stock(ids[None]).logits[0]
        head_dim = getattr(config, "head_dim", None) or 12
        text = LeanDecoder.from_modules(config, KVSpec(2, 2, head_dim, torch.float32, ""), stock.model)
        text.embed_weight, text.head_weight = stock.model.embed_tokens.weight, stock.lm_head.weight
        got = text.logits(text.forward(text.embed(ids), torch.arange(20)[None], CausalBatch()))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_interleaved_mrope_equals_transformers():
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    stock = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(**TEXT, head_dim=32, rope_parameters=rope))
    positions = torch.randint(0, 200, (3, 9))
    cos, sin = stock(torch.zeros(1), positions[:, None])
    ours = Rotary.from_module(stock)(positions, torch.float32)
    sign = torch.tensor([-1.0] * 16 + [1.0] * 16)
    torch.testing.assert_close(ours[0][:, 0], cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(ours[1][:, 0], sin[0] * sign, atol=1e-6, rtol=0)
    assert mrope_rows([2, 1, 1], False).tolist() == [0, 0, 1, 2]
    assert mrope_rows([2, 1, 1], True).tolist() == [0, 1, 2, 0]
