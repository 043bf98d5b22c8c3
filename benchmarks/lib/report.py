"""What a benchmark says: a card, tables, and one JSON document as the last line; progress goes to stderr.

{"what": "engine", "machine": {...}, "figures": {"<name>": <number>, ...}, "rows": [{...}, ...]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Report:
    """Text is printed as it comes, unless `quiet`; the document ends it."""

    what: str
    machine: dict[str, Any]
    quiet: bool = False
    figures: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)

    def say(self, text: str = "") -> None:
        self._text.append(text)
        if not self.quiet:
            print(text, flush=True)

    def attach(self, text: str) -> None:
        """Into the file only."""
        self._text.append(text)

    def show_card(self) -> None:
        width = max(map(len, self.machine))
        self.say("\n".join(f"{name:<{width}}  {value}" for name, value in self.machine.items()))

    def show_table(self, title: str, head: Sequence[str], body: Sequence[Sequence[Any]]) -> None:
        self.say(f"\n{title}\n")
        self.say(table(head, body))

    def show_figures(self) -> None:
        self.show_table("Figures", ("name", "value"), list(self.figures.items()))

    def document(self) -> dict[str, Any]:
        return {"what": self.what, "machine": self.machine, "figures": self.figures, "rows": self.rows}

    def finish(self, folder: Path | None = None) -> None:
        """Print the document, and keep everything in `folder` if there is one."""
        line = json.dumps(self.document(), allow_nan=False)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            stem = f"{self.what}_{slug(self.machine)}_{self.machine['date']}"
            (folder / f"{stem}.json").write_text(json.dumps(self.document(), indent=1, allow_nan=False) + "\n")
            (folder / f"{stem}.md").write_text(f"# {self.what}\n\n" + as_markdown(self._text))
        print(line, flush=True)


def table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A Markdown table whose columns are also aligned for people; numbers to the right."""
    rows = [[show(cell) for cell in row] for row in body]
    widths = [max(len(row[i]) for row in [list(head), *rows]) for i in range(len(head))]
    right = [all(isinstance(row[i], int | float | None) for row in body) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        aligned = (f"{c:>{w}}" if r else f"{c:<{w}}" for c, w, r in zip(cells, widths, right, strict=True))
        return f"| {' | '.join(aligned)} |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def show(cell: Any) -> str:
    """A cell as text: three significant digits, nothing for None."""
    if cell is None:
        return ""
    if isinstance(cell, bool) or not isinstance(cell, float):
        return str(cell)
    if cell == 0 or abs(cell) >= 100:
        return f"{cell:.0f}"
    return f"{cell:.1f}" if abs(cell) >= 10 else f"{cell:.2f}" if abs(cell) >= 1 else f"{cell:.3f}"


def as_markdown(parts: Sequence[str]) -> str:
    """Printed text as Markdown: what is no table and no heading stands in a code block."""
    text = []
    for part in parts:
        stripped = part.strip("\n")
        single = "\n" not in stripped
        text.append(stripped if stripped.startswith("|") or single else f"```\n{stripped}\n```")
    return "\n\n".join(t for t in text if t) + "\n"


def slug(machine: Mapping[str, Any]) -> str:
    """The hardware as part of a file name."""
    name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu") or machine["cpu"]).lower()).strip("-")
    return name if "gpu" in machine else f"{name}-{machine['threads']}-threads"


@contextmanager
def progress(enabled: bool = True) -> Iterator[Any]:
    """A spinner on stderr whose text the body sets with `say(text)`. Silent where stderr is no terminal, or rich is not there."""
    try:
        from rich.console import Console
    except ImportError:
        enabled = False
    if not enabled:
        yield lambda text: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield status.update
