"""What a server says of itself, as tables: one for each pool, and one for each other list; what is not a table is a line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsevila_cluster.core.summary import megabytes

if TYPE_CHECKING:
    from rich.console import Console

# Characters in a line where stdout is no terminal.
WIDTH_IN_FILES = 200
MAX_TEXT_CHARS = 64
MAX_ROWS = 100


def show_info(target: str, info: dict[str, Any]) -> None:
    """Print what `Client.info` returned."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES, highlight=False)
    facts = {name: value for name, value in info.items() if name != "details" and value not in ("", None)}
    line = ", ".join(f"{_plain(name)} {cell(name, value)}" for name, value in facts.items())
    console.print(f"{target}: {line}", markup=False)
    details = info.get("details")
    found = list(details.items()) if isinstance(details, dict) else [("details", details)]
    for name, value in sorted(found, key=lambda item: isinstance(item[1], dict | list)):  # single facts before what takes room
        if name == "pools" and isinstance(value, dict):
            for pool, workers in value.items():
                _show(console, f"{pool} workers", workers)
        else:
            _show(console, name, value)


def _show(console: Console, name: str, value: object) -> None:
    from rich.table import Table
    from rich.text import Text

    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        if value is not None:
            console.print(f"{_plain(name)}: {cell(name, value)}", markup=False)
        return
    rows = [dict(_flat(row)) for row in value[:MAX_ROWS]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    title = f"{_plain(name)} ({len(value)})" if len(value) != 1 or rows[0] else _plain(name)
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column, 0), int | float) for row in rows)
        table.add_column(_plain(column.rpartition(".")[2]), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(column, row[column])) if column in row else "" for column in columns))
    console.print(table if columns else f"{title}: none", markup=False)


def _flat(row: dict[str, Any], lead: str = "") -> Iterator[tuple[str, Any]]:
    """Every fact of a row, those of inner mappings as `outer.inner`."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{lead}{name}.")
        else:
            yield f"{lead}{name}", value


def cell(name: str, value: object) -> str:
    """A fact in few characters; bytes as megabytes."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("bytes"):
        return megabytes(value) if value else "0"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return f"{len(value)}" if any(isinstance(one, dict | list) for one in value) else ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:12]}..."


def _plain(name: str) -> str:
    return name.replace("_", " ").removesuffix(" bytes").strip() or name
