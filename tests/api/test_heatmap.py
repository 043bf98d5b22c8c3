"""The heat map, pixel by pixel where it matters: what is dark, what is tinted, what is left alone, what is shown."""

import os
import pickle
from functools import partial

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.api.canvas import PAPER, load_font, ramp, wrap
from sparsevila_cluster.api.frame_reader import read_frames_again, record_origin
from sparsevila_cluster.api.heatmap import MAX_COLUMNS, choose_moments, draw_conversation, draw_heatmap, save_picture, shade
from sparsevila_cluster.core.config import MediaLimits, build_config
from sparsevila_cluster.core.conversation import drawable
from sparsevila_cluster.core.errors import BadMedia, BadRequest
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import Answer, FinishReason, MediaSource, PrepareRequest, Usage
from sparsevila_cluster.media import Media
from tests.checkpoints.tiny_qwen2_5_vl import media as random_media

GREEN = (60, 160, 90)


def frames(num=4, height=64, width=64, color=GREEN):
    return np.full((num, height, width, 3), color, np.uint8)


def a_media(pictures, kind=None):
    """Media of these frames, one per second; one frame alone is an image."""
    times_s = np.arange(len(pictures), dtype=np.float64)
    return Media(pictures, times_s, kind or ("image" if len(pictures) == 1 else "video"), "hash", float(len(pictures)))


def look(frame=0, share=1.0, grid=(4, 4), cells=((0, 0, 0.8), (3, 3, 0.2)), kept=((0, 0), (1, 1), (3, 3)), media=0):
    return FrameEvidence(frame, float(frame), share, grid, tuple(cells), tuple(kept), media)


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
    return Evidence(tuple(look(frame, share, **options) for frame, share in enumerate(shares)))


def test_a_page_holds_frames_and_a_row_per_question():
    rows = [
        ("Where is the star?", "at the top left", evidence((0.1, 0.7, 0.2, 0.0))),
        ("And?", "", evidence((1, 0, 0, 0))),
    ]
    one, two = draw_heatmap([a_media(frames())], rows[:1]), draw_heatmap([a_media(frames())], rows)
    assert one.mode == "RGB" and one.width == two.width and two.height > one.height + 100
    pixels = np.asarray(two).reshape(-1, 3)
    assert (pixels == GREEN).all(1).sum() > 4 * 100 * 100  # the plain frames, enlarged
    assert tuple(pixels[0]) == PAPER
    dark = (np.asarray(one).max(2) < 70).sum()
    assert (np.asarray(two).max(2) < 70).sum() > 1.8 * dark


def test_small_frames_grow_and_large_ones_shrink():
    row = ("q", "a", evidence((0.5, 0.5)))
    small, large = (draw_heatmap([a_media(frames(2, size, size))], [row]) for size in (16, 2000))
    assert small.size == large.size


@pytest.mark.parametrize("shape", [(1, 50, 50), (1, 40, 400), (2, 400, 40), (40, 36, 64), (3, 8, 8)])
def test_any_shape_of_media_fits_the_page(shape):
    num = shape[0]
    image = draw_heatmap([a_media(frames(*shape))], [("q " * 200, "a" * 5000, evidence(np.ones(num) / num))])
    assert 600 <= image.width <= 1700 and image.height < 3000


def test_rows_without_evidence_are_text_only():
    image = draw_heatmap([a_media(frames(30))], [("What?", "nothing", Evidence())])
    assert (np.asarray(image) == GREEN).all(2).sum() > 1000


def test_the_most_looked_at_moments_are_chosen_in_order():
    shares = np.zeros(100)
    shares[[90, 7, 55]] = 0.5, 0.3, 0.2
    other = np.zeros(100)
    other[33] = 1.0
    chosen = choose_moments([shares, other], 100, 4)
    assert chosen == [7, 33, 55, 90]
    assert choose_moments([shares[:3]], 3, 4) == [0, 1, 2]
    blind = choose_moments([], 100)
    assert len(blind) == MAX_COLUMNS and blind[0] == 0 and blind[-1] == 99 and blind == sorted(blind)


def has(image, color):
    return (np.asarray(image) == color).all(2).sum() > 1000


BLUE, BROWN = (10, 20, 200), (120, 80, 40)


def test_a_group_is_shown_by_its_first_frame():
    pictures = frames(4)
    pictures[2:] = BLUE
    image = draw_heatmap([a_media(pictures)], [("q", "a", Evidence((look(0, 0.5), look(2, 0.5))))])
    assert has(image, GREEN) and has(image, BLUE)


