"""Where a model's weights go, in which numbers, and which kernels compute with them: `auto` resolved once, before loading.

A quantized checkpoint and its plain weights are one model up to the rounding of its matrix products, as they are with another GEMM:
the fingerprint is the same, and the KV of a prefill worker that runs plain weights (fast for many rows) may go to a decode worker
that runs 4-bit ones (fast for few). What differs by more than that, the dtype, is part of `KVSpec`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.models.loading.quantization_scheme import Scheme
from sparsevila_kernels import HAS_TRITON, INTERPRETED

Kernels = Literal["torch", "triton"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(device: str | torch.device) -> torch.device:
    """The device that is meant: "auto" is a GPU if there is one. Raises BadConfig: no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise BadConfig(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if target.type not in ("cpu", "cuda"):
        raise BadConfig(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    num = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= num:
        raise BadConfig(f"device {str(device)!r} does not exist here: {num} CUDA devices")
    return target


def find_dtype(dtype: str | torch.dtype, device: torch.device, config: Any, scheme: Scheme | None) -> torch.dtype:
    """The dtype that is meant: "auto" is float32 on a CPU and the checkpoint's own on a GPU, of a quantized checkpoint bfloat16.

    Quantizers write float16 into the config whatever a model was trained in, and what was trained in bfloat16 may overflow in it.

    Raises:
        BadConfig: a dtype that is not supported.
    """
    if dtype == "auto":
        if scheme is not None:
            return torch.bfloat16
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        own = DTYPES.get(own) if isinstance(own, str) else own
        return torch.float32 if device.type == "cpu" or own is None or own not in DTYPES.values() else own
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise BadConfig(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return found


def runs_as_stored(quantization: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether quantized weights stay quantized in memory: on a GPU in 16 bits, and on a CPU in bfloat16 with AVX-512, where the
    products are fast. float32 is the exact form on every device.

    Raises:
        BadConfig: quantization is neither "auto" nor "none".
    """
    if quantization not in ("auto", "none"):
        raise BadConfig(f"quantization must be auto or none, got {quantization!r}")
    if quantization == "none" or dtype == torch.float32:
        return False
    return device.type == "cuda" or (dtype == torch.bfloat16 and "AVX512" in torch.backends.cpu.get_cpu_capability())


def resolve_attention(wanted: str, device: torch.device) -> Kernels:
    """The kernels that are meant: "auto" is triton on a GPU, where Triton is installed, and torch on a CPU.

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
