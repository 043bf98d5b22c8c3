"""With which kernels a text decoder computes: `auto` resolved once, before anything is loaded."""

from __future__ import annotations

from typing import Literal

import torch

from sparsevila_cluster.core.errors import BadConfig
from sparsevila_kernels import HAS_TRITON, INTERPRETED

Kernels = Literal["torch", "triton"]


def resolve_attention(wanted: str, device: torch.device) -> Kernels:
    """ "auto" is triton on a GPU, where Triton is installed, and torch on a CPU.

    Raises:
        BadConfig: an unknown name, or triton where it cannot run: on a CPU it only does so under its interpreter.
    """
    if wanted not in ("auto", "torch", "triton"):
        raise BadConfig(f"attention must be auto, torch or triton, got {wanted!r}")
    if wanted == "auto":
        return "triton" if device.type == "cuda" and HAS_TRITON else "torch"
    if wanted == "torch":
        return "torch"
    if device.type != "cuda" and not INTERPRETED:
        raise BadConfig(
            f"attention 'triton' on device {device} works only under Triton's interpreter (TRITON_INTERPRET=1 before the start); "
            f"legal here: auto, torch"
        )
    if not HAS_TRITON:
        raise BadConfig("attention 'triton' needs Triton, which is not installed; torch works everywhere")
    return "triton"