def test_several_media_stand_side_by_side_in_their_own_shapes():
    medias = [a_media(frames(2)), a_media(frames(1, 40, 90, BLUE)), a_media(frames(3, 90, 40, BROWN))]
    pruned = {"cells": (), "kept": ()}  # dark everywhere: what has its colour is in the first row
    looks = [look(0, 0.2, **pruned), look(0, 0.3, media=1, **pruned), look(2, 0.5, media=2, **pruned)]
    pixels = np.asarray(draw_heatmap(medias, [("q", "a", Evidence(tuple(looks)))], ["a.mp4", "b.png", "c.mp4"]))
    for color, shape in ((GREEN, 1.0), (BLUE, 90 / 40), (BROWN, 40 / 90)):
        tile = (pixels == color).all(2)
        assert tile.any(0).sum() / tile.any(1).sum() == pytest.approx(shape, rel=0.03)
        assert tile.sum() == tile.any(0).sum() * tile.any(1).sum() > 5000


def test_frames_that_the_source_does_not_hold_any_more_are_an_error():
    for gone in (look(4), look(0, media=1)):
        with pytest.raises(BadMedia, match="does not hold"):
            draw_heatmap([a_media(frames(4))], [("q", "a", Evidence((gone,)))])


def test_views_of_one_frame_are_one_tile():
    base, tiles = (
        look(grid=(2, 2), share=0.5, cells=((0, 0, 0.5),), kept=((0, 0),)),
        look(grid=(4, 6), share=0.5, cells=(), kept=()),
    )
    one = draw_heatmap([a_media(frames(1))], [("q", "a", Evidence((base, tiles)))])
    assert one.size == draw_heatmap([a_media(frames(1))], [("q", "a", Evidence((base,)))]).size
    assert np.asarray(one).shape == np.asarray(draw_heatmap([a_media(frames(1))], [("q", "a", Evidence((tiles,)))])).shape


def test_long_text_is_wrapped_and_cut():
    font = load_font(16)
    lines = wrap("word " * 100, font, 300, 2)
    assert len(lines) == 2 and lines[1].endswith("...") and all(font.getlength(line) <= 300 for line in lines)
    assert wrap("short", font, 300, 2) == ["short"]
    assert wrap("x" * 500, font, 300, 2)[0].endswith("...")
    assert wrap("", font, 300, 2) == [""]
    assert font.getlength(wrap("y" * 100_000, font, 300, 2)[0]) <= 300


def test_the_picture_is_saved_or_the_reason_is_told(tmp_path):
    save_picture(Image.new("RGB", (64, 64), GREEN), tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (64, 64)
    with pytest.raises(BadRequest, match="missing"):
        save_picture(Image.new("RGB", (64, 64)), tmp_path / "missing" / "out.png")


# ---- frames, decoded again --------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "in.png"
    Image.new("RGB", (64, 64), GREEN).save(path)
    return path


def origin_of(*sources):
    return record_origin(PrepareRequest(tuple(MediaSource(source) for source in sources)), build_config(fps=1.5, max_frames=7))


def answer_about(source):
    return drawable(an_answer(), "Where?", partial(draw_conversation, origin_of(source)))


def an_answer():
    return Answer("here", (1,), FinishReason.STOP, Evidence((look(),)), Usage(16, 3, 2, 10, 1, 0.5))


def test_evidence_of_media_with_an_origin_shows_itself(picture, monkeypatch):
    monkeypatch.chdir(picture.parent)
    answer = answer_about("in.png")
    monkeypatch.chdir("/")  # a relative path is meant as it was when the media was prepared
    assert has(answer.evidence.show(), GREEN) and answer == an_answer()
    assert has(pickle.loads(pickle.dumps(answer)).evidence.show(), GREEN)
    assert has(answer.evidence[:1].show(), GREEN)
    from_bytes = answer_about(picture.read_bytes())
    picture.unlink()
    assert has(from_bytes.evidence.show(), GREEN)
    with pytest.raises(BadMedia, match="in.png"):
        answer.evidence.show()


def test_a_file_that_changed_is_told_from_the_one_that_was_prepared(picture):
    origin = origin_of(str(picture))
    assert len(read_frames_again(origin)) == 1
    stamp = os.stat(picture)
    os.utime(picture, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    with pytest.raises(BadMedia, match="changed since"):
        read_frames_again(origin)


def test_origin_keeps_the_sampling_of_the_request():
    config = build_config(fps=1.5, max_frames=7, max_bytes=1000)
    asked = record_origin(PrepareRequest((MediaSource(b"x"),), fps=3.0, max_frames=2), config)
    assert (asked.fps, asked.max_frames, asked.limits, asked.stamps) == (3.0, 2, config.limits, (None,))
    assert asked.limits != MediaLimits()
    left = record_origin(PrepareRequest((MediaSource("/no/such/file"),)), config)
    assert (left.fps, left.max_frames, left.stamps) == (1.5, 7, (None,))


def test_noisy_frames_of_odd_sizes_are_drawn():
    medias = [random_media(frames=5, height=91, width=53), random_media("image", height=30, width=171, seed=1)]
    looks = [look(frame, 0.25, grid=(4, 5)) for frame in (0, 2, 4)] + [look(0, 0.25, grid=(7, 2), cells=(), kept=(), media=1)]
    assert draw_heatmap(medias, [("q", "a", Evidence(tuple(looks)))]).width >= 900
