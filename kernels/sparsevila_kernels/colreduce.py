"""How much each key is attended to: softmax(q k^T) reduced over its rows, never written out as a matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _colreduce_kernels as kernels
from ._colreduce_torch import colreduce_in_torch
from ._launch import INTERPRETED, Backend, Variant, cdiv, check_heads, choose, launch, next_power_of_2

# Keys of one split in the first pass. A sequence of n keys has at most 128 splits, of 256 keys or more; this depends on n alone,
# so a sequence's bits do not depend on its neighbours. 2 KV heads x 128 splits fill an H200's 132 multiprocessors about twice.
MIN_SPLIT, MAX_SPLITS = 256, 128
JOINED = 32  # rows x heads whose splits one program joins
LOG2_E = 1.4426950408889634
# More packed rows per sequence than this fill the GPU by themselves: one split.
MAX_ROWS_TO_SPLIT = 1024


def colreduce(
    q: Tensor,
    k: Tensor,
    *,
    reduction: Literal["sum", "mean", "max"] = "sum",
    heads: Literal["each", "mean"] = "each",
    causal: bool = False,
    scale: float | None = None,
    cu_rows: Tensor | None = None,
    cu_keys: Tensor | None = None,
    lse: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The sum, mean or maximum of softmax(scale q k^T) over its rows: f32 [Hq, N], or [N] with the mean over query heads.

    q [M, Hq, D] and k [N, Hkv, D] of one dtype (bf16, fp16, fp32), any stride but 1 along D; Hkv divides Hq. `scale`, above 0, is
    D^-0.5 by default. `cu_rows` and `cu_keys` i32 [B + 1], on the same device and ending at M and N, cut them into B sequences
    that know nothing of each other; any of them may be empty. `causal`: row i of m sees the keys up to i + (n - m); a row that
    sees none counts as 0. "mean" divides by the number m of rows of the sequence. `lse` f32 [M, Hq] is the natural log-sum-exp
    of each row over whatever keys it is to be normalized by (also others than k); with it k is read once instead of twice.

    Raises ValueError for shapes, dtypes, strides and words other than these. The result is deterministic, and a sequence's part
    of it depends on its neighbours only through the average number of rows, which chooses the tiles.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check(q, k, reduction, heads, scale, cu_rows, cu_keys, lse)
    if choose(backend, q) == "torch":
        return colreduce_in_torch(q, k, reduction, heads, causal, scale, cu_rows, cu_keys, lse)
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    num_sequences = 1 if cu_rows is None else len(cu_rows) - 1
    group = num_heads // num_kv_heads
    together = group if heads == "mean" and reduction != "max" else 1
    shape = num_heads // together, num_keys
    # Where the bounds may leave keys out, or all rows away, nobody writes: 0 is right.
    make = torch.zeros if cu_keys is not None or not num_rows else torch.empty
    out = make(shape, dtype=torch.float32, device=q.device)
    if num_rows and num_keys:
        shared = _shared(head_dim, group, together, causal, num_sequences)
        tiles = _tiles(q.dtype, head_dim, cdiv(num_rows, num_sequences), group, together)
        packed = _pack(q, group) if together > 1 or lse is None else q
        rows = packed if together > 1 else q.transpose(0, 1)
        if lse is None:
            norms = _row_norms(packed, k, cu_rows, cu_keys, num_sequences, scale, tiles[0], shared)
        else:
            norms = _norms_of(lse, together)
        launch(
            kernels.columns, (cdiv(num_keys, tiles[1]["BLOCK_KEYS"]) + num_sequences - 1, num_kv_heads),
            rows, k, norms, cu_rows, cu_keys, out, num_rows, num_keys, num_sequences,
            rows.stride(1), rows.stride(0), *k.stride()[:2], scale * LOG2_E,
            device=q.device, REDUCTION=reduction, **tiles[1], **shared,
        )  # fmt: skip
    if heads == "each":
        return out
    return out.sum(0) / num_heads


def _pack(q: Tensor, group: int) -> Tensor:
    """q [M, Hq, D] -> [Hkv, M * G, D]: a view if G is 1."""
    return q.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)


def _norms_of(lse: Tensor, together: int) -> Tensor:
    """Natural log-sum-exps [M, Hq] -> base 2, +inf where a row has seen nothing, [Hq / together, M * together]."""
    norms = lse.unflatten(1, (-1, together)).transpose(0, 1).flatten(1, 2) * LOG2_E
    return norms.masked_fill_(norms == float("-inf"), float("inf")).contiguous()


def _row_norms(
    packed: Tensor, k: Tensor, cu_rows: Tensor | None, cu_keys: Tensor | None, num_sequences: int, scale: float,
    tiles: dict[str, int], shared: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The first pass: q [Hkv, M * G, D] -> norms f32 [Hq / together, M * together]."""
    num_kv_heads, num_packed, _ = packed.shape
    num_rows, num_keys, num = num_packed // shared["GROUP"], len(k), num_kv_heads * num_packed
    split = cdiv(num_packed, num_sequences) <= MAX_ROWS_TO_SPLIT
    num_splits = min(MAX_SPLITS, cdiv(num_keys, MIN_SPLIT)) if split else 1
    peaks = torch.empty((num_splits, num), dtype=torch.float32, device=k.device)
    totals = torch.empty_like(peaks) if split else peaks
    grid = cdiv(num_packed, tiles["BLOCK_ROWS"]) + num_sequences - 1, num_kv_heads, num_splits
    launch(
        kernels.row_norms, grid, packed, k, cu_rows, cu_keys, peaks, totals,
        num_rows, num_keys, num_sequences, packed.stride(1), packed.stride(0), *k.stride()[:2], scale * LOG2_E,
        device=k.device, SPLIT=split, LEAST=MIN_SPLIT, MOST=MAX_SPLITS, **tiles, **shared,
    )  # fmt: skip
    if not split:
        return peaks
    norms = torch.empty_like(peaks[0])
    launch(
        kernels.join_splits, (cdiv(num, JOINED),), peaks, totals, norms, num, num_splits,
        device=k.device, BLOCK=JOINED, MOST=MAX_SPLITS, num_warps=4,
    )  # fmt: skip
    return norms


