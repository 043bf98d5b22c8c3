"""Looking at processes, stopping them, and waiting for them, with a deadline."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def wait_for(condition, timeout_s: float = 20.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    return _state(Path(f"/proc/{pid}")) not in ("Z", "")


def stop(pid: int) -> None:
    """SIGSTOP, and wait until every thread has stopped: on a busy machine they go on for a while after the call."""
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: is_stopped(pid))


def is_stopped(pid: int) -> bool:
    """Every thread of it."""
    return all(_state(thread) in ("T", "") for thread in Path(f"/proc/{pid}/task").iterdir())


def _state(process: Path) -> str:
    """Of a process or of a thread; empty when it is gone."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
