"""What crosses a lane: the manifest of one media prefix, and how its KV is cut into chunks.

Knows: which bytes describe a prefix, which rows of which layers make a chunk, when two workers may not understand each other. Does
not know: sockets, threads, or who waits.

    prefix rows   [0 ......... bounds[1]) [bounds[1] ......... bounds[2]) ...     one prefill chunk each, through all layers
    wire chunks   layers 0-3 | 4-7 | ...   layers 0-3 | 4-7 | ...                 in the order in which their rows become final
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgpack
import torch
from torch import Tensor

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import DataLoss, Incompatible
from sparsevila_cluster.kvcache.arena import Extent, KVSpec
from sparsevila_cluster.kvcache.prefix import MediaPrefix

VERSION = 1
MAX_CHUNK_BYTES = 32 * 2**20
# A chunk closes once it has this many bytes: small enough that many are under way at once, large enough to fill a lane.
GRAIN_BYTES = 4 * 2**20
# Keys or values of one layer of a chunk that have at least this many bytes travel straight from and to the arena.
STRAIGHT_BYTES = 128 * 2**10
MAX_ROWS = 2**24

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Chunk:
    """Keys and values of layers [first_layer, stop_layer) and rows [start, stop) of a prefix."""

    first_layer: int
    stop_layer: int
    start: int
    stop: int

    @property
    def num_layers(self) -> int:
        return self.stop_layer - self.first_layer

    @property
    def num_rows(self) -> int:
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
    """Everything about a media prefix but its KV rows. Tensors as in `MediaPrefix`, on the CPU.

    chunks tile layers x rows; quantization: of KV on the wire; checksum: whether chunks carry one; straight_bytes: see
    STRAIGHT_BYTES, 0 when every chunk travels as one buffer.
    """

    transfer_id: str
    key: str
    tenant: str
    spec: KVSpec
    length: int
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
            key=prefix.key,
            tenant=prefix.tenant,
            spec=prefix.spec,
            length=prefix.length,
            is_visual=prefix.is_visual.cpu(),
            positions=prefix.positions.cpu(),
            token_map=prefix.token_map.cpu(),
            next_pos=prefix.next_pos,
            generation_floor=prefix.generation_floor,
            grids=prefix.grids,
            media=prefix.media,
            frames=prefix.frames,
            times_s=prefix.times_s,
            kind=prefix.kind,
            num_frames=prefix.num_frames,
            duration_s=prefix.duration_s,
            num_visual=prefix.num_visual,
            chunks=cut(prefix.spec, bounds, config.chunk_bytes),
            quantization=config.quantization,
            checksum=config.checksum,
        )

    @property
    def kv_bytes(self) -> int:
        """What the prefix takes in an arena."""
        return self.length * self.spec.bytes_per_token

    def packed_whole(self) -> Manifest:
        """The same, with every chunk as one buffer."""
        return replace(self, straight_bytes=0)

    def pack(self) -> bytes:
        spec = self.spec
        return msgpack.packb(
            {
                "version": self.version,
                "transfer_id": self.transfer_id,
                "key": self.key,
                "tenant": self.tenant,
                "spec": {
                    "num_layers": spec.num_layers,
                    "num_kv_heads": spec.num_kv_heads,
                    "head_dim": spec.head_dim,
                    "dtype": DTYPE_NAMES[spec.dtype],
                    "fingerprint": spec.fingerprint,
                    "layout_version": spec.layout_version,
                },
                "length": self.length,
                "is_visual": _raw(self.is_visual),
                "positions": _raw(self.positions),
                "token_map": _raw(self.token_map),
                "next_pos": self.next_pos,
                "generation_floor": self.generation_floor,
                "grids": self.grids,
                "media": self.media,
                "frames": self.frames,
                "times_s": self.times_s,
                "kind": self.kind,
                "num_frames": self.num_frames,
                "duration_s": self.duration_s,
                "num_visual": self.num_visual,
                "chunks": [[c.first_layer, c.stop_layer, c.start, c.stop] for c in self.chunks],
                "quantization": self.quantization,
                "checksum": self.checksum,
                "straight_bytes": self.straight_bytes,
            }
        )

    @staticmethod
    def unpack(packed: bytes) -> Manifest:
        """What `pack` packed.

        Raises:
            Incompatible: another version of this format. DataLoss: bytes that are no manifest, or one that contradicts itself.
        """
        try:
            fields: Any = msgpack.unpackb(packed)
            version = fields["version"]
        except Exception as error:  # whatever msgpack makes of foreign bytes
            raise DataLoss(f"{len(packed)} bytes are no manifest: {error or type(error).__name__}") from error
        if version != VERSION:
            raise Incompatible(f"manifest version {version!r}; this worker speaks {VERSION}")
        try:
            manifest = _read(fields)
            manifest._check_itself()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            raise DataLoss(f"malformed manifest: {type(error).__name__}: {error}") from error
        return manifest

    def check(self, spec: KVSpec) -> None:
        """Raises Incompatible unless KV of `spec`, this worker's, means the same as that of the manifest."""
        for name in ("layout_version", "fingerprint", "num_layers", "num_kv_heads", "head_dim", "dtype"):
            theirs, ours = getattr(self.spec, name), getattr(spec, name)
            if theirs != ours:
                raise Incompatible(f"media prefix {self.key[:12]} was made with {name}={theirs}; this worker has {ours}")

    def prefix(self, extent: Extent) -> MediaPrefix:
        """The media prefix whose KV rows lie in `extent`; its tensors on the extent's device."""
        device = extent.arena.k[0].device
        return MediaPrefix(
            key=self.key,
            spec=self.spec,
            extent=extent,
            is_visual=self.is_visual.to(device),
            positions=self.positions.to(device),
            token_map=self.token_map.to(device),
            next_pos=self.next_pos,
            generation_floor=self.generation_floor,
            grids=self.grids,
            media=self.media,
            frames=self.frames,
            times_s=self.times_s,
            kind=self.kind,
            num_frames=self.num_frames,
            duration_s=self.duration_s,
            num_visual=self.num_visual,
            tenant=self.tenant,
        )

    def _check_itself(self) -> None:
        spec, groups = self.spec, len(self.grids)
        _need(1 <= len(self.key) <= 256 and 1 <= len(self.transfer_id) <= 256, "key")
        _need(1 <= self.length <= MAX_ROWS and min(spec.num_layers, spec.num_kv_heads, spec.head_dim) >= 1, "length, spec")
        _need(self.quantization in ("none", "int8") and self.kind in ("video", "image"), "quantization, kind")
        _need(self.straight_bytes >= 0 and self.num_frames >= 0 and self.num_visual >= int(self.is_visual.sum()), "counts")
        _need(groups == len(self.media) == len(self.frames) == len(self.times_s), "groups")
        _need(bool((self.token_map[:, 0] < groups).all()) and bool((self.token_map >= -1).all()), "token_map")
        _need(bool((self.positions >= 0).all()) and self.next_pos >= 0, "positions")
        _need(all(c.kv_bytes(spec) <= max(MAX_CHUNK_BYTES, layer_row_bytes(spec)) for c in self.chunks), "chunk size")
        _need(self._tiled(), "chunks do not tile the prefix")

    def _tiled(self) -> bool:
        """Every row of every layer is in exactly one chunk."""
        done = [0] * self.spec.num_layers
        for chunk in self.chunks:
            layers = range(chunk.first_layer, chunk.stop_layer)
            inside = 0 <= chunk.first_layer < chunk.stop_layer <= self.spec.num_layers and chunk.start < chunk.stop
            if not inside or any(done[layer] != chunk.start for layer in layers):
                return False
            for layer in layers:
                done[layer] = chunk.stop
        return all(rows == self.length for rows in done)


