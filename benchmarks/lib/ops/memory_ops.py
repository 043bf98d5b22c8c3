"""Cases of the operations that only move memory: `kv_pack`, `kv_quantize`, `rms_norm`, `rope_write`, `silu_mul`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.device_clock import DTYPES
from benchmarks.lib.flop_counts import Work
from benchmarks.lib.ops.op_case import PACK, Case, Sizes, Subject, random, ways

EPS = 1e-6


def cases(sizes: Sizes) -> Iterator[Case]:
    """Packing a tenth of each video's media prefix and quantising the whole of it; then the small operations, by rows of a step."""
    s = sizes
    middle = s.tokens[min(1, len(s.tokens) - 1)]
    for num_slots in s.tokens:
        num_rows = max(1, round(num_slots * PACK))
        told = {"rows": num_rows, "slots": num_slots, "layers": s.num_layers}
        shape = f"{num_rows} of {num_slots} rows, {s.num_layers} layers"
        yield Case("kv_pack", shape, s.dtype, Pack(s, num_slots, num_rows), num_slots == middle, told)
    for num_slots in s.tokens[:2]:
        told = {"rows": num_slots, "layers": s.num_layers}
        shape = f"{num_slots} rows, {s.num_layers} layers"
        yield Case("kv_quantize", shape, s.dtype, Quantize(s, num_slots), num_slots == middle, told)
    for num_rows in (*s.batches, s.tokens[0]):
        told = {"rows": num_rows}
        main = num_rows == s.tokens[0]  # a step's few rows move too little for a rate to mean anything
        yield Case("rms_norm", f"{num_rows} x {s.hidden}, with residual", s.dtype, Norm(s, num_rows), main, told)
        yield Case("rope_write", f"{num_rows} x {s.qkv}", s.dtype, Rope(s, num_rows), main, told)
        yield Case("silu_mul", f"{num_rows} x {2 * s.intermediate}", s.dtype, Gate(s, num_rows), main, told)


class Pack:
    """Rows that differ from layer to layer, from one arena into a run of slots of another."""

    def __init__(self, sizes: Sizes, num_slots: int, num_rows: int):
        self.sizes, self.num_slots, self.num_rows = sizes, num_slots, num_rows

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        s, dtype, num = self.sizes, DTYPES[self.sizes.dtype], self.num_rows
        row = (s.num_kv_heads, s.head_dim)
        k, v = (random((s.num_layers, self.num_slots, *row), dtype, device, seed) for seed in (1, 2))
        generator = torch.Generator().manual_seed(0)
        chosen = [torch.randperm(self.num_slots, generator=generator)[:num].sort().values for _ in range(s.num_layers)]
        rows = torch.stack(chosen).to(device)
        slots = torch.arange(num, device=device)

        def places() -> tuple[Tensor, Tensor]:
            return torch.zeros_like(k[:, :num]), torch.zeros_like(v[:, :num])

        def into(pack: Callable[..., Any]) -> Callable[[], tuple[Tensor, Tensor]]:
            made = places()

            def run() -> tuple[Tensor, Tensor]:
                pack(k, v, *made, rows, slots)
                return made

            return run

        moved = 2.0 * 2 * s.num_layers * num * s.num_kv_heads * s.head_dim * dtype.itemsize
        subject = Subject(Work(0.0, moved), ways("kv_pack", backends, into))
        subject.add_peer("index_select per layer", lambda: into(_select))
        subject.add_peer("gather", lambda: into(_gather))
        return subject


class Quantize:
    """Rows of all layers as int8 with a scale per row and head. Nobody else offers this."""

    def __init__(self, sizes: Sizes, num_rows: int):
        self.sizes, self.num_rows = sizes, num_rows

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        s, dtype = self.sizes, DTYPES[self.sizes.dtype]
        k, v = (random((s.num_layers, self.num_rows, s.num_kv_heads, s.head_dim), dtype, device, seed) for seed in (1, 2))
        rows = torch.arange(self.num_rows, device=device)
        scales_bytes = 2.0 * 4 * s.num_layers * self.num_rows * s.num_kv_heads
        work = Work(0.0, 2.0 * k.nbytes + 2.0 * k.numel() + scales_bytes)
        subject = Subject(work, ways("kv_quantize", backends, lambda run: partial(run, k, v, rows)))
        return subject


