"""From prompt ids with one placeholder per run of visual tokens to the unpruned media prefix, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparsevila_cluster.models.adapter import PromptPlan, VisualInputs


def split_runs(
    ids: Sequence[int], inputs: Sequence[VisualInputs], visual_ids: Sequence[int]
) -> Iterator[tuple[list[int], tuple[int, int, int] | None]]:
    """Pieces of a prompt: text ids and the run behind them (index of the media, index of its run, placeholder), None at the end."""
    runs = iter([(m, r) for m, media in enumerate(inputs) for r in range(len(media.runs))])
    text: list[int] = []
    for token in ids:
        if token not in visual_ids:
            text.append(token)
            continue
        place = next(runs, None)
        assert place is not None, f"placeholder {token} has no media"
        yield text, (*place, token)
        text = []
    yield text, None
    assert next(runs, None) is None, "a media has no placeholder"


def expand(ids: Sequence[int], inputs: Sequence[VisualInputs], visual_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """ids i64 [T] with every run expanded, and visual_mask bool [T]."""
    tokens, visual = [], []
    for text, place in split_runs(ids, inputs, visual_ids):
        tokens.append(torch.tensor(text, dtype=torch.int64))
        visual.append(torch.zeros(len(text), dtype=torch.bool))
        if place is not None:
            media, run, placeholder = place
            num = inputs[media].runs[run]
            tokens.append(torch.full((num,), placeholder))
            visual.append(torch.ones(num, dtype=torch.bool))
    return torch.cat(tokens), torch.cat(visual)


def linear_plan(ids: Sequence[int], inputs: Sequence[VisualInputs], visual_ids: Sequence[int]) -> PromptPlan:
    """The plan of a model that counts every token once: positions [1, T] are 0, 1, 2, ..."""
    tokens, visual = expand(ids, inputs, visual_ids)
    return PromptPlan(tokens, visual, torch.arange(len(tokens))[None], len(tokens))


def join_places(inputs: Sequence[VisualInputs], device: torch.device) -> tuple[Tensor, Tensor]:
    """group i32 [N], counted over all media, and cell i32 [N, 2] of every visual token of a prompt."""
    groups, first = [], 0
    for media in inputs:
        groups.append(media.group + first)
        first += len(media.grids)
    return torch.cat(groups).to(device), torch.cat([media.cell for media in inputs]).to(device)


def grid_places(grids: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """group i32 [N] and cell i32 [N, 2] of groups that lie one after the other, each row by row."""
    sizes = torch.tensor([rows * cols for rows, cols in grids])
    group = torch.arange(len(grids), dtype=torch.int32).repeat_interleave(sizes)
    return group, torch.cat([torch.cartesian_prod(torch.arange(r), torch.arange(c)).view(-1, 2) for r, c in grids]).int()
