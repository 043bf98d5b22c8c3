"""Progress of long work as one line on stderr."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class ProgressLine(AbstractContextManager["ProgressLine"]):
    """A line on stderr that says what is going on, when stderr is a terminal, or `always` (as in a notebook)."""

    def __init__(self, always: bool = False) -> None:
        self._always = always
        self._over = False
        self._line: Progress | None = None

    def stage(self, name: str, done: int, total: int) -> None:
        """Show how far a stage is. Its end clears the line, so that results can follow."""
        if done >= total:
            self.clear()
        elif not self._over and (self._always or sys.stderr.isatty()):
            self._show(name, done, total)

    def _show(self, name: str, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        if self._line is None:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn()
            self._line = Progress(
                *columns,
                console=Console(stderr=True, force_terminal=self._always or None),
                transient=True,
                refresh_per_second=5,
                redirect_stdout=False,  # what is printed on stdout in the meantime belongs there
                redirect_stderr=False,
            )
            self._line.add_task(name)
            self._line.start()
        # A stage in one step has no measure: the bar only moves.
        text = f"{name} {done}/{total}" if total > 1 else name
        self._line.update(self._line.task_ids[0], description=text, completed=done, total=total if total > 1 else None)

    def clear(self) -> None:
        """Remove the line; the next report shows it again."""
        if self._line is not None:
            self._line.stop()
            self._line = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over = True  # work that was interrupted may report once more
        self.clear()
