"""What a person sees while long work goes on: one line on stderr, and an end to the work on Ctrl-C.

Knows: terminals and the (stage, done, total) reports of a preparation. Does not know: what the stages do.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sparsevila_cluster.errors import Cancelled


class ProgressLine(AbstractContextManager):
    """A line on stderr that says what is going on, when stderr is a terminal."""

    def __init__(self) -> None:
        self._line: Any = None

    def stage(self, name: str, done: int, total: int) -> None:
        """Show how far a stage is. Its end clears the line, so that results can follow."""
        if done >= total:
            self.clear()
        elif sys.stderr.isatty():
            self._show(name, done, total)

    def _show(self, name: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._line is None:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn()
            # Not redirected: what is printed on stdout in the meantime belongs there.
            options = {"transient": True, "refresh_per_second": 5, "redirect_stdout": False, "redirect_stderr": False}
            self._line = Progress(*columns, console=Console(stderr=True), **options)
            self._line.add_task(name)
            self._line.start()
        # A stage in one step has no measure: the bar only moves.
        self._line.update(self._line.task_ids[0], description=name, completed=done, total=total if total > 1 else None)

    def clear(self) -> None:
        if self._line is not None:
            self._line.stop()
            self._line = None

    def __exit__(self, *exc_info: object) -> None:
        self.clear()


def interruptible(work: Callable[[Callable[[str, int, int], None]], Any], line: ProgressLine) -> Any:
    """`work(report)`; after Ctrl-C the next report ends it, so that no thread goes on preparing for nobody."""
    interrupted = threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        if interrupted.is_set():
            raise Cancelled("interrupted")
        line.stage(stage, done, total)

    try:
        return work(report)
    except KeyboardInterrupt:
        interrupted.set()
        raise
