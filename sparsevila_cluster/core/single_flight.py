"""Callers who want the same result at the same time: one computes it, the others wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, SparseVilaError

R = TypeVar("R")


class SingleFlight(Generic[R]):
    """Used within one event loop."""

    def __init__(self) -> None:
        self._in_flight: dict[str, asyncio.Future[R]] = {}

    async def get(self, key: str, make: Callable[[], Awaitable[R]]) -> tuple[R, bool]:
        """(what `make()` returns, whether another caller called it). Raises what it raises, to all who wait for it.

        A call that is cancelled, or exceeds its own deadline, does not fail the others: the next of them calls `make`.
        """
        while key in self._in_flight:
            try:
                # Shielded: one caller that is cancelled must not cancel the work that the others wait for.
                return await asyncio.shield(self._in_flight[key]), True
            except (Cancelled, DeadlineExceeded):
                continue
        # No await stands between the look above and this entry: two callers can not both call `make`.
        future = self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            result = await make()
            future.set_result(result)
            return result, False
        except BaseException as error:
            known = error if isinstance(error, SparseVilaError) else Cancelled("the call that others waited for was cancelled")
            future.set_exception(known)
            future.exception()  # nobody may be waiting: that is not worth a warning
            raise
        finally:
            del self._in_flight[key]
