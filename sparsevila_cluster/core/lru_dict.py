"""Mappings of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
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


class SharedLRUDict(Generic[V]):
    """Forgets, beyond `most` entries, what was least recently put or used: of an owner who has more than `max_share` of `most`, if
    there is one, else of all. So nobody loses an entry to somebody who has more than a share, and who is alone may have all.
    """

    def __init__(self, most: int, max_share: float):
        self.most = most
        self._share = max(1, int(most * max_share))
        self._entries: OrderedDict[str, tuple[str, V]] = OrderedDict()
        self._keys: dict[str, OrderedDict[str, None]] = {}  # of each owner, in the same order
        self._over: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        """Least recently put or used first."""
        return iter(self._entries)

    def num_of(self, owner: str) -> int:
        """Entries of one owner."""
        return len(self._keys.get(owner, ()))

    def put(self, key: str, value: V, owner: str) -> None:
        """Add or replace an entry, which counts as used now; may drop another one."""
        self.pop(key)
        self._entries[key] = owner, value
        self._keys.setdefault(owner, OrderedDict())[key] = None
        self._note_size(owner)
        while len(self._entries) > self.most:
            over = owner if owner in self._over else max(self._over, key=self.num_of, default=None)
            self.pop(next(iter(self._entries if over is None else self._keys[over])))

    def use(self, key: str) -> V | None:
        """The value, which counts as used now; None if there is none."""
        if key not in self._entries:
            return None
        owner, value = self._entries[key]
        self._entries.move_to_end(key)
        self._keys[owner].move_to_end(key)
        return value

    def get(self, key: str) -> V | None:
        """The value, which does not count as used; None if there is none."""
        return self._entries[key][1] if key in self._entries else None

    def pop(self, key: str) -> V | None:
        """Take an entry out; its value, None if there is none."""
        if key not in self._entries:
            return None
        owner, value = self._entries.pop(key)
        del self._keys[owner][key]
        if not self._keys[owner]:
            del self._keys[owner]
        self._note_size(owner)
        return value

    def _note_size(self, owner: str) -> None:
        (self._over.add if self.num_of(owner) > self._share else self._over.discard)(owner)
