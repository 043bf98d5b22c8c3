"""A check outside pytest: something that is measured and must not exceed a limit."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Skipped(Exception):
    """This machine cannot show it."""


@dataclass(frozen=True)
class Check:
    """`run()` -> how far off something is, which must not exceed `limit`."""

    name: str
    run: Callable[[], float]
    limit: float = 0.0


def judge(check: Check) -> Row:
    """The row of one check. A crash is a failure, and says where."""
    begun_s = time.perf_counter()
    row: Row = {"check": check.name, "limit": check.limit}
    try:
        value = check.run()
        row |= {"state": "passed" if value <= check.limit else "failed", "value": value if value == value else "NaN"}
    except Skipped as why:
        row |= {"state": "skipped", "why": str(why)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        row |= {"state": "failed", "why": f"{type(error).__name__}: {error}"[:400]}
        row["where"] = f"{Path(last.filename).name}:{last.lineno}"
    return row | {"s": round(time.perf_counter() - begun_s, 3)}


def unbroken(name: str, source: Iterator[Check]) -> Iterator[Check]:
    """The checks of `source`; should making them break off, that is one more check, which fails."""
    try:
        yield from source
    except Exception as error:
        broken = error

        def fail() -> float:
            raise broken

        yield Check(f"{name}: making the checks", fail)
