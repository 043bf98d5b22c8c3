"""How every kernel of this package is compiled and launched, with or without Triton on the machine.

Triton's interpreter (TRITON_INTERPRET=1, read when this file is imported) runs kernels on CPU tensors, slowly, for tests. What
version 3.9 of it gets wrong, and kernels must go around by casting to fp32 when INTERPRETED: tl.dot of bf16 operands, int -> bf16,
and fp32 -> bf16, which truncates.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# Where torch knows no GPU, Triton has nothing to run on and takes 70 MB of each process. A TRITON_INTERPRET in the environment,
# be it 0 or 1, says that it is wanted all the same.
WANTED = bool(torch.version.cuda or torch.version.hip or "TRITON_INTERPRET" in os.environ)
try:
    if not WANTED:
        raise ImportError("nothing that Triton could run on")
    import triton
    import triton.language as tl

    HAS_TRITON, INTERPRETED = True, bool(triton.knobs.runtime.interpret)
except ImportError:  # also where there is no wheel for the platform: the torch paths serve everything
    triton = tl = None
    HAS_TRITON = INTERPRETED = False

# Elements from one row to the next: kernels reckon with 32 bits within a tile of at most 128 rows, with 64 between tiles.
MAX_STRIDE = 2**23
Backend = Literal["auto", "torch", "triton"]


class Variant(NamedTuple):
    """One way in which a kernel is launched, written down so that it can be compiled without a GPU.

    `signature` gives the type of each argument that is no constexpr, in Triton's words; ":16" after it says that the pointer or
    integer is divisible by 16, as that of a contiguous tensor is: {"x": "*bf16:16", "num_rows": "i32"}. `options` are num_warps
    and num_stages.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]


def jit(function: Any = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """triton.jit, or the bare function where there is no Triton: nobody launches it there.

    Arguments in `do_not_specialize`, such as counts that change from call to call, do not make Triton compile once more when they
    are 1 or a multiple of 16; they stay run-time values.
    """
    if function is None:
        return functools.partial(jit, do_not_specialize=do_not_specialize)
    return triton.jit(do_not_specialize=list(do_not_specialize))(function) if HAS_TRITON else function


def constexpr(value: Any) -> Any:
    """A constant of a module that kernels may read."""
    return tl.constexpr(value) if HAS_TRITON else value


def choose(backend: Backend, tensor: Tensor) -> Literal["torch", "triton"]:
    """Which path serves `tensor`: "auto" is Triton on CUDA and torch elsewhere.

    Raises ValueError if `backend` is unknown, or if it is "triton" and Triton is missing or cannot reach the tensor.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r}: legal are 'auto', 'torch' and 'triton'")
    if backend == "auto":
        return "triton" if HAS_TRITON and tensor.is_cuda else "torch"
    if backend == "triton" and not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"backend 'triton': the tensor is on {tensor.device}; legal are CUDA tensors, or, where Triton is installed, any with "
            "TRITON_INTERPRET=1 in the environment before the import"
        )
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton': triton cannot be imported here; legal are 'auto' and 'torch'")
    return backend


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **settings: Any) -> None:
    """Start `kernel` over `grid` on `device`; an empty grid starts nothing.

    Multiplications and additions may fuse: Triton 3.9 warns unless that is said, and 3.10 changes the default. (The variable
    TRITON_DEFAULT_FP_FUSION would settle it for other kernels of the process as well, which is not ours to do.)
    """
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **settings)


def check_heads(q: Tensor, k: Tensor, name: str) -> None:
    """Raise ValueError unless q [.., Hq, D] and k [.., Hkv, D] fit: one dtype and device, Hkv divides Hq, D lies densely."""
    if q.dim() != 3 or k.dim() != 3 or q.shape[-1] != k.shape[-1] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q {tuple(q.shape)}, {name} {tuple(k.shape)}: need [rows, Hq, D] and [keys, Hkv, D], Hkv dividing Hq")
    if q.dtype != k.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q {q.dtype}, {name} {k.dtype}: need one dtype, bfloat16, float16 or float32")
    if q.device != k.device:
        raise ValueError(f"q on {q.device}, {name} on {k.device}: need one device")
    if q.stride(-1) != 1 or k.stride(-1) != 1 or max(q.stride(0), k.stride(0)) > MAX_STRIDE:
        raise ValueError(
            f"q strides {q.stride()}, {name} strides {k.stride()}: the head dimension must have stride 1, rows at most {MAX_STRIDE}"
        )


def cdiv(num: int, size: int) -> int:
    """How many parts of `size` cover `num`."""
    return -(-num // size)


def next_power_of_2(num: int) -> int:
    """The least power of two that is not below `num` >= 1."""
    return 1 << (num - 1).bit_length()
