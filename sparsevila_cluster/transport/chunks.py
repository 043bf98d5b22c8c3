"""Chunks as bytes: which tensors carry one, what they hold, and the checksum over them.

straight   k of layer a | v of layer a | k of layer a+1 | ...      one tensor each, rows of the arena itself
packed     k, v of all its layers one behind the other              one staging buffer
int8       f32 scales of every part | int8 values of every part     one staging buffer
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import DataLoss
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.transport.manifest import Chunk, Manifest
from sparsevila_kernels import kv_dequantize, kv_quantize

LANE_WORDS = 64  # words of 64 bits that are added up before a weight tells where they stand
ODD = 0x9E3779B97F4A7C15 - 2**64  # as a signed number
MASK = 2**64 - 1


class ChunkBuffers:
    """One side of one transfer: the rows of its extent as tensors for a link.

    Both sides compute every size from the manifest, so that no buffer is ever smaller than what comes into it.
    """

    def __init__(self, manifest: Manifest, extent: Extent, device: torch.device):
        assert extent.length == manifest.metadata.length, (extent.length, manifest.metadata.length)
        self.manifest = manifest
        self.spec = manifest.metadata.spec
        self.extent = extent
        self.device = device
        home = extent.arena.k[0].device
        # Staging copies must not wait for the kernels that prefill the next rows on the same device.
        self._stream = torch.cuda.Stream(home) if home.type == "cuda" else None

    def is_straight(self, chunk: Chunk) -> bool:
        """Whether it travels as one tensor per layer and kind, without staging."""
        manifest = self.manifest
        part_bytes = chunk.kv_bytes(self.spec) // (2 * chunk.num_layers)
        return manifest.quantization == "none" and 0 < manifest.straight_bytes <= part_bytes

    def sizes(self, chunk: Chunk) -> list[int]:
        """Bytes of each tensor that carries `chunk`."""
        kv_bytes, num_parts = chunk.kv_bytes(self.spec), 2 * chunk.num_layers
        if self.manifest.quantization == "int8":
            spec = self.spec
            rows = num_parts * chunk.num_rows * spec.num_kv_heads
            return [rows * 4 + rows * spec.head_dim]
        return [kv_bytes // num_parts] * num_parts if self.is_straight(chunk) else [kv_bytes]

    def own_stream(self) -> AbstractContextManager[object]:
        """Within it a GPU works for this transfer beside the kernels that prefill.

        What is not enqueued in it waits for them: NCCL sends only after all that the current stream holds.
        """
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def gather(self, chunk: Chunk) -> list[Tensor]:
        """The chunk's bytes, uint8, on the link's device; the arena's own memory where that is possible."""
        with self.own_stream():
            tensors = self._gather(chunk)
            if self._stream is not None:
                self._stream.synchronize()
        return tensors

    def _gather(self, chunk: Chunk) -> list[Tensor]:
        parts = self._parts(chunk)
        if self.manifest.quantization == "int8":
            tensors = [self._quantized(chunk)]
        elif self.is_straight(chunk):
            tensors = [_bytes_of(part) for part in parts]
        else:
            tensors = [torch.cat([_bytes_of(part) for part in parts])]
        return [tensor.to(self.device) for tensor in tensors]

    def targets(self, chunk: Chunk) -> list[Tensor]:
        """Tensors to receive `chunk` in, of `sizes`: rows of the arena where that is possible, else staging buffers."""
        if self.is_straight(chunk) and self.extent.arena.k[0].device == self.device:
            return [_bytes_of(part) for part in self._parts(chunk)]
        return [torch.empty(size, dtype=torch.uint8, device=self.device) for size in self.sizes(chunk)]

    def scatter(self, chunk: Chunk, received: Sequence[Tensor]) -> None:
        """Bring what was received in `targets` to the arena, as far as it is not there.

        Raises DataLoss: int8 with scales from which no KV can be made.
        """
        parts = self._parts(chunk)
        if self.manifest.quantization == "int8":
            values, scales = self._int8_in(received[0].to(parts[0].device), chunk)
            if not bool(((scales >= 0) & (scales < torch.inf)).all()):
                raise DataLoss(f"rows {chunk.start} to {chunk.stop} came with int8 scales outside of [0, inf)")
            kv_dequantize(values, scales, *self._layers(chunk), self._rows(chunk))
        elif not self.is_straight(chunk):
            split = received[0].split(received[0].numel() // len(parts))
            for part, new in zip(parts, split, strict=True):
                _bytes_of(part).copy_(new)
        else:
            for part, new in zip(parts, received, strict=True):
                if new.data_ptr() != part.data_ptr():
                    _bytes_of(part).copy_(new)
        if self._stream is not None:
            torch.cuda.current_stream(parts[0].device).synchronize()

    def _quantized(self, chunk: Chunk) -> Tensor:
        """The chunk as f32 scales [layers, 2, n, H] and int8 values [layers, 2, n, H, D], in one buffer on the arena's device."""
        layers = self._layers(chunk)
        buffer = torch.empty(self.sizes(chunk)[0], dtype=torch.uint8, device=layers[0].device)
        kv_quantize(*layers, self._rows(chunk), out=self._int8_in(buffer, chunk))
        return buffer

    def _int8_in(self, buffer: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Values and scales as views of a buffer."""
        spec = self.spec
        shape = (chunk.num_layers, 2, chunk.num_rows, spec.num_kv_heads)
        scales_bytes = 4 * prod(shape)
        scales, values = buffer[:scales_bytes].view(torch.float32), buffer[scales_bytes:].view(torch.int8)
        return values.view(*shape, spec.head_dim), scales.view(shape)

    def _layers(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Keys and values of the chunk's layers, [layers, slots, H, D]: the whole arena's rows."""
        arena, layers = self.extent.arena, slice(chunk.first_layer, chunk.stop_layer)
        return arena.k_all[layers], arena.v_all[layers]

    def _rows(self, chunk: Chunk) -> Tensor:
        """Slots of the chunk's rows, i64."""
        start = self.extent.start
        return torch.arange(start + chunk.start, start + chunk.stop, device=self.extent.arena.k_all.device)

    def _parts(self, chunk: Chunk) -> list[Tensor]:
        arena, start = self.extent.arena, self.extent.start
        rows = slice(start + chunk.start, start + chunk.stop)
        layers = range(chunk.first_layer, chunk.stop_layer)
        return [tensor[layer][rows] for layer in layers for tensor in (arena.k, arena.v)]


def _bytes_of(part: Tensor) -> Tensor:
    return part.view(-1).view(torch.uint8)


class Checksum:
    """64 bits over uint8 tensors, added one after the other; equal on every device.

    Sums of 512 bytes, each times an odd weight of its place: any one changed word changes it, and so does moving rows, parts or
    chunks. It finds faults, not forgery. Reads cold memory at about 15 GiB/s on one core and what lies in a cache at 60, where
    zlib.crc32 reaches 3.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, tensor: Tensor) -> None:
        """Count in the next tensor."""
        num = tensor.numel()
        whole = num - num % (8 * LANE_WORDS)
        part = num
        if whole:
            words = tensor[:whole].view(torch.int64).view(-1, LANE_WORDS).sum(1)
            weights = _weights(len(words), tensor.device)
            part += int(torch.dot(words, weights) if words.is_cpu else (words * weights).sum())
        if whole < num:
            part += zlib.crc32(bytes(tensor[whole:].tolist())) * ODD
        self.value = (self.value * (ODD & MASK) + part) & MASK


def checksum(tensors: Sequence[Tensor]) -> int:
    """The checksum of some tensors."""
    total = Checksum()
    for tensor in tensors:
        total.add(tensor)
    return total.value


@lru_cache(maxsize=64)
def _weights(num: int, device: torch.device) -> Tensor:
    weights = torch.arange(1, num + 1, device=device) * ODD | 1
    if weights.is_cuda:  # who asks next may be at another stream
        torch.cuda.current_stream(device).synchronize()
    return weights
