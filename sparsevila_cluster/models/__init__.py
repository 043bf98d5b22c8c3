"""Checkpoints as engines see them. Re-exports the loader and the contract."""

from sparsevila_cluster.models.adapter import ALL_PARTS, DECODE_PARTS, PREFILL_PARTS, Model, PromptPlan, VisualInputs, VisualTokens
from sparsevila_cluster.models.loading.loader import load_model

__all__ = [
    "ALL_PARTS",
    "DECODE_PARTS",
    "PREFILL_PARTS",
    "Model",
    "PromptPlan",
    "VisualInputs",
    "VisualTokens",
    "load_model",
]
