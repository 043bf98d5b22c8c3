"""Resident media prefixes in one arena, shared by reference count, evicted least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise

from sparsevila_cluster.core.errors import QueueFull, TooLarge
from sparsevila_cluster.kvcache.arena import Arena, Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix


class PrefixStore:
    """Resident media prefixes in one arena: reserved, then published, then shared; evicted least recently used first.

    Only a prefix that nobody holds may be evicted. Not thread-safe: the decode engine's thread owns it.
    """

    def __init__(self, arena: Arena):
        self.arena = arena
        self._prefixes: OrderedDict[str, MediaPrefix] = OrderedDict()
        self._holders: dict[str, int] = {}
        self._reserved: set[Extent] = set()
        self.num_evicted = 0

    def __contains__(self, key: str) -> bool:
        return key in self._prefixes

    def __iter__(self) -> Iterator[MediaPrefix]:
        return iter(self._prefixes.values())

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, key: str) -> MediaPrefix | None:
        """The prefix, marked as just used; None if it is not resident."""
        prefix = self._prefixes.get(key)
        if prefix is not None:
            self._prefixes.move_to_end(key)
        return prefix

    def reserve(self, length: int) -> Extent:
        """Slots for a prefix that is about to be made, evicting idle prefixes as needed.

        Raises:
            TooLarge: longer than the whole budget. QueueFull: everything else is held by running turns.
        """
        if length > self.arena.num_slots:
            size = self.arena.spec.bytes_per_token
            raise TooLarge(
                f"media prefix of {length} tokens needs {length * size} bytes of KV; "
                f"prefix_bytes allows {self.arena.num_slots * size}"
            )
        extent = self.arena.alloc(length)
        while extent is None:
            victim = next((p for p in self._prefixes.values() if not self._holders.get(p.key)), None)
            if victim is None:
                raise QueueFull(f"no room for a media prefix of {length} tokens: all resident prefixes are in use")
            self.remove(victim.key)
            self.num_evicted += 1
            extent = self.arena.alloc(length)
        self._reserved.add(extent)
        return extent

    def most_room(self) -> int:
        """Slots of the longest prefix that `reserve` could take now, evicting all that nobody holds."""
        stay = [p.extent for p in self._prefixes.values() if self._holders.get(p.key)] + list(self._reserved)
        edges = sorted([(0, 0), *((e.start, e.stop) for e in stay), (self.arena.num_slots, self.arena.num_slots)])
        return max(start - stop for (_, stop), (start, _) in pairwise(edges))

    def cancel(self, extent: Extent) -> None:
        """Give back a reservation that will not be published. Harmless when repeated."""
        if extent in self._reserved:
            self._reserved.discard(extent)
            self.arena.free(extent)

    def publish(self, prefix: MediaPrefix) -> MediaPrefix:
        """Make a finished prefix visible. If its key is resident already, the new copy is dropped and the old one returned."""
        assert prefix.extent in self._reserved
        resident = self.get(prefix.key)
        if resident is not None:
            self.cancel(prefix.extent)
            return resident
        self._reserved.discard(prefix.extent)
        self._prefixes[prefix.key] = prefix
        return prefix

    def hold(self, key: str) -> MediaPrefix:
        """Take a reference: the prefix stays resident until `release`."""
        prefix = self.get(key)
        assert prefix is not None, key
        self._holders[key] = self._holders.get(key, 0) + 1
        return prefix

    def release(self, key: str) -> None:
        """Give a reference back."""
        count = self._holders[key] - 1
        assert count >= 0, key
        if count:
            self._holders[key] = count
        else:
            del self._holders[key]

    def holders(self, key: str) -> int:
        """References that were not given back."""
        return self._holders.get(key, 0)

    def remove(self, key: str) -> bool:
        """Drop a prefix that nobody holds. False if it is unknown or held."""
        prefix = self._prefixes.get(key)
        if prefix is None or self._holders.get(key):
            return False
        del self._prefixes[key]
        self.arena.free(prefix.extent)
        return True

    def check_integrity(self) -> None:
        """Assert that every used slot of the arena belongs to exactly one prefix or reservation."""
        self.arena.check_integrity()
        extents = [p.extent for p in self._prefixes.values()] + list(self._reserved)
        assert len({id(e) for e in extents}) == len(extents)
        assert sum(e.length for e in extents) == self.arena.num_slots - self.arena.free_slots, "arena slots without an owner"
        assert all(key in self._prefixes for key in self._holders), "a reference to a prefix that is not resident"
