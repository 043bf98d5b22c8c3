"""Whether every kernel computes what its reference computes, at shapes that are small and odd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import sparsevila_kernels as kernels
from benchmarks.lib import device_clock
from benchmarks.lib.limit_check import Check
from benchmarks.lib.ops import attention_ops, matmul_ops, memory_ops
from benchmarks.lib.ops.op_case import TOY, Case, Sizes, error_of, random, tensors
from sparsevila_kernels import reference
from sparsevila_kernels._launch import INTERPRETED, Backend

# |result - reference| / |reference| at most, by dtype. A rounding to bfloat16 alone is 1.7e-3, to float16 2e-4.
LIMITS = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
Group = tuple[str, Callable[[], Iterator[Check]]]


def sizes_to_check(toy: bool) -> list[Sizes]:
    """Head dims that are no power of two, groups of 1, 4, 7 and 8 query heads, prime lengths, three dtypes."""
    small = replace(TOY, head_dim=64, tokens=(37, 331), batches=(1, 3), rows=(5,), keys=(131,), matmul_rows=(1, 5), scores=1 << 24)
    if toy:  # few programs for the interpreter
        return [replace(small, tokens=(37,), batches=(2,), keys=(33,), num_heads=7, num_kv_heads=1, head_dim=24)]
    wide = replace(
        small, tokens=(337, 4099), batches=(1, 16), rows=(1, 61), keys=(1009, 8191), hidden=1024, intermediate=1408,
        matmul_rows=(1, 3, 16, 17, 64, 257), group_size=128, patches=169, vision_head_dim=80, all_matrices=True,
        vision_hidden=640, vision_intermediate=856,
    )  # fmt: skip
    found = [replace(wide, dtype=dtype, num_heads=28, num_kv_heads=4, head_dim=128) for dtype in LIMITS]
    for num_heads, num_kv_heads, head_dim in ((4, 4, 64), (16, 4, 80), (14, 2, 96), (16, 2, 128), (8, 1, 64)):
        found.append(replace(small, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype="bfloat16"))
    return found


def groups(target: torch.device, toy: bool) -> list[Group]:
    """(name, its checks), of which each can be made without the others: every operation against its reference, then what no case
    asks of it.
    """
    backend: Backend = "triton" if target.type == "cuda" or INTERPRETED else "torch"
    found: dict[str, Callable[[], Iterator[Check]]] = {}
    for sizes in sizes_to_check(toy):
        for module in (attention_ops, matmul_ops, memory_ops):
            for case in module.cases(sizes):
                name = f"{case.op}, {case.dtype}, {case.shape}, {sizes.num_heads}/{sizes.num_kv_heads} heads of {sizes.head_dim}"
                found.setdefault(name, partial(_case_checks, case, name, target, backend, twice=not toy))
    for dtype in ("float32",) if toy else tuple(LIMITS):
        found[f"attention, {dtype}"] = partial(_attention_checks, target, dtype, backend, 3 if toy else 5)
    alone = Check("awq_matmul: a row is the same in a batch of 16", partial(_rows_alone, target, backend))
    found[alone.name] = lambda: iter([alone])
    return list(found.items())


def _case_checks(case: Case, name: str, target: torch.device, backend: Backend, twice: bool) -> Iterator[Check]:
    """Built when the first check runs; freed with the last."""
    limit = LIMITS["float32"] if case.op == "colreduce" else 1e-3 if case.op == "kv_quantize" else LIMITS[case.dtype]
    backends = tuple(dict.fromkeys((backend, "torch")))
    entries = {entry.name: partial(_run, entry.run, target) for entry in case.build(target, backends).entries}
    wanted = [part.clone() for part in tensors(entries.pop("reference")())] if "reference" in entries else None
    for way, run in entries.items():
        label = backend if way == "op" else way
        if wanted is not None:
            yield Check(f"{name}: {label}", partial(_error, run, wanted), limit)
        if way == "op" and twice:
            yield Check(f"{name}: {label}, the same bits twice", partial(_repeats, run))


def _run(run: Callable[[], object], target: torch.device) -> object:
    """On a GPU, what the operation is given to write into held NaN before."""
    if target.type == "cuda":
        for num in (1 << 8, 1 << 14, 1 << 18, 1 << 22, 1 << 26):  # both of the allocator's pools
            torch.full((num,), float("nan"), device=target)
    return run()


def _error(run: Callable[[], object], wanted: list[torch.Tensor]) -> float:
    return error_of(list(tensors(run())), wanted)


def _repeats(run: Callable[[], object]) -> float:
    """How many numbers differ between two runs."""
    first = [part.clone() for part in tensors(run())]
    return float(sum(int((a != b).sum()) for a, b in zip(first, tensors(run()), strict=True)))


def _attention_checks(target: torch.device, name: str, backend: Backend, num: int) -> Iterator[Check]:
    """Unequal lengths of `num` sequences, several causal rows, log-sum-exps, and arenas of which all else is NaN."""
    dtype, limit = device_clock.DTYPES[name], LIMITS[name]
    lengths = ((0, 1), (3, 0), (67, 5), (331, 19), (17, 400))[:num]
    a, b, c, d = (torch.full((1024, 2, 80), float("nan"), dtype=dtype, device=target) for _ in range(4))
    pools = ((a, b), (c, d))
    spans = torch.zeros(len(lengths), 2, 3, dtype=torch.int32)
    at = [7, 3]
    for i, pair in enumerate(lengths):
        for part, length in enumerate(pair):
            spans[i, part] = torch.tensor([part, at[part], length])
            for seed, tensor in enumerate(pools[part]):
                tensor[at[part] : at[part] + length] = random((length, 2, 80), dtype, target, 10 * i + 2 * part + seed)
            at[part] += length + 5
    spans = spans.to(target)
    q = random((len(lengths), 14, 80), dtype, target, 99)
    label = f"decode_attention, {name}, unequal lengths among NaN"

    most = max(map(sum, lengths))

    def compare(how: dict[str, Any], rows: torch.Tensor, part: int, which: torch.Tensor) -> float:
        ours = kernels.decode_attention(rows, pools, which, return_lse=True, max_keys=most, backend=backend, **how)
        return error_of(ours[part], reference.decode_attention(rows, pools, which, return_lse=True, **how)[part])

    yield Check(label, lambda: compare({}, q, 0, spans), limit)
    yield Check(f"{label}: log-sum-exp", lambda: compare({}, q, 1, spans), LIMITS["float32"])
    nums = [min(3, pair[1]) for pair in lengths[2:]]
    cu = torch.tensor([0, *torch.tensor(nums).cumsum(0).tolist()], dtype=torch.int32, device=target)
    rows = random((sum(nums), 14, 80), dtype, target, 98)
    how = {"cu_rows": cu, "max_rows": 3}
    yield Check(f"{label}: 3 causal rows each", lambda: compare(how, rows, 0, spans[2:].contiguous()), limit)

    def alone() -> float:
        def run(some: slice) -> torch.Tensor:
            return next(tensors(kernels.decode_attention(q[some], pools, spans[some], max_keys=most, backend=backend)))

        each = [run(slice(i, i + 1)) for i in range(len(q))]
        return float((run(slice(len(q))) != torch.cat(each)).sum())

    yield Check(f"{label}: a sequence is the same alone", alone)
    x, y = random((6 * num - 7, 14, 80), dtype, target, 1), random((70 * num - 139, 2, 80), dtype, target, 2)
    for reduction in ("sum", "mean", "max"):
        chosen = {"reduction": reduction, "causal": True}
        yield Check(
            f"colreduce, {name}, causal {reduction}",
            partial(_colreduce_error, x, y, chosen, backend),
            LIMITS["float32"],
        )


def _colreduce_error(q: torch.Tensor, k: torch.Tensor, how: dict[str, Any], backend: Backend) -> float:
    return error_of(kernels.colreduce(q, k, backend=backend, **how), reference.colreduce(q, k, **how))


def _rows_alone(target: torch.device, backend: Backend) -> float:
    words = kernels.quantize_rtn(random((128, 256), torch.float32, target, 1), 64)
    weight = kernels.AwqWeight.from_gemm(*words, layout="planes" if backend == "triton" else "auto")
    x = random((16, 256), torch.bfloat16, target, 2)
    whole = kernels.awq_matmul(x, weight, backend=backend)
    each = [kernels.awq_matmul(x[i : i + 1], weight, backend=backend) for i in range(len(x))]
    return float((whole != torch.cat(each)).sum())
