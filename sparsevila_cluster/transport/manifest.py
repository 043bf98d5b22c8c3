"""What crosses a lane: the manifest of one media prefix, and how its KV is cut into chunks.

prefix rows   [0 ......... bounds[1]) [bounds[1] ......... bounds[2]) ...     one prefill chunk each, through all layers
wire chunks   layers 0-3 | 4-7 | ...   layers 0-3 | 4-7 | ...                 in the order in which their rows become final
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgpack

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import DataLoss, Incompatible
from sparsevila_cluster.kvcache.arena import Extent, KVSpec
from sparsevila_cluster.kvcache.metadata_codec import decode_metadata, encode_metadata, read_int, read_text, require
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata

VERSION = 2
MAX_CHUNK_BYTES = 32 * 2**20
MAX_CHUNKS = 2**18
MAX_FIELDS = 64
# A chunk closes once it has this many bytes: small enough that many are under way at once, large enough to fill a lane.
GRAIN_BYTES = 4 * 2**20
# Keys or values of one layer of a chunk that have at least this many bytes travel straight from and to the arena.
STRAIGHT_BYTES = 128 * 2**10


@dataclass(frozen=True)
class Chunk:
    """Keys and values of layers [first_layer, stop_layer) and rows [start, stop) of a prefix."""

    first_layer: int
    stop_layer: int
    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        """Layers."""
        return self.stop_layer - self.first_layer

    @property
    def num_rows(self) -> int:
        """Rows of each layer."""
        return self.stop - self.start

    def kv_bytes(self, spec: KVSpec) -> int:
        """Bytes in the arena."""
        return self.num_layers * self.num_rows * layer_row_bytes(spec)


def layer_row_bytes(spec: KVSpec) -> int:
    """Bytes of one row's keys and values in one layer."""
    return spec.bytes_per_token // spec.num_layers


