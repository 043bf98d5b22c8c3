"""Where media prefixes from other workers arrive: extents of the decode engine, taken and given back in its thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from sparsevila_cluster.core.errors import DeadlineExceeded
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.kvcache.arena import Extent, KVSpec
from sparsevila_cluster.transport.manifest import Manifest

R = TypeVar("R")
Post = Callable[[Callable[[DecodeEngine], R]], "Future[R]"]


class EnginePrefixSink:
    """`transport.PrefixSink` over a decode engine. post: has a function run in the engine's thread."""

    def __init__(self, spec: KVSpec, post: Callable[[Callable[[DecodeEngine], object]], Future], publish_s: float):
        """publish_s: how long the engine's thread may take to make a received prefix visible."""
        self._spec = spec
        self._post = post
        self._publish_s = publish_s

    def allocate(self, manifest: Manifest, deadline_s: float) -> Extent:
        """An extent for exactly this prefix; idle prefixes make way.

        Raises:
            Incompatible: of another model or layout. TooLarge: over the whole budget. QueueFull: all that is resident is in use.
            DeadlineExceeded: the engine did not answer within `deadline_s`. Unavailable: closed.
        """
        manifest.check(self._spec)
        reserved: Future[Extent] = self._post(lambda engine: engine.prefixes.reserve(manifest.metadata.length))
        try:
            return reserved.result(deadline_s)
        except TimeoutError as error:
            reserved.add_done_callback(self._undo)  # the engine may still get there
            raise DeadlineExceeded(f"the decode engine gave no room within {deadline_s:g} s") from error

    def _undo(self, reserved: Future[Extent]) -> None:
        if not reserved.cancelled() and reserved.exception() is None:
            self.cancel(reserved.result())

    def publish(self, manifest: Manifest, extent: Extent) -> None:
        """Make a verified prefix visible; if its key is resident already, the extent is given back. Raises DeadlineExceeded."""
        prefix = manifest.prefix(extent)
        try:
            self._post(lambda engine: engine.prefixes.publish(prefix)).result(self._publish_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the decode engine did not take the prefix within {self._publish_s:g} s") from error

    def cancel(self, extent: Extent) -> None:
        """Give back an extent that nothing was published in. Harmless when repeated; does not wait."""
        self._post(lambda engine: engine.prefixes.cancel(extent))
