"""The training log: JSON lines for the record, a progress bar for the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class TrainingLog:
    """Writes to `path`, and shows a bar on `console` (None: stderr) while its block runs."""

    def __init__(self, path: Path, console: Console | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a")
        self.start_s = time.monotonic()
        self.progress = Progress(
            TextColumn("[bold]{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self.task: TaskID | None = None

    def __enter__(self) -> TrainingLog:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        self.file.close()

    def stage(self, name: str) -> None:
        """Begin a stage: a new bar, and a line in the log."""
        if self.task is not None:
            self.progress.update(self.task, completed=1.0)
        self.task = self.progress.add_task(name, total=1.0, note="")
        self.write(stage=name, event="start")

    def advance(self, share: float, note: str) -> None:
        """Move the bar of the stage to `share`, 0 to 1."""
        if self.task is not None:
            self.progress.update(self.task, completed=min(share, 1.0), note=note)

    def write(self, **record: object) -> None:
        """One line of the log, with the seconds since its start."""
        record = {"wall_s": round(time.monotonic() - self.start_s, 1)} | record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
