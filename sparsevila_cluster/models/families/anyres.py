"""Pictures of any resolution in tiles of one size: which tiles, which of their cells are picture, and in what order cells stand.

base view: the whole picture squashed into one tile           | tiled view: the picture fitted into a canvas of tiles
a b          <- side x side cells                             | . . . . . . . .      <- padding: cut off again
c d                                                           | e f g h i j k l NEWLINE
                                                              | m n o p q r s t NEWLINE
visual tokens: a b c d, e ... l NEWLINE, m ... t NEWLINE      | . . . . . . . .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsevila_cluster.models.preprocess import resize

Size = tuple[int, int]
"""(height, width) or (rows, cols)."""

# Above this many times the tiles' budget of cells a view is shrunk.
_SLACK = 1.1


@dataclass(frozen=True)
class TiledView:
    """The tiled view of one picture. tiles: Size in tiles; side: cells along a tile; top, left, window: where the picture is on the
    canvas, in cells; grid: the cells that are left after shrinking (the window itself if it is small enough).
    """

    tiles: Size
    side: int
    top: int
    left: int
    window: Size
    grid: Size


def best_resolution(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows a picture of `size` (height, width) largest, and of those the one that wastes least."""

    def worth(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(canvases, key=worth)


def fitted_size(size: Size, canvas: Size) -> Size:
    """`size` scaled to fill the canvas in one direction, its aspect ratio kept, rounded up."""
    wide, high = canvas[1] / size[1], canvas[0] / size[0]
    if wide < high:
        return min(math.ceil(size[0] * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * high), canvas[1])


def cut_tiles(picture: Tensor, canvas: Size, side: int, resample: int) -> Tensor:
    """u8 [3, h, w] fitted into the middle of a black canvas of (height, width) pixels, cut row by row: u8 [n, 3, side, side]."""
    height, width = fitted_size((picture.shape[1], picture.shape[2]), canvas)
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    full = picture.new_zeros(3, *canvas)
    full[:, top : top + height, left : left + width] = resize(picture[None], height, width, resample)[0]
    rows, cols = canvas[0] // side, canvas[1] // side
    return full.view(3, rows, side, cols, side).permute(1, 3, 0, 2, 4).reshape(rows * cols, 3, side, side)


def pad_square(picture: Tensor, colour: Sequence[int]) -> Tensor:
    """u8 [3, h, w] in the middle of a square of one colour: u8 [3, s, s]."""
    height, width = picture.shape[1:]
    longest = max(height, width)
    top, left = (longest - height) // 2, (longest - width) // 2
    square = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).repeat(1, longest, longest)
    square[:, top : top + height, left : left + width] = picture
    return square


def tiled_view(size: Size, canvas: Size, tile: int, side: int, max_tiles: int | None) -> TiledView:
    """The tiled view of a picture of `size` pixels on a canvas cut into tiles of `tile` pixels and `side` x `side` cells.

    max_tiles: a view of more cells than so many tiles hold is shrunk to about as many; None: never.
    """
    tiles = canvas[0] // tile, canvas[1] // tile
    rows, cols = tiles[0] * side, tiles[1] * side
    top = left = 0
    # Rounded and cut as the reference does, in cells and not in pixels: its padding is not exactly the pixels' padding.
    if size[1] / size[0] > cols / rows:
        top = (rows - int(round(size[0] * (cols / size[1]), 7))) // 2
    else:
        left = (cols - int(round(size[1] * (rows / size[0]), 7))) // 2
    window = grid = rows - 2 * top, cols - 2 * left
    if max_tiles is not None:
        ratio = math.sqrt(window[0] * window[1] / (max_tiles * side**2))
        if ratio > _SLACK:
            grid = int(window[0] // ratio), int(window[1] // ratio)
    return TiledView(tiles, side, top, left, window, grid)


def assemble(cells: Tensor, view: TiledView) -> Tensor:
    """Tiles' cells [n, side * side, C], tile by tile, to the view's [rows, cols, C]: joined, unpadded, shrunk."""
    (rows, cols), side = view.tiles, view.side
    canvas = cells.view(rows, cols, side, side, -1).permute(4, 0, 2, 1, 3).reshape(-1, rows * side, cols * side)
    seen = canvas[:, view.top : view.top + view.window[0], view.left : view.left + view.window[1]]
    if view.grid != view.window:
        seen = F.interpolate(seen[None], view.grid, mode="bilinear")[0]
    return seen.permute(1, 2, 0)


def halve(cells: Tensor, side: int) -> Tensor:
    """[B, side * side, C] -> [B, half * half, C] with half = `halved(side)`, bilinear."""
    half = halved(side)
    square = cells.view(len(cells), side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (half, half), mode="bilinear").flatten(2).transpose(1, 2)


def halved(side: int) -> int:
    """Half of `side`, rounded up."""
    return math.ceil(side / 2)


def pack(base: Tensor, view: Tensor | None, newline: Tensor) -> Tensor:
    """In prompt order: base cells [n, C], then each row of a view [rows, cols, C] with a newline [C] at its end; without a view one
    newline ends the base: [N, C].
    """
    if view is None:
        return torch.cat((base, newline[None]))
    ends = newline.expand(view.shape[0], 1, -1)
    return torch.cat((base, torch.cat((view, ends), 1).flatten(0, 1)))


def cells_of(grid: Size, group: int) -> Tensor:
    """Places i32 [rows, cols, 3] = (group, row, col)."""
    rows, cols = grid
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack((torch.full(grid, group), row, col), -1).int()


def cells_of_square(size: Size, side: int) -> tuple[Tensor, Size]:
    """Places i32 [side, side, 3] of a picture of `size` pixels padded to a square, and the grid that covers the picture.

    Cells of the padding are counted to the nearest cell of the picture, so that the grid needs no padding.
    """
    longest, spans = max(size), []
    for length in size:
        first = (longest - length) // 2
        spans.append((first * side // longest, -(-(first + length) * side // longest)))
    row, col = (torch.arange(side).clamp(a, b - 1) - a for a, b in spans)
    (top, bottom), (left, right) = spans
    cells = torch.stack(torch.meshgrid(row, col, indexing="ij"), -1)
    return F.pad(cells, (1, 0)).int(), (bottom - top, right - left)


def newline_of(group: int) -> Tensor:
    """The place i32 [3] of a newline that ends a row of `group`: no cell."""
    return torch.tensor([group, -1, -1], dtype=torch.int32)
