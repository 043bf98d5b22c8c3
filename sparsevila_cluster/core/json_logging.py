"""Logs as JSON, one object per line on stderr, with the ids that belong to a line as fields of their own."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

ROOT = "sparsevila_cluster"
# What every record has: the rest came as `extra`.
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """{"time": "2026-01-31T12:00:00.123Z", "level": "info", "logger": ..., "message": ..., "worker": ..., ..., "error": ...}"""

    def __init__(self, worker: str = ""):
        super().__init__()
        self._worker = worker

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix(f"{ROOT}."),
            "message": record.getMessage(),
        }
        if self._worker:
            line["worker"] = self._worker
        line.update({name: value for name, value in vars(record).items() if name not in PLAIN})
        if record.exc_info:
            line["error"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(verbose: bool, worker: str = "") -> None:
    """Our loggers write to stderr from now on: warnings and errors, with `verbose` everything from info. Again replaces itself."""
    ours = logging.getLogger(ROOT)
    for handler in [h for h in ours.handlers if isinstance(h.formatter, JsonLines)]:
        ours.removeHandler(handler)
    handler = logging.StreamHandler(sys.__stderr__)  # Serve may have put its own in the place of sys.stderr
    handler.setFormatter(JsonLines(worker))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if verbose else logging.WARNING)
    ours.propagate = False
