"""Which frames show at the sample times."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")

# Timestamps are ticks turned into float seconds; a frame that starts within a nanosecond of a sample time has started.
TOLERANCE_S = 1e-9


def sample_times(duration_s: float, fps: float, max_frames: int) -> np.ndarray:
    """Midpoints of n equal intervals over the duration: f64 [n], in seconds.

    n = round(duration_s * fps), clamped to [1, max_frames].
    """
    num = int(min(max(round(duration_s * fps), 1), max_frames))
    return (np.arange(num) + 0.5) * (duration_s / num)


def choose(timed: Iterable[tuple[Item, float]], times_s: np.ndarray) -> Iterator[tuple[Item, float]]:
    """For each sample time the last frame that has started by then (or else the first frame), each frame once.

    `timed`: frames with their starts, ascending. One undecided frame is held at a time.
    """
    held, index = None, 0
    for item in timed:
        started = int(np.searchsorted(times_s, item[1] - TOLERANCE_S))  # times_s[:started] come before this frame
        if held is not None and started > index:
            yield held
        index = max(index, started) if held is not None else index
        held = item
    if held is not None and index < len(times_s):
        yield held


def pick(starts: Sequence[Item], times_s: np.ndarray, start_s: Callable[[Item], float]) -> list[int]:
    """The indices that `choose` would choose, from all starts at once: a binary search per sample time.

    starts: ascending; start_s: seconds of one of them. The last start is chosen only by a time after it, as in `choose`.
    """
    if not len(starts):
        return []

    def key(start: Item) -> float:
        return start_s(start) - TOLERANCE_S

    return list(dict.fromkeys(max(bisect_right(starts, time_s, key=key) - 1, 0) for time_s in times_s.tolist()))
