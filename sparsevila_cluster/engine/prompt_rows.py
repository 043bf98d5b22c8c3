"""Which rows of the unpruned prompt stay, at which positions, and in which chunks they are prefilled."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevila_cluster.models.adapter import PromptPlan, VisualInputs, VisualTokens
from sparsevila_cluster.pruning.pruning_method import PruningInput, PruningMethod


def keep_of_each(methods: list[PruningMethod], inputs: list[VisualInputs], tokens: VisualTokens) -> Tensor:
    """Indices i64 [K] of the visual tokens that stay, ascending: each media is cut by its own method."""
    kept, start, first_group = [], 0, 0
    for method, media in zip(methods, inputs, strict=True):
        rows = slice(start, start + media.num_tokens)
        given = PruningInput(
            embeddings=tokens.embeds[rows],
            salience=tokens.salience[rows],
            groups=tokens.group[rows] - first_group,
            cells=tokens.cell[rows],
            grids=media.grids,
            kind=media.kind,
            taps=None if tokens.taps is None else tokens.taps[rows],
        )
        kept.append(start + method.keep(given))
        start, first_group = rows.stop, first_group + len(media.grids)
    return torch.cat(kept)


def chunk_bounds(num_rows: int, most: int) -> list[int]:
    """Where chunks of nearly equal length, none above `most` rows, begin and end: [0, ..., num_rows]."""
    num = -(-num_rows // most)
    return [num_rows * i // num for i in range(num + 1)]


def kept_prompt_rows(plan: PromptPlan, keep: Tensor) -> Tensor:
    """Rows of the unpruned prompt that stay: all text, and visual tokens `keep` (ascending). i64, ascending."""
    stays = ~plan.visual_mask
    stays[plan.visual_mask.nonzero()[:, 0][keep]] = True
    return stays.nonzero()[:, 0]


def close_gaps(positions: Tensor, is_visual: Tensor) -> tuple[Tensor, int]:
    """Positions [R, n] closed up after pruning, and the next free one.

    Each run of visual tokens gets its minimal grid (the distinct values of every row of positions, renumbered without gaps); the
    text after it goes on at the largest position plus one.
    """
    closed = torch.empty_like(positions)
    bounds = (is_visual[1:] != is_visual[:-1]).nonzero()[:, 0].add(1).tolist()
    offset = 0
    for start, stop in zip([0, *bounds], [*bounds, len(is_visual)], strict=True):
        run = positions[:, start:stop]
        if is_visual[start]:
            closed[:, start:stop] = offset + torch.stack([row.unique(return_inverse=True)[1] for row in run])
        else:
            closed[:, start:stop] = offset + torch.arange(stop - start, device=run.device)
        offset = int(closed[:, start:stop].max()) + 1
    return closed, offset
