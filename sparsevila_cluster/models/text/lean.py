"""Our text decoder: Llama, Mistral, Qwen2, Qwen2.5 and Qwen3 text models as one loop of few, large operations.

Decoding one token of a small model costs what its operations cost to launch, so the loop is written for few launches: fused
qkv and gate/up weights, residual additions inside the matrix product, no shape that depends on data, no device sync.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsevila_cluster.attention.interface import StepBatch
from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.models.text.linear import Matrix, take_matrix
from sparsevila_cluster.models.text.rotary import Rotary

KNOWN_TEXT_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen2_5_vl_text", "qwen3_vl_text"})


class _Layer(NamedTuple):
    """Weights of one layer as the loop wants them: norm weights scaled for the chosen norm."""

    norm_in: Tensor
    qkv: Matrix
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    out: Matrix
    out_bias: Tensor | None
    norm_mlp: Tensor
    gate_up: Matrix
    down: Matrix


class LeanDecoder:
    """TextBackend "lean". Built by `from_modules`, which empties the modules that it takes the weights from."""

    name = "lean"

    def __init__(self, config: Any, spec: KVSpec, layers: list[_Layer], final_norm: Tensor, rope: Rotary, form: Plain):
        self.spec = spec
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_position_rows = rope.num_rows
        self.embed_weight: Tensor | None = None
        self.head_weight: Tensor | None = None
        self._layers = layers
        self._final_norm = final_norm
        self._rope = rope
        self._scale = spec.head_dim**-0.5
        self._eps = form.eps
        self._norm, self._head_norm = form.norm, form.head_norm

    @classmethod
    def from_modules(cls, config: Any, spec: KVSpec, language_model: Any) -> LeanDecoder:
        """Take the weights of a transformers text model, layer by layer, leaving it empty: never twice in memory.

        Raises:
            BadCheckpoint: the text model is of a kind that this decoder does not compute.
        """
        why = unsupported(config)
        if why:
            raise BadCheckpoint(f"text_backend 'lean' cannot run this checkpoint: {why}")
        rope = Rotary.from_module(language_model.rotary_emb)
        form = cls._form_for(spec, rope.device)(config.hidden_size, spec.head_dim, float(config.rms_norm_eps))
        layers = []
        for i in range(len(language_model.layers)):
            layers.append(_take_layer(language_model.layers[i], form, spec.dtype))
            language_model.layers[i] = None
        return cls(config, spec, layers, form.norm_weight(language_model.norm.weight.data), rope, form)

    @staticmethod
    def _form_for(spec: KVSpec, device: torch.device) -> type[Plain]:
        return _ForSmallCPU if spec.dtype == torch.float32 and device.type == "cpu" else Plain

    def embed(self, ids: Tensor) -> Tensor:
        """ids i64 [T] -> [T, D]."""
        assert self.embed_weight is not None, 'embed needs the "embed" part'
        return F.embedding(ids, self.embed_weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> float32 [n, V]."""
        assert self.head_weight is not None, 'logits need the "head" part'
        return F.linear(hidden, self.head_weight).float()

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        batch: StepBatch,
        deepstack: Sequence[Tensor] = (),
        visual_rows: Tensor | None = None,
        kv_only: bool = False,
    ) -> Tensor:
        """hidden [T, D], positions i64 [R, T] -> [T, D] after the final norm; see `TextBackend.forward`."""
        h, num_tokens = hidden, hidden.shape[0]
        norm, head_norm, attend, scale = self._norm, self._head_norm, batch.attend, self._scale
        num_heads, num_kv_heads, head_dim = self.num_heads, self.spec.num_kv_heads, self.spec.head_dim
        num_qk = num_heads + num_kv_heads
        half, last = head_dim // 2, len(self._layers) - 1
        cos, sin = self._rope(positions, h.dtype)
        for i, (norm_in, qkv, qkv_bias, qk_norm, out, out_bias, norm_mlp, gate_up, down) in enumerate(self._layers):
            x = norm(h, norm_in)
            if kv_only and i == last:
                self._write_last(x, self._layers[i], cos, sin, batch)
                return h
            x = qkv.mm(x) if qkv_bias is None else qkv.addmm(qkv_bias, x)
            qk, v = x.view(num_tokens, -1, head_dim).split_with_sizes((num_qk, num_kv_heads), 1)
            if qk_norm is not None:
                qk = head_norm(qk, qk_norm)
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
            q, k = qk.split_with_sizes((num_heads, num_kv_heads), 1)
            o = attend(i, q, k, v, scale)
            h = out.addmm(h, o.reshape(num_tokens, -1))
            if out_bias is not None:
                h = h + out_bias
            gate, up = gate_up.mm(norm(h, norm_mlp)).chunk(2, -1)
            h = down.addmm(h, F.silu(gate) * up)
            if i < len(deepstack):
                assert visual_rows is not None
                h = h.index_add(0, visual_rows, deepstack[i])
        return norm(h, self._final_norm)

    def _write_last(self, x: Tensor, layer: _Layer, cos: Tensor, sin: Tensor, batch: StepBatch) -> None:
        """The last layer of a prefill whose hidden state nobody reads: keys and values only."""
        first = self.num_heads * self.spec.head_dim
        kv = layer.qkv.tail_mm(x, first)
        if layer.qkv_bias is not None:
            kv = kv + layer.qkv_bias[first:]
        k, v = kv.view(x.shape[0], 2, self.spec.num_kv_heads, self.spec.head_dim).unbind(1)
        if layer.qk_norm is not None:
            k = self._head_norm(k, layer.qk_norm[self.num_heads :])
        k = torch.addcmul(k * cos, k.roll(self.spec.head_dim // 2, -1), sin)
        batch.write(len(self._layers) - 1, k, v)


def unsupported(config: Any) -> str | None:
    """Why LeanDecoder cannot run a text config, or None if it can."""
    if config.model_type not in KNOWN_TEXT_MODELS:
        return f"text model {config.model_type!r} is not one of {', '.join(sorted(KNOWN_TEXT_MODELS))}"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act {config.hidden_act!r} is not 'silu'"
    if getattr(config, "mlp_bias", False):
        return "mlp_bias is set"
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor is not 1"
    return None


class Plain:
    """Weights and norms as torch has them: right for CUDA, where F.rms_norm is one kernel and GEMMs take any layout."""

    def __init__(self, hidden_size: int, head_dim: int, eps: float):
        self.eps = eps
        self.norm = self._make_norm(hidden_size, eps)
        self.head_norm = self._make_norm(head_dim, eps)

    def matrix(self, weight: Tensor) -> Tensor:
        """[out, in] -> [in, out], so that `addmm` takes it without a transpose per call."""
        return weight.t()

    def norm_weight(self, weight: Tensor) -> Tensor:
        """The weight that `norm` expects, [size] or [heads, size]."""
        return weight

    def _make_norm(self, size: int, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            if weight.dim() == 1:
                return F.rms_norm(x, (size,), weight, eps)
            return F.rms_norm(x, (size,), None, eps) * weight

        return norm


class _ForSmallCPU(Plain):
    """float32 on a CPU, where torch decomposes F.rms_norm into six launches (9.5 us at width 128)."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Contiguous [in, out]: products of one or two rows take up to a quarter less time at width 1024, others the same."""
        return weight.t().contiguous()

    def norm_weight(self, weight: Tensor) -> Tensor:
        return weight * weight.shape[-1] ** 0.5

    def _make_norm(self, size: int, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        """x / sqrt(|x|^2 / size + eps) = x * sqrt(size) / hypot(|x|, sqrt(size * eps)): four launches (5 us)."""
        floor = torch.tensor((size * eps) ** 0.5)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), floor) * weight

        return norm


def _take_layer(layer: Any, form: Plain, dtype: torch.dtype) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = None if attention.q_proj.bias is None else torch.cat([p.bias.data for p in projections])
    qk_norm = None
    if hasattr(attention, "q_norm"):
        head_dim = attention.head_dim
        of = ((attention.q_norm, attention.q_proj), (attention.k_norm, attention.k_proj))
        qk_norm = torch.cat([n.weight.data.expand(p.out_features // head_dim, head_dim) for n, p in of])
    out_bias = attention.o_proj.bias
    return _Layer(
        norm_in=form.norm_weight(layer.input_layernorm.weight.data),
        qkv=take_matrix(projections, form.matrix, dtype),
        qkv_bias=bias,
        qk_norm=None if qk_norm is None else form.norm_weight(qk_norm),
        out=take_matrix([attention.o_proj], form.matrix, dtype),
        out_bias=None if out_bias is None else out_bias.data,
        norm_mlp=form.norm_weight(layer.post_attention_layernorm.weight.data),
        gate_up=take_matrix([mlp.gate_proj, mlp.up_proj], form.matrix, dtype),
        down=take_matrix([mlp.down_proj], form.matrix, dtype),
    )
