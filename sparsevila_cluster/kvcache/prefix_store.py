"""Resident media prefixes in one arena, shared by reference count, evicted least recently used first, by owner."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise

from sparsevila_cluster.core.errors import QueueFull, TooLarge
from sparsevila_cluster.core.fair_sharing import owner_bound
from sparsevila_cluster.kvcache.arena import Arena, Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix


class PrefixStore:
    """Resident media prefixes in one arena: reserved, then published, then shared; evicted least recently used first.

    Only a prefix that nobody holds may be evicted. One owner's prefixes take at most `max_share` of the arena, for which it evicts
    its own; beyond that, who has most makes way first, so that nobody who has less than an equal share loses any of it while
    another has idle ones. Owner "" has no share: what it needs, the least recently used of all make way for.

    Not thread-safe: the decode engine's thread owns it.
    """

    def __init__(self, arena: Arena, max_share: float = 1.0):
        self.arena = arena
        self.max_share = max_share
        self._prefixes: OrderedDict[str, MediaPrefix] = OrderedDict()
        self._holders: dict[str, int] = {}
        self._reserved: dict[Extent, str] = {}  # -> owner
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

    def reserve(self, length: int, owner: str = "") -> Extent:
        """Slots for a prefix that is about to be made, evicting idle prefixes as needed.

        Raises:
            TooLarge: longer than the whole budget, or its owner's share. QueueFull: everything that could make way is in use.
        """
        most = owner_bound(owner, self.arena.num_slots, self.max_share)
        if length > most:
            size = self.arena.spec.bytes_per_token
            whose = f"the share of {owner!r} in prefix_bytes" if length <= self.arena.num_slots else "prefix_bytes"
            raise TooLarge(f"media prefix of {length} tokens needs {length * size} bytes of KV; {whose} allows {most * size}")
        while owner and self.slots_of(owner) + length > most:
            self._evict([prefix for prefix in self._idle() if prefix.metadata.owner == owner], length, f"those of {owner!r}")
        extent = self.arena.alloc(length)
        while extent is None:
            idle = self._idle()
            if owner and idle:
                need = {prefix.metadata.owner: self.slots_of(prefix.metadata.owner) for prefix in idle}
                if owner in need:
                    need[owner] += length
                idle = [prefix for prefix in idle if prefix.metadata.owner == max(need, key=need.__getitem__)]
            self._evict(idle, length, "all resident prefixes")
            extent = self.arena.alloc(length)
        self._reserved[extent] = owner
        return extent

    def slots_of(self, owner: str) -> int:
        """Slots of an owner's prefixes and reservations."""
        resident = sum(prefix.length for prefix in self._prefixes.values() if prefix.metadata.owner == owner)
        return resident + sum(extent.length for extent, name in self._reserved.items() if name == owner)

    def _idle(self) -> list[MediaPrefix]:
        """What may be evicted, least recently used first."""
        return [prefix for prefix in self._prefixes.values() if not self._holders.get(prefix.key)]

    def _evict(self, idle: list[MediaPrefix], length: int, whose: str) -> None:
        if not idle:
            raise QueueFull(f"no room for a media prefix of {length} tokens: {whose} are in use")
        self.remove(idle[0].key)
        self.num_evicted += 1

    def most_room(self) -> int:
        """Slots of the longest prefix that `reserve` could take now, evicting all that nobody holds."""
        stay = [p.extent for p in self._prefixes.values() if self._holders.get(p.key)] + list(self._reserved)
        edges = sorted([(0, 0), *((e.start, e.stop) for e in stay), (self.arena.num_slots, self.arena.num_slots)])
        return max(start - stop for (_, stop), (start, _) in pairwise(edges))

    def cancel(self, extent: Extent) -> None:
        """Give back a reservation that will not be published. Harmless when repeated."""
        if extent in self._reserved:
            del self._reserved[extent]
            self.arena.free(extent)

    def publish(self, prefix: MediaPrefix) -> MediaPrefix:
        """Make a finished prefix visible. If its key is resident already, the new copy is dropped and the old one returned."""
        assert prefix.extent in self._reserved
        resident = self.get(prefix.key)
        if resident is not None:
            self.cancel(prefix.extent)
            return resident
        del self._reserved[prefix.extent]
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
