"""The heat map, pixel by pixel where it matters: what is dark, what is tinted, what is left alone, what is shown."""

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster import heatmap
from sparsevila_cluster.config import build_config
from sparsevila_cluster.errors import BadRequest
from sparsevila_cluster.heatmap import MAX_COLUMNS, PAPER, choose_moments, draw_heatmap, ramp, save_heatmap, shade, wrap
from sparsevila_cluster.request import Answer, FinishReason, FrameEvidence, Usage

GREEN = (60, 160, 90)


def frames(num=4, height=64, width=64, color=GREEN):
    return np.full((num, height, width, 3), color, np.uint8)


def look(frame=0, share=1.0, grid=(4, 4), cells=((0, 0, 0.8), (3, 3, 0.2)), kept=((0, 0), (1, 1), (3, 3))):
    return FrameEvidence(frame, float(frame), share, grid, tuple(cells), tuple(kept))


def cell(picture, row, col, grid=(4, 4)):
    """Mean colour of the middle of a cell."""
    height, width = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    top, left = row * height + height // 3, col * width + width // 3
    return picture[top : top + height // 3, left : left + width // 3].reshape(-1, 3).mean(0)


def test_cells_tell_what_happened_to_them():
    picture = shade(frames(1)[0], look(), most=0.8)
    pruned, kept = cell(picture, 2, 2), cell(picture, 1, 1)
    strong, weak = cell(picture, 0, 0), cell(picture, 3, 3)
    assert pruned.max() < 0.5 * min(GREEN[1], 255) and np.ptp(pruned) <= 1  # dark and grey
    assert kept == pytest.approx(GREEN)
    assert weak[0] > kept[0] + 20 and weak[1] > kept[1] - 5  # yellow on top of green
    assert strong[0] > kept[0] + 20 and strong[1] < weak[1] - 30  # red on top of green
    edge = picture[0, 5]
    assert edge == pytest.approx(ramp(1.0), abs=1)  # framed in the full colour


def test_without_scores_retrieved_cells_still_show():
    picture = shade(frames(1)[0], look(share=0.0, cells=((1, 1, 0.0),)), most=0.0)
    assert cell(picture, 1, 1)[0] > GREEN[0] + 20


@pytest.mark.parametrize("grid", [(3, 5), (7, 3), (64, 64), (1, 1)])
def test_cells_map_proportionally_to_any_frame(grid):
    last = (grid[0] - 1, grid[1] - 1)
    picture = shade(frames(1, 100, 130)[0], look(grid=grid, cells=((*last, 1.0),), kept=(last,)), most=1.0)
    assert picture[-1, -1] == pytest.approx(ramp(1.0), abs=1)
    assert grid == (1, 1) or np.ptp(picture[0, 0].astype(int)) <= 1


def test_the_ramp_goes_from_yellow_to_dark_red():
    levels = ramp(np.linspace(0, 1, 50))
    assert levels[0, 1] > 200 and levels[-1, 1] < 20
    brightness = levels @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(brightness) < 0).all()  # darker all the way: it survives a black and white printer
    assert ramp(-1) == pytest.approx(ramp(0)) and ramp(2) == pytest.approx(ramp(1))


def evidence(shares, **options):
    return tuple(look(frame, share, **options) for frame, share in enumerate(shares))


def test_a_page_holds_frames_and_a_row_per_question():
    rows = [
        ("Where is the star?", "at the top left", evidence((0.1, 0.7, 0.2, 0.0))),
        ("And?", "", evidence((1, 0, 0, 0))),
    ]
    one, two = draw_heatmap(frames(), [0.0, 1.0, 2.0, 3.0], rows[:1]), draw_heatmap(frames(), [0, 1, 2, 3], rows)
    assert one.mode == "RGB" and one.width == two.width and two.height > one.height + 100
    pixels = np.asarray(two).reshape(-1, 3)
    assert (pixels == GREEN).all(1).sum() > 4 * 100 * 100  # the plain frames, enlarged
    assert tuple(pixels[0]) == PAPER
    dark = (np.asarray(one).max(2) < 70).sum()
    assert (np.asarray(two).max(2) < 70).sum() > 1.8 * dark


