"""KV of kept tokens: preallocated arenas, extents in them, and media prefixes shared by reference count.

Knows: slots, bytes and who holds what. Does not know: models, policies, turns or the wire.

An arena holds one k and one v tensor, [L, slots, Hkv, D]. An extent is the half-open slot interval
[start, start + length), the same in all layers:

    slots  0 ......... start ............. start+length ......... slots
           | free/used |  one extent        | free/used ...        |
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sparsevila_cluster.errors import QueueFull, TooLarge

LAYOUT_VERSION = 1


@dataclass(frozen=True)
class KVSpec:
    """What two workers must agree on before KV of one means anything to the other."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    fingerprint: str
    layout_version: int = LAYOUT_VERSION

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass(eq=False)
class Extent:
    """Slots [start, start + length) of one arena. Changed by `Arena.resize`, freed exactly once, by `Arena.free`."""

    arena: Arena
    start: int
    length: int
    freed: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.length

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of this extent, two views [length, Hkv, D]."""
        return self.arena.k[layer][self.start : self.stop], self.arena.v[layer][self.start : self.stop]

    def all_rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all layers, two views [L, length, Hkv, D]."""
        return self.arena.k_all[:, self.start : self.stop], self.arena.v_all[:, self.start : self.stop]

    def spans(self) -> list[tuple[Tensor, Tensor]]:
        """Head-major views [1, Hkv, length, D] of keys and values, one pair per layer."""
        return [(k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in map(self.rows, range(self.arena.spec.num_layers))]


class Arena:
    """One budget of KV memory. First fit with coalescing: contiguous extents keep attention kernels and the wire simple."""

    def __init__(self, spec: KVSpec, num_slots: int, device: torch.device | str = "cpu"):
        shape = (spec.num_layers, num_slots, spec.num_kv_heads, spec.head_dim)
        self.spec = spec
        self.num_slots = num_slots
        self.k_all = torch.empty(shape, dtype=spec.dtype, device=device)
        self.v_all = torch.empty(shape, dtype=spec.dtype, device=device)
        # Views of one layer each, [slots, Hkv, D].
        self.k, self.v = list(self.k_all), list(self.v_all)
        self._free: list[tuple[int, int]] = [(0, num_slots)] if num_slots else []
        self._used: dict[int, Extent] = {}
        self.num_freed = 0

    @property
    def free_slots(self) -> int:
        return sum(stop - start for start, stop in self._free)

    @property
    def used_bytes(self) -> int:
        return (self.num_slots - self.free_slots) * self.spec.bytes_per_token

    @property
    def fragmentation(self) -> float:
        """1 - largest free run / free slots; 0 when everything free is in one piece."""
        free = self.free_slots
        return 0.0 if not free else 1.0 - max(stop - start for start, stop in self._free) / free

    def alloc(self, length: int) -> Extent | None:
        """An extent of `length` >= 1 slots, or None when no free run is long enough. The memory is not cleared."""
        assert length >= 1, length
        for i, (start, stop) in enumerate(self._free):
            if stop - start >= length:
                if stop - start == length:
                    del self._free[i]
                else:
                    self._free[i] = (start + length, stop)
                extent = Extent(self, start, length)
                self._used[start] = extent
                return extent
        return None

    def free(self, extent: Extent) -> None:
        """Give an extent back. A second call for the same extent does nothing."""
        if extent.freed:
            return
        assert extent.arena is self and self._used.get(extent.start) is extent, extent
        extent.freed = True
        del self._used[extent.start]
        self._give_back(extent.start, extent.stop)

    def resize(self, extent: Extent, length: int) -> bool:
        """Change an extent's `length` >= 1 where it lies: shorter always, longer only into free slots right behind it."""
        assert length >= 1 and not extent.freed, (length, extent)
        stop = extent.start + length
        if stop < extent.stop:
            self._give_back(stop, extent.stop)
        elif stop > extent.stop:
            i = bisect.bisect(self._free, (extent.stop, 0))
            if i == len(self._free) or self._free[i][0] != extent.stop or self._free[i][1] < stop:
                return False
            if self._free[i][1] == stop:
                del self._free[i]
            else:
                self._free[i] = (stop, self._free[i][1])
        extent.length = length
        return True

    def _give_back(self, start: int, stop: int) -> None:
        self.num_freed += 1
        i = bisect.bisect(self._free, (start, stop))
        if i < len(self._free) and self._free[i][0] == stop:
            stop = self._free.pop(i)[1]
        if i > 0 and self._free[i - 1][1] == start:
            i -= 1
            start = self._free.pop(i)[0]
        self._free.insert(i, (start, stop))

    def check_integrity(self) -> None:
        """Assert that free runs and extents tile [0, num_slots) without overlap and that free runs are coalesced."""
        runs = [(start, stop, "free") for start, stop in self._free]
        runs += [(extent.start, extent.stop, "used") for extent in self._used.values()]
        at, last = 0, "used"
        for start, stop, what in sorted(runs):
            assert start == at and stop > start, f"slots [{at}, {start}) are lost or shared"
            assert not (what == last == "free"), f"free runs meet at {start} and were not joined"
            at, last = stop, what
        assert at == self.num_slots, f"slots [{at}, {self.num_slots}) are lost"


@dataclass(eq=False)
class MediaPrefix:
    """The immutable KV of `[system + pruned visual tokens]`, named by its content key.

    is_visual bool [n], False for text and for structural visual tokens (row ends), which always stay; positions i64 [R, n];
    token_map i32 [n, 3] = (group, row, col), -1 where not visual; per group its grid (rows, cols), the index of its media, its
    frame and time_s; kind: "image" if all media are images; next_pos: position of the first token after it; generation_floor:
    see PromptPlan; tenant: who alone may use it, "" = everybody; sums: checksums of parts of the KV, which never change, kept by
    whoever sends them.
    """

    key: str
    spec: KVSpec
    extent: Extent
    is_visual: Tensor
    positions: Tensor
    token_map: Tensor
    next_pos: int
    generation_floor: int
    grids: tuple[tuple[int, int], ...]
    media: tuple[int, ...]
    frames: tuple[int, ...]
    times_s: tuple[float, ...]
    kind: str
    num_frames: int
    duration_s: float
    num_visual: int
    tenant: str = ""
    sums: dict[Hashable, int] = field(default_factory=dict, repr=False)
    visual_index: Tensor = field(init=False)
    other_index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert self.extent.length == len(self.is_visual) == len(self.token_map) == self.positions.shape[1]
        self.visual_index = self.is_visual.nonzero()[:, 0]
        self.other_index = (~self.is_visual).nonzero()[:, 0]

    def serves(self, tenant: str) -> bool:
        """Whether a caller of this tenant may know of it."""
        return self.tenant in ("", tenant)

    @property
    def length(self) -> int:
        return self.extent.length

    @property
    def num_kept(self) -> int:
        """Visual tokens that survived pruning."""
        return len(self.visual_index)

    @property
    def kv_bytes(self) -> int:
        return self.length * self.spec.bytes_per_token

    @property
    def dense_kv_bytes(self) -> int:
        """What the prefix would take without pruning."""
        return (self.length - self.num_kept + self.num_visual) * self.spec.bytes_per_token


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
        count = self._holders[key] - 1
        assert count >= 0, key
        if count:
            self._holders[key] = count
        else:
            del self._holders[key]

    def holders(self, key: str) -> int:
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
