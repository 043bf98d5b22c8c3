"""The lean decoder in fewer launches: what stands between its matrix products is one kernel each time.

    launches of a layer:  add + norm | qkv | rope, head norms, KV rows | attention | out | add + norm | gate, up | silu * up | down
                          '--- of the layer before, or none in the first

With two for the attention, ten launches, however many turns a decode step has. In plain torch as a GPU runs it, counted by what it
dispatches, they are 24 for one turn over packed KV and 94 for eight that are not gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import StepBatch
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.models.text.lean import LeanDecoder, Plain
from sparsevila_kernels import rms_norm, rope_write, silu_mul


class KernelDecoder(LeanDecoder):
    """The same weights and arithmetic; needs a GPU, or Triton's interpreter."""

    @staticmethod
    def _form_for(spec: KVSpec, device: torch.device) -> type[Plain]:
        return Plain

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
        layers, eps, scale, num_tokens = self._layers, self._eps, self._scale, len(hidden)
        norms = [layer.norm_in for layer in layers] + [self._final_norm]
        cos, sin = self._rope(positions, hidden.dtype)
        h, x = hidden, cast(Tensor, rms_norm(hidden, norms[0], eps, backend="triton"))
        for i, layer in enumerate(layers):
            if kv_only and i == len(layers) - 1:
                self._write_last(x, layer, cos, sin, batch)
                return h
            qkv = layer.qkv.mm(x) if layer.qkv_bias is None else layer.qkv.addmm(layer.qkv_bias, x)
            q = rope_write(qkv, cos, sin, layer.qk_norm, eps, *batch.target(i), backend="triton")
            o = batch.attend_written(i, q, scale)
            o = o.reshape(num_tokens, -1)
            y = layer.out.mm(o) if layer.out_bias is None else layer.out.addmm(layer.out_bias, o)
            x, h = rms_norm(y, layer.norm_mlp, eps, residual=h, backend="triton")
            y = layer.down.mm(silu_mul(layer.gate_up.mm(x), backend="triton"))
            if i < len(deepstack):
                assert visual_rows is not None
                y = y.index_add(0, visual_rows, deepstack[i])
            x, h = rms_norm(y, norms[i + 1], eps, residual=h, backend="triton")
        return x