def test_small_frames_grow_and_large_ones_shrink():
    small, large = (
        draw_heatmap(frames(2, size, size), [0, 1], [("q", "a", evidence((0.5, 0.5)))]) for size in (16, 2000)
    )
    assert small.size == large.size


@pytest.mark.parametrize("shape", [(1, 50, 50), (1, 40, 400), (2, 400, 40), (40, 36, 64), (3, 8, 8)])
def test_any_shape_of_media_fits_the_page(shape):
    num = shape[0]
    image = draw_heatmap(frames(*shape), np.arange(num), [("q " * 200, "a" * 5000, evidence(np.ones(num) / num))])
    assert 600 <= image.width <= 1700 and image.height < 3000


def test_rows_without_evidence_are_text_only():
    image = draw_heatmap(frames(30), np.arange(30), [("What?", "nothing", ())])
    assert (np.asarray(image) == GREEN).all(2).sum() > 1000


def test_the_most_looked_at_moments_are_chosen_in_order():
    shares = np.zeros(100)
    shares[[90, 7, 55]] = 0.5, 0.3, 0.2
    other = np.zeros(100)
    other[33] = 1.0
    chosen = choose_moments([evidence(shares), evidence(other)], 100, 4)
    assert chosen == [7, 33, 55, 90]
    assert choose_moments([evidence(shares[:3])], 3, 4) == [0, 1, 2]
    blind = choose_moments([()], 100)
    assert len(blind) == MAX_COLUMNS and blind[0] == 0 and blind[-1] == 99 and blind == sorted(blind)


def test_a_group_is_shown_by_its_first_frame():
    pictures = frames(4)
    pictures[2:] = (10, 20, 200)
    looks = (look(0, 0.5), look(2, 0.5))
    image = np.asarray(draw_heatmap(pictures, [0, 1, 2, 3], [("q", "a", looks)]))
    assert (image == GREEN).all(2).sum() > 1000 and (image == (10, 20, 200)).all(2).sum() > 1000


def test_views_of_one_picture_are_shown_side_by_side():
    """A tiled picture is two groups of one frame: its coarse and its fine view."""
    coarse, fine = look(grid=(2, 2), share=0.3, cells=((0, 0, 0.3),), kept=((0, 0),)), look(grid=(4, 8), share=0.7)
    evidence = (coarse, fine)
    assert heatmap._labels([0, 1], [0, 0], [0.0], [(), evidence]) == ["2 x 2 patches", "4 x 8 patches"]
    both = draw_heatmap(frames(1, 60, 90), [0.0], [("what?", "a star", evidence)])
    assert both.width >= draw_heatmap(frames(1, 60, 90), [0.0], [("what?", "a star", (coarse,))]).width
    assert "coarsely and as finely" in heatmap._caption(2, 2, 1) and "coarsely" not in heatmap._caption(1, 1, 1)


def test_long_text_is_wrapped_and_cut():
    font = heatmap._font(16)
    lines = wrap("word " * 100, font, 300, 2)
    assert len(lines) == 2 and lines[1].endswith("...") and all(font.getlength(line) <= 300 for line in lines)
    assert wrap("short", font, 300, 2) == ["short"]
    assert wrap("x" * 500, font, 300, 2)[0].endswith("...")
    assert wrap("", font, 300, 2) == [""]
    assert font.getlength(wrap("y" * 100_000, font, 300, 2)[0]) <= 300


def test_the_picture_is_saved_or_the_reason_is_told(tmp_path):
    source = tmp_path / "in.png"
    Image.new("RGB", (64, 64), GREEN).save(source)
    usage = Usage(16, 3, 2, 10, 1, 0.5)
    turns = [("Where?", Answer("here", (1,), FinishReason.STOP, (look(),), usage))]
    save_heatmap(tmp_path / "out.png", source, build_config(), turns)
    saved = np.asarray(Image.open(tmp_path / "out.png"))
    assert (saved == GREEN).all(2).sum() > 1000
    with pytest.raises(BadRequest, match="missing"):
        save_heatmap(tmp_path / "missing" / "out.png", source, build_config(), turns)
