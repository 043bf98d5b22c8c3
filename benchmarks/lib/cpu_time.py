"""Processor time by process of a cluster on this machine: what a token costs whom.

Empty where there is no /proc.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

REPLICA = re.compile(r"ray::ServeReplica:[^:]+:(\w+)")
SERVE = "sparsevila_cluster\0serve"


def cpu_s() -> dict[str, float]:
    """Seconds of processor time so far by role: `Router`, `Decode`, ... of every cluster that this process has started, `Ray` for
    the rest of it, `client` for this process.
    """
    mine = os.times()
    spent: dict[str, float] = defaultdict(float, client=mine.user + mine.system)
    stats = [stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(path))]
    own = {session for path, parent, session, _ in stats if parent == os.getpid() and SERVE in _command(path)}
    for path, _, session, busy_s in stats:
        if session in own:
            found = REPLICA.search(_command(path).replace("\0", " "))
            spent[found[1] if found else "Ray"] += busy_s
    return dict(spent)


def cpu_since(before: dict[str, float]) -> dict[str, float]:
    """Seconds by role since `before` was taken."""
    return {role: spent - before.get(role, 0.0) for role, spent in cpu_s().items()}


def cluster_cpu_s() -> float:
    """Of all processes but this one."""
    return sum(spent for role, spent in cpu_s().items() if role != "client")


def _stat(path: Path) -> tuple[Path, int, int, float] | None:
    """Parent, session and processor time of a process; None if it has ended."""
    try:
        fields = (path / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return path, int(fields[1]), int(fields[3]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _command(path: Path) -> str:
    try:
        return (path / "cmdline").read_text()
    except OSError:
        return ""
