"""Small functions that run inside kernels: finding a tile's sequence, dot products, logarithms of sums."""

from __future__ import annotations

from ._launch import jit, tl


@jit
def locate(bounds, num_sequences, tile, TIMES: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    """Who owns `tile` if each sequence is cut into tiles of BLOCK on its own -> (sequence, tile within it).

    The sequence is num_sequences for tiles beyond the last. Reading all bounds costs less than a table made by other launches.
    """
    index = tl.arange(0, PAD)
    inside = index < num_sequences
    start = tl.load(bounds + index, mask=inside, other=0)
    stop = tl.load(bounds + index + 1, mask=inside, other=0)
    num_tiles = ((stop - start) * TIMES + BLOCK - 1) // BLOCK
    before = inside & (tl.cumsum(num_tiles, 0) <= tile)
    return tl.sum(before.to(tl.int32), 0), tile - tl.sum(tl.where(before, num_tiles, 0), 0)


@jit
def dot(a, b, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@jit
def natural(peak, total):
    """log(total 2^peak): the log-sum-exp in base e of a base-2 peak and the sum above it; -inf of an empty sum."""
    return tl.where(total > 0.0, (peak + tl.log2(tl.where(total > 0.0, total, 1.0))) * 0.6931471805599453, float("-inf"))
