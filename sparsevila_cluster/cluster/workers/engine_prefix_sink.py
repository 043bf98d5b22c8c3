"""Where received media prefixes go: extents of the decode engine, taken and given back in its thread."""

from __future__ import annotations

from sparsevila_cluster.engine.async_engine import AsyncDecodeEngine
from sparsevila_cluster.kvcache.arena import Extent, KVSpec
from sparsevila_cluster.transport.manifest import Manifest


class EnginePrefixSink:
    """`transport.PrefixSink` over a decode engine. Called from the receiver's threads."""

    def __init__(self, spec: KVSpec, engine: AsyncDecodeEngine, publish_s: float):
        """publish_s: how long the engine's thread may take to make a prefix that has arrived visible."""
        self._spec, self._engine, self._publish_s = spec, engine, publish_s

    def allocate(self, manifest: Manifest, deadline_s: float) -> Extent:
        """An extent for exactly this prefix; idle prefixes are evicted for it.

        Raises:
            Incompatible: of another model or layout. TooLarge: over the whole budget. QueueFull: all that is resident is in use.
            DeadlineExceeded: the engine did not answer within `deadline_s`. Unavailable: closed.
        """
        manifest.check(self._spec)
        return self._engine.reserve(manifest.metadata.length, deadline_s, manifest.metadata.owner)

    def publish(self, manifest: Manifest, extent: Extent) -> None:
        """Make a verified prefix visible; if its key is resident already, the extent is given back. Raises DeadlineExceeded."""
        self._engine.publish(manifest.prefix(extent), self._publish_s)

    def cancel(self, extent: Extent) -> None:
        """Give back an extent that nothing was published in. Harmless when repeated; does not wait."""
        self._engine.cancel(extent)
