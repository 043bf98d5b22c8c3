"""What the measurements run on: its card, its own ceilings, its memory.

Shares of a ceiling are only as good as the ceiling: it is measured in the same run, with the same threads, on the same load.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Ceilings:
    """float32, all threads of the run. read: one pass over memory far larger than any processor cache; copy counts both ways."""

    matmul_gflops: float
    read_gb_s: float
    copy_gb_s: float

    @property
    def bytes_per_s(self) -> float:
        return max(self.read_gb_s, self.copy_gb_s) * 1e9

    def __or__(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, each: a ceiling that was found low was disturbed."""
        return Ceilings(*map(max, astuple(self), astuple(other)))


def measure_ceilings(side: int = 2048, mib: int = 256, repeats: int = 7) -> Ceilings:
    a, b, c = (torch.rand(side, side) for _ in range(3))
    source, target = torch.rand(mib << 18), torch.empty(mib << 18)
    row = torch.rand(1, 4096)
    return Ceilings(
        matmul_gflops=round(2 * side**3 / _best_s(lambda: torch.mm(a, b, out=c), repeats) / 1e9, 1),
        # A row times a matrix: what decoding one token asks of memory.
        read_gb_s=round(source.nbytes / _best_s(lambda: torch.mm(row, source.view(-1, 4096).t()), repeats) / 1e9, 1),
        copy_gb_s=round(2 * source.nbytes / _best_s(lambda: target.copy_(source), repeats) / 1e9, 1),
    )


def _best_s(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


class Neighbours:
    """How many cores other processes have kept busy, on average, since this was made. None where the system does not say."""

    def __init__(self) -> None:
        self._start = self._look()

    def cores(self) -> float | None:
        before, after = self._start, self._look()
        if before is None or after is None:
            return None
        busy_s, own_s, at_s = (now - then for now, then in zip(after, before, strict=True))
        return round(max(0.0, busy_s - own_s) / at_s, 2)

    @staticmethod
    def _look() -> tuple[float, float, float] | None:
        path = Path("/proc/stat")
        if not path.exists():
            return None
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, path.read_text().split(maxsplit=9)[1:9])
        busy_s = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy_s, time.process_time(), time.perf_counter()


def card(ceilings: Ceilings | None = None) -> dict[str, Any]:
    """The machine and the software as plain data."""
    return {
        "cpu": cpu_name(),
        "cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(_meminfo("MemTotal") / 2**30, 1),
        **(asdict(ceilings) if ceilings else {}),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "version": _version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return re.sub(r"\((R|TM)\)|\bCPU\b|@.*", "", found[1]).strip()
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """Cores that this process may use, without their second hardware threads."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text().strip() if path.exists() else str(cpu))
    return len(siblings)


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, or since `reset_peak_rss`."""
    unit = 1 if sys.platform == "darwin" else 1024
    # ru_maxrss remembers what the process was forked from.
    return _high_water(Path("/proc/self")) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_rss_of_children_bytes(process: Path = Path("/proc/self")) -> int:
    """The peaks of processes that this one has started and that still run, added up; 0 where the system does not tell."""
    try:
        children = {pid for path in process.glob("task/*/children") for pid in path.read_text().split()}
    except OSError:  # it ended meanwhile
        return 0
    below = [Path("/proc") / pid for pid in children]
    return sum(_high_water(child) + peak_rss_of_children_bytes(child) for child in below)


def _high_water(process: Path) -> int:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (process / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def reset_peak_rss() -> bool:
    """Let the next `peak_rss_bytes` begin here. False where the system does not offer that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def free_bytes() -> int:
    """Memory that may be taken without hurting others."""
    gc.collect()
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int:
    path = Path("/proc/meminfo")
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version() -> str:
    """The commit, with a + when the tree differs from it; "" outside a checkout."""
    here = Path(__file__).parent
    call = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(call, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
