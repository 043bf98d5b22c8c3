"""What a stage must do, whoever does it: floating-point operations and bytes, counted from the sizes in a checkpoint's config.

A multiplication and an addition count as two operations. Bytes are those that cannot stay in a processor's caches: weights once per
pass, KV rows once; activations are left out. bound = max(operations / ceiling, bytes / ceiling): no implementation on this machine
and in this precision is faster, unless its weights and KV fit into a processor cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.lib.machine import Ceilings


@dataclass(frozen=True)
class Work:
    flop: float
    bytes: float

    def bound_ms(self, ceilings: Ceilings) -> float:
        return 1e3 * max(self.flop / (ceilings.matmul_gflops * 1e9), self.bytes / ceilings.bytes_per_s)

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.bytes + other.bytes)


@dataclass(frozen=True)
class TextShape:
    """Sizes of a text decoder; `width` is bytes per number, `matrix_width` per weight of the layers' matrices; 0: the same."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    width: int = 4
    matrix_width: float = 0.0

    @classmethod
    def of(cls, config: Any, width: int = 4, matrix_width: float = 0.0) -> TextShape:
        text = config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            text.num_hidden_layers, text.hidden_size, text.num_attention_heads, text.num_key_value_heads, head_dim,
            text.intermediate_size, text.vocab_size, width, matrix_width,
        )  # fmt: skip

    @property
    def kv_weights(self) -> int:
        """Of one layer's key and value projections."""
        return 2 * self.hidden * self.num_kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        return 2 * self.hidden * self.num_heads * self.head_dim + self.kv_weights + 3 * self.hidden * self.intermediate

    @property
    def num_parameters(self) -> int:
        """Matrices of the layers, the embedding and the head."""
        return self.num_layers * self.layer_weights + 2 * self.vocab * self.hidden

    @property
    def kv_row_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.width

    def _weight_bytes(self, in_layers: float, outside: float = 0.0) -> float:
        """Of so many weights in the layers' matrices, and so many in the head."""
        return in_layers * (self.matrix_width or self.width) + outside * self.width

    def _attention_flop(self, pairs: float, num_layers: int) -> float:
        """`pairs`: how many (row, key) pairs meet."""
        return 4.0 * self.num_heads * self.head_dim * pairs * num_layers

    def prefill(self, num_tokens: int) -> Work:
        """KV rows of a media prefix; the last layer needs its keys and values only."""
        whole = self.num_layers - 1
        weights = whole * self.layer_weights + self.kv_weights
        flop = 2.0 * num_tokens * weights + self._attention_flop(num_tokens * (num_tokens + 1) / 2, whole)
        return Work(flop, self._weight_bytes(weights) + num_tokens * self.kv_row_bytes)

    def question(self, num_rows: int, num_past: int) -> Work:
        """Rows of one question over `num_past` keys, and the logits of the last."""
        weights, head = self.num_layers * self.layer_weights, self.vocab * self.hidden
        pairs = num_rows * num_past + num_rows * (num_rows + 1) / 2
        flop = 2.0 * num_rows * weights + 2.0 * head + self._attention_flop(pairs, self.num_layers)
        return Work(flop, self._weight_bytes(weights, head) + (num_past + num_rows) * self.kv_row_bytes)

    def step(self, batch: int, num_keys: int) -> Work:
        """One token for each of `batch` turns, each over `num_keys` keys of its own."""
        weights, head = self.num_layers * self.layer_weights, self.vocab * self.hidden
        flop = 2.0 * batch * (weights + head) + self._attention_flop(batch * num_keys, self.num_layers)
        return Work(flop, self._weight_bytes(weights, head) + batch * num_keys * self.kv_row_bytes)


def encode_work(config: Any, grid: tuple[int, int, int], width: int = 4) -> Work:
    """One pass of a Qwen2.5-VL vision tower over `grid` (groups, rows, cols of visual tokens), without salience."""
    v = config.vision_config
    merge, side = v.spatial_merge_size, v.window_size // v.patch_size
    groups, rows, cols = grid
    num_tokens = groups * rows * cols
    num_patches = num_tokens * merge**2
    patch_weights = 3 * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    layer_weights = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    merged = v.hidden_size * merge**2
    merger_weights = merged**2 + merged * v.out_hidden_size
    num_full = len(v.fullatt_block_indexes)
    full_pairs = num_patches * rows * cols * merge**2
    window_pairs = groups * sum(a * b for a in _cuts(rows * merge, side) for b in _cuts(cols * merge, side))
    pairs = num_full * full_pairs + (v.depth - num_full) * window_pairs
    flop = 2.0 * num_patches * (patch_weights + v.depth * layer_weights) + 2.0 * num_tokens * merger_weights
    weights = patch_weights + v.depth * layer_weights + merger_weights
    moved = weights * width + num_patches * patch_weights // v.hidden_size * (1 + width) + num_tokens * v.out_hidden_size * width
    return Work(flop + 4.0 * v.hidden_size * pairs, moved)


def four_bit_width(group_size: int) -> float:
    """Bytes of a weight in AutoAWQ's 4 bits, with its share of a group's zero (4 bits) and scale (16)."""
    return 0.5 + 2.5 / group_size


def _cuts(length: int, side: int) -> list[int]:
    """Squares of the pieces that a length is cut into: pairs that meet along one axis."""
    pieces = [side] * (length // side) + [length % side]
    return [piece**2 for piece in pieces]