class Norm:
    """x + residual, then its norm: what stands before every matrix but two of a layer."""

    def __init__(self, sizes: Sizes, num_rows: int):
        self.sizes, self.num_rows = sizes, num_rows

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        hidden, dtype = self.sizes.hidden, DTYPES[self.sizes.dtype]
        x, residual = (random((self.num_rows, hidden), dtype, device, seed) for seed in (1, 2))
        weight = random((hidden,), dtype, device, 3)

        def stock() -> tuple[Tensor, Tensor]:
            total = x + residual
            return F.rms_norm(total, (hidden,), weight, EPS), total

        work = Work(0.0, 4.0 * x.nbytes + weight.nbytes)
        subject = Subject(work, ways("rms_norm", backends, lambda run: partial(run, x, weight, EPS, residual)))
        subject.add_peer("add, F.rms_norm", lambda: stock)
        return subject


class Rope:
    """Queries and keys turned, keys and values written to their slots."""

    def __init__(self, sizes: Sizes, num_rows: int):
        self.sizes, self.num_rows = sizes, num_rows

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        s, dtype, num = self.sizes, DTYPES[self.sizes.dtype], self.num_rows
        qkv = random((num, s.qkv), dtype, device, 1)
        angle = random((num, 1, s.head_dim), torch.float32, device, 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        slots = torch.arange(num, device=device)

        def into(run: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
            k, v = (torch.zeros(num, s.num_kv_heads, s.head_dim, dtype=dtype, device=device) for _ in range(2))
            return lambda: (run(qkv, cos, sin, None, EPS, k, v, slots), k, v)

        work = Work(0.0, 2.0 * qkv.nbytes + cos.nbytes + sin.nbytes)
        subject = Subject(work, ways("rope_write", backends, into))
        subject.add_peer("roll, addcmul, index_copy_", lambda: into(partial(_turn, s.num_heads)))
        return subject


class Gate:
    """silu(gate) * up."""

    def __init__(self, sizes: Sizes, num_rows: int):
        self.sizes, self.num_rows = sizes, num_rows

    def __call__(self, device: torch.device, backends: Sequence[str]) -> Subject:
        gate_up = random((self.num_rows, 2 * self.sizes.intermediate), DTYPES[self.sizes.dtype], device, 1)
        gate, up = gate_up.chunk(2, -1)
        subject = Subject(Work(0.0, 1.5 * gate_up.nbytes), ways("silu_mul", backends, lambda run: partial(run, gate_up)))
        subject.add_peer("F.silu, mul", lambda: lambda: F.silu(gate) * up)
        return subject


def _select(k: Tensor, v: Tensor, to_k: Tensor, to_v: Tensor, rows: Tensor, slots: Tensor) -> None:
    for layer, chosen in enumerate(rows):
        torch.index_select(k[layer], 0, chosen, out=to_k[layer])
        torch.index_select(v[layer], 0, chosen, out=to_v[layer])


def _gather(k: Tensor, v: Tensor, to_k: Tensor, to_v: Tensor, rows: Tensor, slots: Tensor) -> None:
    index = rows[:, :, None, None].expand(-1, -1, *k.shape[2:])
    torch.gather(k, 1, index, out=to_k)
    torch.gather(v, 1, index, out=to_v)


def _turn(
    num_heads: int, qkv: Tensor, cos: Tensor, sin: Tensor, norm: None, eps: float, k_arena: Tensor, v_arena: Tensor, slots: Tensor
) -> Tensor:
    num_kv_heads, dim = k_arena.shape[1:]
    qk, v = qkv.view(len(qkv), -1, dim).split_with_sizes((num_heads + num_kv_heads, num_kv_heads), 1)
    q, k = torch.addcmul(qk * cos, qk.roll(dim // 2, -1), sin).split_with_sizes((num_heads, num_kv_heads), 1)
    k_arena.index_copy_(0, slots, k)
    v_arena.index_copy_(0, slots, v)
    return q