def cut(spec: KVSpec, bounds: Sequence[int], chunk_bytes: int = MAX_CHUNK_BYTES) -> tuple[Chunk, ...]:
    """The chunks of a prefix that is prefilled between `bounds` [0, ..., length], in the order in which they become final.

    None has more than `chunk_bytes`, unless a single row of a single layer has.
    """
    row_bytes = layer_row_bytes(spec)
    chunks = []
    for start, stop in pairwise(bounds):
        most_rows = max(1, chunk_bytes // row_bytes)
        if stop - start > most_rows:
            num = -(-(stop - start) // most_rows)
            cuts = [start + (stop - start) * i // num for i in range(num + 1)]
            chunks += [Chunk(layer, layer + 1, c, d) for layer in range(spec.num_layers) for c, d in pairwise(cuts)]
        else:
            layers = max(1, min(chunk_bytes, GRAIN_BYTES) // ((stop - start) * row_bytes))
            firsts = range(0, spec.num_layers, layers)
            chunks += [Chunk(first, min(first + layers, spec.num_layers), start, stop) for first in firsts]
    return tuple(chunks)


@dataclass(frozen=True, eq=False)
class Manifest:
    """What a media prefix is, with tensors on the CPU, and how its KV travels.

    chunks tile layers x rows; quantization: of KV on the wire; checksum: whether chunks carry one; straight_bytes: see
    STRAIGHT_BYTES, 0 when every chunk travels as one buffer.
    """

    transfer_id: str
    metadata: PrefixMetadata
    chunks: tuple[Chunk, ...]
    quantization: str = "none"
    checksum: bool = True
    straight_bytes: int = STRAIGHT_BYTES
    version: int = VERSION

    @staticmethod
    def of(prefix: MediaPrefix, transfer_id: str, bounds: Sequence[int], config: TransportConfig) -> Manifest:
        """The manifest of a prefix whose rows become final between `bounds` [0, ..., length], one piece after the other."""
        assert bounds[0] == 0 and bounds[-1] == prefix.length, (bounds, prefix.length)
        return Manifest(
            transfer_id=transfer_id,
            metadata=prefix.metadata.to("cpu"),
            chunks=cut(prefix.spec, bounds, config.chunk_bytes),
            quantization=config.quantization,
            checksum=config.checksum,
        )

    def packed_whole(self) -> Manifest:
        """The same, with every chunk as one buffer."""
        return replace(self, straight_bytes=0)

    def pack(self) -> bytes:
        """As msgpack."""
        packed: bytes = msgpack.packb(
            {
                "version": self.version,
                "transfer_id": self.transfer_id,
                **encode_metadata(self.metadata),
                "chunks": [[c.first_layer, c.stop_layer, c.start, c.stop] for c in self.chunks],
                "quantization": self.quantization,
                "checksum": self.checksum,
                "straight_bytes": self.straight_bytes,
            }
        )
        return packed

    @staticmethod
    def unpack(packed: bytes) -> Manifest:
        """What `pack` packed.

        Raises:
            Incompatible: another version of this format. DataLoss: bytes that are no manifest, or one that contradicts itself.
        """
        try:
            fields: Any = msgpack.unpackb(packed, max_array_len=MAX_CHUNKS, max_map_len=MAX_FIELDS)
            version = read_int(fields["version"])
        except Exception as error:  # whatever msgpack makes of foreign bytes
            raise DataLoss(f"{len(packed)} bytes are no manifest: {str(error)[:100] or type(error).__name__}") from error
        if version != VERSION:
            raise Incompatible(f"manifest version {version}; this worker speaks {VERSION}")
        try:
            manifest = Manifest(
                transfer_id=read_text(fields["transfer_id"]),
                metadata=decode_metadata(fields),
                chunks=tuple(Chunk(*map(read_int, chunk)) for chunk in fields["chunks"]),
                quantization=read_text(fields["quantization"]),
                checksum=_read_truth(fields["checksum"]),
                straight_bytes=read_int(fields["straight_bytes"]),
            )
            manifest._check_itself()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise DataLoss(f"malformed manifest: {type(error).__name__}: {str(error)[:100]}") from error
        return manifest

    def check(self, spec: KVSpec) -> None:
        """Raises Incompatible unless KV of `spec`, this worker's, means the same as that of the manifest."""
        for name in ("layout_version", "fingerprint", "num_layers", "num_kv_heads", "head_dim", "dtype"):
            theirs, ours = getattr(self.metadata.spec, name), getattr(spec, name)
            if theirs != ours:
                told = str(theirs)[:80]
                raise Incompatible(f"media prefix {self.metadata.key[:12]} was made with {name}={told}; this worker has {ours}")

    def prefix(self, extent: Extent) -> MediaPrefix:
        """The media prefix whose KV rows lie in `extent`; its tensors on the extent's device."""
        return MediaPrefix(self.metadata.to(extent.arena.k[0].device), extent)

    def _check_itself(self) -> None:
        spec = self.metadata.spec
        require(1 <= len(self.transfer_id) <= 256, "transfer_id")
        require(self.quantization in ("none", "int8"), "quantization")
        require(self.straight_bytes >= 0, "straight_bytes")
        require(all(c.kv_bytes(spec) <= max(MAX_CHUNK_BYTES, layer_row_bytes(spec)) for c in self.chunks), "chunk size")
        require(self._tiled(), "chunks do not tile the prefix")

    def _tiled(self) -> bool:
        """Every row of every layer is in exactly one chunk."""
        num_layers = self.metadata.spec.num_layers
        done = [0] * num_layers
        for chunk in self.chunks:
            layers = range(chunk.first_layer, chunk.stop_layer)
            inside = 0 <= chunk.first_layer < chunk.stop_layer <= num_layers and chunk.start < chunk.stop
            if not inside or any(done[layer] != chunk.start for layer in layers):
                return False
            for layer in layers:
                done[layer] = chunk.stop
        return all(rows == self.metadata.length for rows in done)


def _read_truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"a truth value expected, not {type(value).__name__}")
    return value