def _read(fields: dict[str, Any]) -> Manifest:
    spec, length = fields["spec"], _int(fields["length"])
    return Manifest(
        transfer_id=_text(fields["transfer_id"]),
        key=_text(fields["key"]),
        tenant=_text(fields["tenant"]),
        spec=KVSpec(
            num_layers=_int(spec["num_layers"]),
            num_kv_heads=_int(spec["num_kv_heads"]),
            head_dim=_int(spec["head_dim"]),
            dtype=DTYPES[spec["dtype"]],
            fingerprint=_text(spec["fingerprint"]),
            layout_version=_int(spec["layout_version"]),
        ),
        length=length,
        is_visual=_tensor(fields["is_visual"], torch.bool, (length,)),
        positions=_tensor(fields["positions"], torch.int64, (-1, length)),
        token_map=_tensor(fields["token_map"], torch.int32, (length, 3)),
        next_pos=_int(fields["next_pos"]),
        generation_floor=_int(fields["generation_floor"]),
        grids=tuple((_int(rows), _int(cols)) for rows, cols in fields["grids"]),
        media=tuple(map(_int, fields["media"])),
        frames=tuple(map(_int, fields["frames"])),
        times_s=tuple(map(float, fields["times_s"])),
        kind=_text(fields["kind"]),
        num_frames=_int(fields["num_frames"]),
        duration_s=float(fields["duration_s"]),
        num_visual=_int(fields["num_visual"]),
        chunks=tuple(Chunk(*map(_int, chunk)) for chunk in fields["chunks"]),
        quantization=_text(fields["quantization"]),
        checksum=bool(fields["checksum"]),
        straight_bytes=_int(fields["straight_bytes"]),
    )


def _need(truth: bool, what: str) -> None:
    if not truth:
        raise ValueError(what)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"a whole number expected, not {type(value).__name__}")
    return value


def _raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def _tensor(raw: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(raw, bytes):
        raise TypeError(f"bytes expected, not {type(raw).__name__}")
    if dtype == torch.bool and raw.strip(b"\0\1"):
        raise ValueError("a truth value that is neither 0 nor 1")
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
