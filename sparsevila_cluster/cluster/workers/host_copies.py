"""Media prefixes that a prefill worker keeps in host memory, to send them again without encoding anything.

Several threads use it: one prefills, others send, the event loop looks.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from sparsevila_cluster.core.errors import QueueFull, TooLarge
from sparsevila_cluster.kvcache.arena import Arena, Extent, KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.kvcache.prefix_store import PrefixStore


class HostCopies:
    """A `PrefixStore` behind a lock. Its arena lies in host memory, or on `device` where it is the place to prefill in."""

    def __init__(self, spec: KVSpec, budget_bytes: int, device: torch.device | str = "cpu", max_share: float = 1.0):
        """max_share: of the budget, that the copies of one owner may take."""
        self._store = PrefixStore(Arena(spec, budget_bytes // spec.bytes_per_token, device), max_share)
        self._lock = threading.Lock()
        self._version = 0

    @property
    def used_bytes(self) -> int:
        """KV bytes of all copies, those that are being made included."""
        with self._lock:
            return self._store.arena.used_bytes

    @property
    def budget_bytes(self) -> int:
        """KV bytes that all copies may take."""
        return self._store.arena.num_slots * self._store.arena.spec.bytes_per_token

    @property
    def version(self) -> int:
        """Another number whenever what is kept may have changed."""
        return self._version

    def reserve(self, length: int, owner: str = "") -> Extent:
        """Slots for a prefix of `length` rows; copies that nobody holds make way.

        Raises:
            TooLarge: longer than the whole budget, or its owner's share. QueueFull: all copies are being made or sent.
        """
        with self._lock:
            self._version += 1
            arena = self._store.arena
            if length > arena.num_slots:
                size = arena.spec.bytes_per_token
                raise TooLarge(
                    f"media prefix of {length} tokens takes {length * size} bytes of KV; a prefill worker keeps {self.budget_bytes}"
                )
            if length > self._store.most_room():
                raise QueueFull(f"no room to make a media prefix of {length} tokens: all that are kept are being made or sent")
            return self._store.reserve(length, owner)

    def cancel(self, extent: Extent) -> None:
        """Give back a reservation that will not be published. Harmless when repeated."""
        with self._lock:
            self._store.cancel(extent)

    def publish(self, prefix: MediaPrefix) -> MediaPrefix:
        """Keep a finished prefix, and hold it: `release` comes later. The one that was there before stays, if there is one."""
        with self._lock:
            self._version += 1
            self._store.publish(prefix)
            return self._store.hold(prefix.key)

    def hold(self, key: str) -> MediaPrefix | None:
        """The copy, which stays until `release`; None if there is none."""
        with self._lock:
            return self._store.hold(key) if key in self._store else None

    def release(self, key: str) -> None:
        """Give a hold back."""
        with self._lock:
            self._store.release(key)

    def drop(self, key: str) -> bool:
        """False if it is unknown or held."""
        with self._lock:
            self._version += 1
            return self._store.remove(key)

    def all(self) -> list[MediaPrefix]:
        """All finished copies."""
        with self._lock:
            return list(self._store)

    def check_integrity(self) -> None:
        """Assert that every slot has exactly one owner, and that nothing is held: nobody makes or sends."""
        with self._lock:
            self._store.check_integrity()
            assert not any(self._store.holders(prefix.key) for prefix in self._store), "a copy is held by nobody that is left"


def in_host_memory(prefix: MediaPrefix, extent: Extent) -> MediaPrefix:
    """The same prefix, described by tensors in host memory, with its rows in `extent`."""
    return replace(prefix, metadata=prefix.metadata.to("cpu"), extent=extent)
