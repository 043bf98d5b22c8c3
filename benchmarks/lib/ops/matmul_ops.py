"""Cases of `awq_matmul` and `int8_matmul`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsevila_kernels as kernels
from benchmarks.lib.device_clock import DTYPES
from benchmarks.lib.flop_counts import Work
from benchmarks.lib.ops.op_case import Case, Sizes, Subject, module_file, random, ways
from sparsevila_kernels import awq_format

AWQ_DTYPE = "bfloat16"


def cases(sizes: Sizes) -> Iterator[Case]:
    """The text model's matrices in 4 bits, gate and up as one; the vision tower's in 8."""
    s = sizes
    matrices = {"gate_up": (s.hidden, 2 * s.intermediate), "down": (s.intermediate, s.hidden)}
    if s.all_matrices:
        matrices |= {"qkv": (s.hidden, s.qkv), "out": (s.num_heads * s.head_dim, s.hidden)}
    for name, (num_in, num_out) in matrices.items():
        for rows in s.matmul_rows:
            told = {"rows": rows, "num_in": num_in, "num_out": num_out}
            shape = f"{name} {num_in} x {num_out}, {rows} row" + "s" * (rows > 1)
            main = name == "gate_up" and rows == s.matmul_rows[0]
            yield Case("awq_matmul", shape, AWQ_DTYPE, Awq(s, rows, num_in, num_out), main, told)
    rows = s.frame_groups * s.patches
    matrices = {"gate": (s.vision_hidden, s.vision_intermediate), "down": (s.vision_intermediate, s.vision_hidden)}
    if s.all_matrices:
        matrices |= {"qkv": (s.vision_hidden, 3 * s.vision_hidden), "out": (s.vision_hidden, s.vision_hidden)}
    for name, (num_in, num_out) in matrices.items():
        told = {"rows": rows, "num_in": num_in, "num_out": num_out}
        shape = f"vision {name} {num_in} x {num_out}, {rows} rows"
        yield Case("int8_matmul", shape, AWQ_DTYPE, Int8(rows, num_in, num_out), name == "gate", told)


class Awq:
    """x [M, K] times a matrix of 4-bit groups, rounded to nearest: what a weight says does not change the time."""

    def __init__(self, sizes: Sizes, rows: int, num_in: int, num_out: int):
        self.sizes, self.rows, self.num_in, self.num_out = sizes, rows, num_in, num_out

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        group, dtype = self.sizes.group_size, DTYPES[AWQ_DTYPE]
        dense = random((self.num_out, self.num_in), torch.float32, device, 1) / self.num_in**0.5
        words = awq_format.quantize_rtn(dense, group)
        dense = dense.to(dtype)
        x = random((self.rows, self.num_in), dtype, device, 2)
        # Triton reads planes only; where nobody asks for it, the weight lies as the device likes it.
        weight = kernels.AwqWeight.from_gemm(*words, layout="planes" if "triton" in backends else "auto")
        out_bytes = self.rows * self.num_out * dtype.itemsize
        work = Work(2.0 * self.rows * self.num_in * self.num_out, sum(t.nbytes for t in words) + x.nbytes + out_bytes)
        subject = Subject(work, ways("awq_matmul", backends, lambda run: partial(run, x, weight)))
        if device.type == "cpu":
            subject.add_peer("_weight_int4pack_mm_for_cpu", lambda: _int4pack_cpu(x, words, group))
        else:
            subject.add_peer("_weight_int4pack_mm", lambda: _int4pack_cuda(x, words, group))
            half = x.half()
            for package, path in TRITON_PEERS.items():
                subject.add_peer(f"{package} Triton (fp16)", partial(_triton_peer, package, path, half, words))
        subject.add_peer("unquantised matmul", lambda: lambda: F.linear(x, dense), judged=False, role="context")
        return subject


class Int8:
    """The same with 8-bit weights per channel and 8-bit rows."""

    def __init__(self, rows: int, num_in: int, num_out: int):
        self.rows, self.num_in, self.num_out = rows, num_in, num_out

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        dtype = DTYPES[AWQ_DTYPE]
        dense = random((self.num_out, self.num_in), dtype, device, 1) / self.num_in**0.5
        x = random((self.rows, self.num_in), dtype, device, 2)
        weight = kernels.Int8Weight.of(dense)
        out_bytes = self.rows * self.num_out * dtype.itemsize
        work = Work(2.0 * self.rows * self.num_in * self.num_out, dense.numel() + 4.0 * self.num_out + x.nbytes + out_bytes)
        subject = Subject(work, ways("int8_matmul", backends, lambda run: partial(run, x, weight)))
        subject.add_peer("torch._int_mm and scales", lambda: _int_mm(x, dense))
        subject.add_peer("unquantised matmul", lambda: lambda: F.linear(x, dense), judged=False, role="context")
        return subject


def _codes(words: tuple[Tensor, Tensor, Tensor], group: int) -> tuple[Tensor, Tensor]:
    """AutoAWQ tensors as torch's int4 operators want them: codes i32 [N, K], and scale and zero bf16 [K/g, N, 2], where a
    weight is (code - 8) * scale + zero.
    """
    qweight, qzeros, scales = words
    codes = awq_format.unpack(qweight).t().contiguous().int()
    s, z = scales.float(), awq_format.unpack(qzeros).float()
    return codes, torch.stack([s, (8 - z) * s], -1).to(torch.bfloat16).contiguous()


def _int4pack_cpu(x: Tensor, words: tuple[Tensor, Tensor, Tensor], group: int) -> Callable[[], Tensor]:
    codes, scale_and_zero = _codes(words, group)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_zero)


def _int4pack_cuda(x: Tensor, words: tuple[Tensor, Tensor, Tensor], group: int) -> Callable[[], Tensor]:
    """Two codes to a byte, the even one above; tiles of 8 x 16 along K."""
    codes, scale_and_zero = _codes(words, group)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scale_and_zero)


TRITON_PEERS = {"awq": "modules/triton/gemm.py", "gptqmodel": "quantization/awq/modules/triton/gemm.py"}


def _triton_peer(package: str, path: str, x: Tensor, words: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Any]:
    """AutoAWQ's Triton kernel, or gptqmodel's copy of it: float16 only, split 8 ways along K as AutoAWQ calls it."""
    run = module_file(package, path).awq_gemm_triton
    qweight, qzeros, scales = words
    return lambda: run(x, qweight, scales, qzeros, 8)


def _int_mm(x: Tensor, dense: Tensor) -> Callable[[], Tensor]:
    """What one writes with torch alone: quantise the rows, multiply, scale; padded to the multiples of 8 that CUDA asks for."""
    num_out, num_in = dense.shape
    scales = dense.float().abs().amax(1) / 127
    values = torch.round(dense.float() / scales[:, None]).to(torch.int8)
    padded = F.pad(values, (0, -num_in % 8, 0, -num_out % 8)).t()

    def run() -> Tensor:
        row = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = F.pad(torch.round(x.float() / row).to(torch.int8), (0, -num_in % 8))
        return (torch._int_mm(codes, padded)[:, :num_out].float() * row * scales).to(x.dtype)

    return run
