"""A mapping of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class LRUDict(OrderedDict[str, V], Generic[V]):
    """Forgets, beyond `most` entries, what was least recently put or used."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def put(self, key: str, value: V) -> None:
        """Add or replace an entry, which counts as used now; may drop another one."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)

    def use(self, key: str) -> V | None:
        """The value, which counts as used now; None if there is none."""
        if key not in self:
            return None
        self.move_to_end(key)
        return self[key]
