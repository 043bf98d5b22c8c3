"""The text decoder through the checkpoint's own transformers modules: for text models that `lean` does not know, and as oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevila_cluster.attention.interface import StepBatch
from sparsevila_cluster.kvcache.arena import KVSpec

# Must not contain "flash": transformers would prepare arguments for packed flash attention. An unknown name also means that no
# mask is ever built; the step batch knows what each row may see.
ATTENTION_NAME = "sparsevila_step"


class HFDecoder:
    """TextBackend "hf"."""

    name = "hf"

    def __init__(self, config: Any, spec: KVSpec, language_model: nn.Module):
        """config: the text config; language_model: its transformers model, set to `ATTENTION_NAME`, with weights."""
        self.spec = spec
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_position_rows = 3 if "mrope_section" in (config.rope_parameters or {}) else 1
        self.embed_weight: Tensor | None = None
        self.head_weight: Tensor | None = None
        self.modules = language_model

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
        """hidden [T, D], positions i64 [R, T] -> [T, D]; see `TextBackend.forward`. kv_only computes everything all the same."""
        extra: dict[str, Any] = {}
        if deepstack:
            assert visual_rows is not None
            mask = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device).index_fill_(0, visual_rows, True)
            extra = {"deepstack_visual_embeds": list(deepstack), "visual_pos_masks": mask[None]}
        return self.modules(
            inputs_embeds=hidden[None],
            position_ids=positions[:, None] if self.num_position_rows == 3 else positions,
            use_cache=False,
            step_batch=batch,
            **extra,
        ).last_hidden_state[0]


def register() -> str:
    """Make `ATTENTION_NAME` known to transformers (harmless when repeated) and return it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, _step_attention)
    return ATTENTION_NAME


def _step_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    step_batch: StepBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None); the names are transformers' contract."""
    assert attention_mask is None
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return step_batch.attend(module.layer_idx, q, k, v, scaling)[None], None
