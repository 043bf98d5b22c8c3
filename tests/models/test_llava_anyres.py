"""Tiles of pictures: sizes, cuts, order and places against transformers' own functions and against plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel, unpad_image

from sparsevila_cluster.models.families.anyres import (
    assemble,
    best_resolution,
    cells_of,
    cells_of_square,
    cut_tiles,
    fitted_size,
    halve,
    newline_of,
    pack,
    pad_square,
    tiled_view,
)

PUBLISHED = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def random_case(seed):
    """(size, canvases, tile, cells along a tile, max_tiles)."""
    rng = np.random.default_rng(seed)
    canvases, tile, side = (PUBLISHED, 384, 5) if seed % 2 else (NEXT, 336, 4)
    longest = int(rng.choice([40, 400, 2000]))
    size = int(rng.integers(1, longest)), int(rng.integers(1, longest))
    return size, canvases, tile, side, int(rng.integers(1, 12)) if seed % 2 else None


@pytest.mark.parametrize("seed", range(60))
def test_sizes_equal_transformers(seed):
    size, canvases, *_ = random_case(seed)
    canvas = best_resolution(size, canvases)
    assert tuple(canvas) == select_best_resolution(size, canvases)
    picture = np.zeros((3, *size), np.uint8)
    assert fitted_size(size, canvas) == get_patch_output_size(picture, canvas, ChannelDimension.FIRST)


@pytest.mark.parametrize("seed", range(60))
def test_packing_equals_transformers(seed):
    size, canvases, tile, side, max_tiles = random_case(seed)
    canvas = best_resolution(size, canvases)
    view = tiled_view(size, canvas, tile, side, max_tiles)
    rows, cols = view.tiles
    crops, newline = torch.randn(1 + rows * cols, side * side, 6), torch.randn(6)
    vision = SimpleNamespace(image_size=tile, patch_size=tile // side)
    stock = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=canvases))
    if max_tiles is None:
        (want,), _ = LlavaNextModel.pack_image_features(stock, [crops], [size], "default", newline)
    else:
        (want,), _ = LlavaOnevisionModel.pack_image_features(stock, [crops], [size], newline, f"anyres_max_{max_tiles}")
    got = pack(crops[0], assemble(crops[1:], view), newline)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    # Unpadded and unshrunk, the window is a plain cut.
    numbers = torch.arange(rows * side * cols * side).view(1, rows * side, cols * side)
    seen = numbers[:, view.top : view.top + view.window[0], view.left : view.left + view.window[1]]
    assert torch.equal(seen, unpad_image(numbers, size))
    places = pack(cells_of((side, side), 0).flatten(0, 1), cells_of(view.grid, 1), newline_of(1))
    expected = [(0, r, c) for r in range(side) for c in range(side)]
    for r in range(view.grid[0]):
        expected += [(1, r, c) for c in range(view.grid[1])] + [(1, -1, -1)]
    assert places.tolist() == [list(place) for place in expected]


def test_shrinking_happens_and_stops():
    """One and the same picture with ever fewer cells to spend."""
    cells = []
    for most in (9, 6, 4, 2, 1):
        view = tiled_view((1500, 1500), (1920, 1920), 384, 27, most)
        cells.append(view.grid[0] * view.grid[1])
        assert cells[-1] <= most * 27**2 * 1.1**2
    assert cells == sorted(cells, reverse=True) and len(set(cells)) == 5
    assert tiled_view((1500, 1500), (1920, 1920), 384, 27, 25).grid == (135, 135)


def test_tiles_are_cut_row_by_row_from_a_black_canvas():
    picture = torch.full((3, 40, 20), 7, dtype=torch.uint8)
    picture[:, 0] = 200
    tiles = cut_tiles(picture, (40, 40), 20, 3)
    canvas = torch.zeros(3, 40, 40, dtype=torch.uint8)
    canvas[:, :, 10:30] = picture
    expected = [canvas[:, y : y + 20, x : x + 20] for y in (0, 20) for x in (0, 20)]
    assert torch.equal(tiles, torch.stack(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 20), (7, 100), (100, 99), (99, 100)])
@pytest.mark.parametrize("side", [1, 4, 5, 27])
def test_cells_of_a_padded_square_lie_where_the_picture_is(size, side):
    height, width = size
    cells, (rows, cols) = cells_of_square(size, side)
    square = pad_square(torch.ones(3, *size, dtype=torch.uint8), (0, 0, 0))
    assert square.shape[1] == square.shape[2] == max(size) and int(square[0].sum()) == height * width
    corner, longest = square[0].nonzero()[0].tolist(), max(size)
    # In units of 1 / side pixels: cell i is [i * longest, (i + 1) * longest), the picture [start * side, (start + length) * side).
    touched = [
        [i for i in range(side) if i * longest < (start + length) * side and (i + 1) * longest > start * side]
        for start, length in zip(corner, size, strict=True)
    ]
    assert (len(touched[0]), len(touched[1])) == (rows, cols)
    first = [axis[0] for axis in touched]
    for r in range(side):
        for c in range(side):
            nearest = min(max(r - first[0], 0), rows - 1), min(max(c - first[1], 0), cols - 1)
            assert cells[r, c].tolist() == [0, *nearest]


@pytest.mark.parametrize("side", [1, 4, 5, 27])
def test_halving_equals_transformers(side):
    frames = torch.randn(3, side * side, 6)
    stock = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(image_size=side, patch_size=1)))
    torch.testing.assert_close(halve(frames, side), LlavaOnevisionModel.apply_pooling(stock, frames))
