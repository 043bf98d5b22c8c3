"""Where a turn looked: retrieval scores mapped back to frames, rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.kvcache.prefix import MediaPrefix


def build_evidence(prefix: MediaPrefix, scores: Tensor, chosen: Tensor | None) -> Evidence:
    """Shares of the retrieved visual attention by token, gathered by frame.

    scores f32 [L, n] over the prefix's visual rows; chosen i64 [L, k], or None for all. In each layer the retrieved scores are
    scaled to sum to 1, and the mean over layers is a token's share: all shares of a turn sum to 1.
    """
    if chosen is None:
        chosen = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    kept = scores.gather(1, chosen).double()
    kept = kept / kept.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    share = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
    share.index_add_(0, chosen.flatten(), (kept / len(scores)).flatten())
    retrieved = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    retrieved[chosen.flatten()] = True
    known = prefix.metadata
    cells: list[list[tuple[int, int, float]]] = [[] for _ in known.grids]
    survivors: list[list[tuple[int, int]]] = [[] for _ in known.grids]
    token_map = known.token_map[prefix.visual_index].tolist()
    for (group, row, col), part, was_retrieved in zip(token_map, share.tolist(), retrieved.tolist(), strict=True):
        survivors[group].append((row, col))
        if was_retrieved:
            cells[group].append((row, col, part))
    return Evidence(
        tuple(
            FrameEvidence(
                frame=known.frames[g],
                time_s=known.times_s[g],
                share=sum(part for _, _, part in cells[g]),
                grid=known.grids[g],
                cells=tuple(cells[g]),
                kept=tuple(survivors[g]),
                media=known.media[g],
            )
            for g in range(len(known.grids))
        )
    )
