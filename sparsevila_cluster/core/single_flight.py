"""Callers who want the same thing at the same time: one makes it, the others wait for that.

Knows: keys, and what becomes of those who wait when the maker gives up. Does not know: what is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, SparseVilaError

R = TypeVar("R")


class SingleFlight(Generic[R]):
    """Used within one event loop."""

    def __init__(self) -> None:
        self._making: dict[str, asyncio.Future[R]] = {}

    async def get(self, key: str, make: Callable[[], Awaitable[R]]) -> tuple[R, bool]:
        """(what `make()` returns, whether another caller made it). Raises what it raises, to all who wait for it.

        A maker that is cancelled or runs out of its own time concerns nobody else: the next caller makes it then.
        """
        while key in self._making:
            try:
                # Shielded: one impatient caller must not cancel the work that the others wait for.
                return await asyncio.shield(self._making[key]), True
            except (Cancelled, DeadlineExceeded):
                continue
        # No await stands between the look above and this entry: two callers can not both become the maker.
        making = self._making[key] = asyncio.get_running_loop().create_future()
        try:
            made = await make()
            making.set_result(made)
            return made, False
        except BaseException as error:
            known = error if isinstance(error, SparseVilaError) else Cancelled("whoever made it was cancelled")
            making.set_exception(known)
            making.exception()  # nobody may be waiting: that is not worth a warning
            raise
        finally:
            del self._making[key]
