"""Preallocated KV memory: arenas and extents in them.

An arena holds one k and one v tensor, [L, slots, Hkv, D]. An extent is the half-open slot interval
[start, start + length), the same in all layers:

    slots  0 ......... start ............. start+length ......... slots
           | free/used |  one extent        | free/used ...        |
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch
from torch import Tensor

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
        """The slot behind the last one."""
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
        """Slots that belong to no extent."""
        return sum(stop - start for start, stop in self._free)

    @property
    def used_bytes(self) -> int:
        """Bytes of all extents."""
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
