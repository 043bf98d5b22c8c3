"""Whether the kernels are right on this machine, without pytest. `python -m benchmarks.gpu_checks`.

Knows: what is compared with what, and how far apart it may be. Does not know: how a kernel or an engine computes.

    kernels    every case of `benchmarks.ops` at small odd shapes: Triton and torch against the float64 reference; the same bits
               twice; rows that do not depend on their neighbours; nothing read beyond what is named (NaN lies there)
    engine     tokens of a small random model: with CUDA graphs, without, with the attention of torch; logits in 4 bits

On a CPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1), and what needs a GPU is skipped. Ends with status 1 if a
check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import sparsevila_kernels as kernels
from benchmarks import device
from benchmarks.checking import Check, Skipped, judge, unbroken
from benchmarks.ops import attention, matmul, moves
from benchmarks.ops.case import TOY, Case, Sizes, error_of, random, tensors
from benchmarks.report import Report
from sparsevila_kernels import reference
from sparsevila_kernels._launch import INTERPRETED, Backend

# |result - reference| / |reference| at most, by dtype. A rounding to bfloat16 alone is 1.7e-3, to float16 2e-4.
LIMITS = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
HEAD = ("check", "state", "value", "limit", "s")


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


def kernel_checks(target: torch.device, toy: bool) -> Iterator[Check]:
    """Every operation against its reference, then what no case asks of it."""
    backend: Backend = "triton" if target.type == "cuda" or INTERPRETED else "torch"
    seen = set()
    for sizes in sizes_to_check(toy):
        for module in (attention, matmul, moves):
            for case in module.cases(sizes):
                name = f"{case.op}, {case.dtype}, {case.shape}, {sizes.num_heads}/{sizes.num_kv_heads} heads of {sizes.head_dim}"
                if name not in seen:
                    seen.add(name)
                    yield from unbroken(name, _case_checks(case, name, target, backend, twice=not toy))
    for dtype in ("float32",) if toy else tuple(LIMITS):
        checks = _attention_checks(target, device.DTYPES[dtype], backend, LIMITS[dtype], 3 if toy else 5)
        yield from unbroken(f"attention, {dtype}", checks)
    yield Check("awq_matmul: a row is the same in a batch of 16", lambda: _rows_alone(target, backend))


def _case_checks(case: Case, name: str, target: torch.device, backend: Backend, twice: bool) -> Iterator[Check]:
    """Built when the first check runs; freed with the last."""
    limit = LIMITS["float32"] if case.op == "colreduce" else 1e-3 if case.op == "kv_quantize" else LIMITS[case.dtype]
    backends = tuple(dict.fromkeys((backend, "torch")))
    entries = {entry.name: entry.run for entry in case.build(target, backends).entries}
    wanted = [part.clone() for part in tensors(entries.pop("reference")())] if "reference" in entries else None
    for way, run in entries.items():
        label = backend if way == "op" else way
        if wanted is not None:
            yield Check(f"{name}: {label}", partial(_error, run, wanted), limit)
        if way == "op" and twice:
            yield Check(f"{name}: {label}, the same bits twice", partial(_repeats, run))


def _error(run: Callable[[], object], wanted: list[torch.Tensor]) -> float:
    return error_of(list(tensors(run())), wanted)


def _repeats(run: Callable[[], object]) -> float:
    """How many numbers differ between two runs."""
    first = [part.clone() for part in tensors(run())]
    return float(sum(int((a != b).sum()) for a, b in zip(first, tensors(run()), strict=True)))


def _attention_checks(target: torch.device, dtype: torch.dtype, backend: Backend, limit: float, num: int) -> Iterator[Check]:
    """Unequal lengths of `num` sequences, several causal rows, log-sum-exps, and arenas of which all else is NaN."""
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
    label = f"decode_attention, {device.name_of(dtype)}, unequal lengths among NaN"

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
            f"colreduce, {device.name_of(dtype)}, causal {reduction}",
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


def engine_checks(target: torch.device) -> Iterator[Check]:
    """Imported late: without pydantic and the like there is no engine, but there are kernels."""
    try:
        from benchmarks.engine_checks import checks
    except ImportError as error:
        why = str(error)

        def cannot() -> float:
            raise Skipped(why)

        yield Check("engine", cannot)
        return
    yield from unbroken("engine", checks(target))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="few and tiny shapes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--stop-after", type=float, default=1e9, metavar="S", help="begin no further check after so many seconds")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="also append every row to FILE as soon as it is known")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    begun_s = time.perf_counter()
    options = parse(argv)
    target = device.choose(options.device)
    report = Report("gpu_checks", device.card(target, {}), quiet=options.json)
    report.show_card()
    # The engine first: its few checks cover what the figures are about.
    for source in (engine_checks(target), kernel_checks(target, options.toy)):
        for check in source:
            row = judge(check)
            report.rows.append(row)
            if options.rows is not None:
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            if time.perf_counter() - begun_s > options.stop_after:
                report.say("out of time")
                break
    count = {state: sum(row["state"] == state for row in report.rows) for state in ("passed", "failed", "skipped")}
    failed = [row for row in report.rows if row["state"] == "failed"]
    if failed:
        report.show_table("Checks that failed", HEAD, [[row.get(name) for name in HEAD] for row in failed])
    for row in failed:
        report.say(f"{row['check']}: {row.get('why', row.get('value'))} {row.get('where', '')}")
    report.figures = {f"checks_{state}": num for state, num in count.items()}
    report.show_figures()
    report.finish(options.save)
    return 1 if count["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
