"""The device that operations are timed on: its clock, its ceilings, its name.

A GPU replays each operation from a CUDA graph where the operation can be captured, as the decode engine does: what Python takes to
launch it is no part of its time. What cannot be captured (it waits for the device, or allocates in its own ways) is launched.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import machine
from benchmarks.lib.machine import Ceilings
from benchmarks.lib.stopwatch import Repeats, Times, once_ms

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_WARM_UPS = 3
_GPU_FLUSH_BYTES = 256 << 20


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Clock:
    """One device, and how times are taken on it."""

    def __init__(self, device: torch.device, repeats: Repeats):
        self.device, self.repeats = device, repeats
        self.on_gpu = device.type == "cuda"
        num_bytes = _GPU_FLUSH_BYTES if self.on_gpu else 3 * last_level_bytes()
        self._junk = torch.ones(num_bytes // 4, device=device)

    def prepare(self, work: Callable[[], object]) -> tuple[Callable[[], object], bool]:
        """`work`, warmed up and ready to be timed; and whether a CUDA graph replays it."""
        if not self.on_gpu:
            work()
            return work, False
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError as error:
            log.info("launched, not replayed: %s", str(error).splitlines()[0])
            torch.cuda.set_stream(stream)  # a capture that breaks off may leave its own behind
            torch.cuda.synchronize()
            return work, False
        graph.replay()
        return graph.replay, True

    def once_ms(self, work: Callable[[], object]) -> float:
        """One run, its operands not in a processor cache."""
        self._junk.sum()
        if not self.on_gpu:
            return once_ms(work)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def in_turns(self, works: Mapping[str, Callable[[], object]]) -> dict[str, Times]:
        """Time each of `works` once per round, all of them prepared."""
        times = {name: Times() for name in works}
        for _ in self.repeats.rounds():
            for name, work in works.items():
                times[name].add(self.once_ms(work))
        return times


def ceilings(device: torch.device, dtypes: tuple[str, ...], size: float = 1.0) -> dict[str, Ceilings]:
    """By dtype: the best matrix product of it, and the best rates of reading and copying, which are the same in all. `size` scales
    the work down, for tests.
    """
    on_gpu = device.type == "cuda"
    clock = Clock(device, Repeats(least=3, most=20 if on_gpu else 5, budget_s=1.0))
    side = _rounded((8192 if on_gpu else 2048) * size)
    num = _rounded((1 << 30 if on_gpu else 64 << 20) * size)
    source, target = torch.rand(num, device=device), torch.empty(num, device=device)
    read_gb_s = source.nbytes / _best_ms(clock, source.sum) / 1e6
    if not on_gpu:
        # A row times a matrix reads faster than a sum, and is what decoding one token asks of memory.
        row, matrix = torch.rand(1, 64), source.view(-1, 64).t()
        if num % 4096 == 0:
            row, matrix = torch.rand(1, 4096), source.view(-1, 4096).t()
        read_gb_s = max(read_gb_s, source.nbytes / _best_ms(clock, lambda: torch.mm(row, matrix)) / 1e6)
    copy_gb_s = 2 * source.nbytes / _best_ms(clock, lambda: target.copy_(source)) / 1e6
    found = {}
    for dtype in dtypes:
        rate = 2 * side**3 / _best_ms(clock, _product(side, DTYPES[dtype], device)) / 1e6
        found[dtype] = Ceilings(round(rate, 2), round(read_gb_s, 2), round(copy_gb_s, 2))
    return found


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Random numbers: a GPU multiplies zeros faster."""
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (side, side), dtype=dtype, device=device) for _ in range(2))
        return lambda: torch._int_mm(a, b.t())
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _best_ms(clock: Clock, work: Callable[[], object]) -> float:
    prepared, _ = clock.prepare(work)
    return clock.in_turns({"it": prepared})["it"].best_ms


def _rounded(number: float) -> int:
    """To a multiple of 64, that every matrix unit takes, and not so little that a clock cannot see it."""
    return max(256, int(number) // 64 * 64)


def card(device: torch.device, found: Mapping[str, Ceilings]) -> dict[str, Any]:
    """The machine, its device and its ceilings as plain data."""
    told = machine.card()
    if device.type == "cuda":
        told["gpu"] = torch.cuda.get_device_name(device)
        told["gpu_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
    else:
        told["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    told["triton"] = _triton_version()
    for dtype, ceiling in found.items():
        told |= {f"matmul_gflops_{dtype}": ceiling.matmul_gflops, "read_gb_s": ceiling.read_gb_s, "copy_gb_s": ceiling.copy_gb_s}
    return told


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def last_level_bytes() -> int:
    """Of the largest cache of processor 0; 32 MiB where the system does not say. More than 128 MiB belong to neighbours too."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return min(max(sizes, default=32 << 20), 128 << 20)


def choose(wanted: str) -> torch.device:
    """A GPU if there is one for "auto", else what the name says."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else torch.device(wanted)
