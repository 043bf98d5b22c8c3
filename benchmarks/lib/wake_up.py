"""How late the system's scheduler wakes somebody who does nothing but sleep: `python -m benchmarks.lib.wake_up SECONDS`.

The last line tells in milliseconds, as JSON, by how much naps of NAP_S were too long: {"p99": ..., "max": ...}. Linux's
`sched_autogroup`, meant for desktops, shares processors between sessions, and on some kernels leaves a whole session waiting for
seconds while the threads of another one wake each other up; `without_autogroup` is a system without it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAP_S = 0.005
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")


def lateness_ms(seconds: float) -> dict[str, float]:
    """What the module's last line tells."""
    late_s, until_s = [], time.monotonic() + seconds
    while (begun_s := time.monotonic()) < until_s:
        time.sleep(NAP_S)
        late_s.append(time.monotonic() - begun_s - NAP_S)
    late_s.sort()
    return {"p99": round(1e3 * late_s[int(0.99 * len(late_s))], 1), "max": round(1e3 * late_s[-1], 1)}


def has_autogroup() -> bool:
    """Whether the system shares processors between sessions."""
    return AUTOGROUP.exists() and AUTOGROUP.read_text().strip() == "1"


@contextmanager
def without_autogroup() -> Iterator[None]:
    """Turn it off for the length of the block, for the whole machine. Raises PermissionError: only root may."""
    if not has_autogroup():
        yield
        return
    AUTOGROUP.write_text("0")
    try:
        yield
    finally:
        AUTOGROUP.write_text("1")


def main(argv: Sequence[str]) -> None:
    print(json.dumps(lateness_ms(float(argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