def _tiles(dtype: torch.dtype, head_dim: int, num_rows: int, group: int, together: int) -> tuple[dict[str, int], dict[str, int]]:
    """Tile sizes and launch options of both passes, for about `num_rows` rows per sequence.

    Read off the code for sm_90, head dimension 128, not measured. First pass, 128 rows x 64 keys: 167 registers and 82 kB of shared
    memory, so two blocks per multiprocessor, each with two blocks of keys on the way while it reckons with a third. Second pass,
    128 keys x 64 rows: the same. Of 432 to 473 instructions per warp and tile 64 are exp2, which take 512 clocks, as long as the
    tensor cores take for the tile: the rest hides behind them. Fewer rows than a tile make the tile smaller, not emptier.
    """
    if dtype == torch.float32:  # no tensor cores: exact products in registers; larger tiles spill
        tile = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 2}
        return tile, dict(tile)
    limits = (128, 64) if head_dim <= 128 else (64, 32)
    first, second = (
        min(limit, max(16, next_power_of_2(num_rows * times))) for limit, times in zip(limits, (group, together), strict=True)
    )
    return (
        {"BLOCK_ROWS": first, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_ROWS": second, "BLOCK_KEYS": 128, "num_warps": 4, "num_stages": 3},
    )


def _shared(
    head_dim: int, group: int, together: int, causal: bool, num_sequences: int, upcast: bool = INTERPRETED
) -> dict[str, Any]:
    """What both passes are specialised for. A head dimension is a power of two and one more that covers the rest: 80 = 64 + 16,
    not 128, which would be 60 % more multiplications.
    """
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = max(16, next_power_of_2(head_dim - main)) if head_dim > main else 0
    return {
        "GROUP": group, "TOGETHER": together, "HEAD_DIM": head_dim, "MAIN": main, "REST": rest, "CAUSAL": causal,
        "PAD": next_power_of_2(num_sequences), "UPCAST": upcast,
    }  # fmt: skip


def _check(
    q: Tensor, k: Tensor, reduction: str, heads: str, scale: float,
    cu_rows: Tensor | None, cu_keys: Tensor | None, lse: Tensor | None,
) -> None:  # fmt: skip
    if reduction not in ("sum", "mean", "max") or heads not in ("each", "mean"):
        raise ValueError(f"reduction {reduction!r}, heads {heads!r}: legal are 'sum', 'mean', 'max' and 'each', 'mean'")
    check_heads(q, k, "k")
    if not scale > 0:
        raise ValueError(f"scale {scale}: must be above 0")
    if (cu_rows is None) != (cu_keys is None):
        raise ValueError("cu_rows and cu_keys: give both or neither")
    if cu_rows is not None and cu_keys is not None:
        if cu_rows.dtype != torch.int32 or cu_keys.dtype != torch.int32 or cu_rows.shape != cu_keys.shape or cu_rows.dim() != 1:
            raise ValueError(f"cu_rows {tuple(cu_rows.shape)}, cu_keys {tuple(cu_keys.shape)}: both must be int32 [B + 1]")
        if len(cu_rows) < 2:
            raise ValueError("cu_rows: an int32 [B + 1] of at least one sequence is needed")
    if lse is not None and (lse.dtype != torch.float32 or lse.shape != q.shape[:2]):
        raise ValueError(f"lse {lse.dtype} {tuple(lse.shape)}: must be float32 {tuple(q.shape[:2])}")


def _variants() -> list[Variant]:
    """As the engines launch it: a question's rows against a long prefix, a vision tower's segments, and exact fp32."""
    numbers = {name: "i32" for name in ("num_rows", "num_keys", "num_sequences")}
    strides = {name: "i32:16" for name in ("q_packed", "q_head", "k_row", "k_head")}
    variants = []
    for dtype, kind, head_dim, group, num_rows, causal, together, several in (
        (torch.bfloat16, "bf16", 128, 7, 32, True, 7, False),
        (torch.float16, "fp16", 128, 4, 8, True, 1, False),
        (torch.bfloat16, "bf16", 80, 1, 2048, False, 1, True),
        (torch.float32, "fp32", 128, 7, 32, True, 7, True),
    ):
        types = {"q": f"*{kind}:16", "k": f"*{kind}:16", **numbers, **strides, "scale_log2": "fp32"}
        types |= {"cu_rows": "*i32:16", "cu_keys": "*i32:16"} if several else {}
        shared = _shared(head_dim, group, together, causal, 64 if several else 1, upcast=False)
        shared |= {} if several else {"cu_rows": None, "cu_keys": None}
        first, second = _tiles(dtype, head_dim, num_rows, group, together)
        options = {name: first.pop(name) for name in ("num_warps", "num_stages")}
        split = {"SPLIT": num_rows * group <= MAX_ROWS_TO_SPLIT, "LEAST": MIN_SPLIT, "MOST": MAX_SPLITS}
        partial = {"peaks": "*fp32:16", "totals": "*fp32:16"}
        variants.append(Variant(kernels.row_norms, {**types, **partial}, {**shared, **split, **first}, options))
        options = {name: second.pop(name) for name in ("num_warps", "num_stages")}
        results = {"norms": "*fp32:16", "out": "*fp32:16"}
        variants.append(Variant(kernels.columns, {**types, **results}, {**shared, **second, "REDUCTION": "sum"}, options))
    joined = {"peaks": "*fp32:16", "totals": "*fp32:16", "norms": "*fp32:16", "num": "i32", "num_splits": "i32"}
    variants.append(Variant(kernels.join_splits, joined, {"BLOCK": JOINED, "MOST": MAX_SPLITS}, {"num_warps": 4}))
    return variants


VARIANTS = _variants()
