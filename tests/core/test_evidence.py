"""Evidence as data and how values show themselves: views laid over each other, against sums over a fine raster; short texts."""

import pickle
from html.parser import HTMLParser
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from sparsevila_cluster.core.errors import BadRequest, NotFound
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence, merge_views
from sparsevila_cluster.core.requests import Answer, FinishReason, MediaHandle, Usage


def look(frame=0, share=1.0, grid=(2, 2), cells=(), kept=(), media=0, time_s=None):
    return FrameEvidence(frame, frame / 2 if time_s is None else time_s, share, grid, tuple(cells), tuple(kept), media)


def a_view(rng, grid):
    """A view with random cells kept, some of them retrieved."""
    rows, cols = grid
    kept = [(int(i) // cols, int(i) % cols) for i in rng.permutation(rows * cols)[: rng.integers(1, rows * cols + 1)]]
    cells = [(row, col, float(rng.random())) for row, col in kept[: rng.integers(0, len(kept) + 1)]]
    return look(share=sum(share for _, _, share in cells), grid=grid, cells=cells, kept=kept)


# ---- a sequence -------------------------------------------------------------------------------------------------------------


def test_evidence_is_the_sequence_of_its_frames():
    frames = tuple(look(i, 0.25, cells=((0, 0, 0.25),)) for i in range(4))
    evidence = Evidence(frames)
    assert len(evidence) == 4 and list(evidence) == list(frames) and evidence[1] is frames[1] and evidence[-1] is frames[3]
    assert evidence == frames == evidence and hash(evidence) == hash(frames) and frames[2] in evidence
    assert evidence != frames[:3] and evidence != list(frames) and evidence == Evidence(list(frames))
    assert isinstance(evidence[1:], Evidence) and evidence[1:] == frames[1:] and list(reversed(evidence))[0] is frames[3]
    assert evidence and not Evidence() and Evidence() == ()
    assert pickle.loads(pickle.dumps(evidence)) == evidence
    with pytest.raises(AttributeError):
        evidence.frames = ()
    with pytest.raises(IndexError):
        evidence[4]


def test_evidence_is_drawn_by_whoever_has_the_frames():
    drawn = []
    evidence = Evidence((look(0), look(1))).drawn_by(drawn.append)
    evidence.show()
    evidence[1:].show()
    assert drawn == [evidence, evidence[1:]] and evidence == Evidence((look(0), look(1)))
    with pytest.raises(NotFound, match="VideoQA"):
        Evidence((look(),)).show()
    with pytest.raises(BadRequest, match="evidence=True"):
        Evidence().drawn_by(drawn.append).show()


# ---- views of one picture ---------------------------------------------------------------------------------------------------


def raster(one, side):
    """(share, kept, retrieved) per point of a fine raster: by looking up the cell that each point lies in."""
    share, kept, retrieved = (np.zeros((side, side)) for _ in range(3))
    rows = np.arange(side) * one.grid[0] // side
    cols = np.arange(side) * one.grid[1] // side
    for row, col in one.kept:
        kept[np.ix_(rows == row, cols == col)] = 1
    for row, col, part in one.cells:
        inside = np.ix_(rows == row, cols == col)
        share[inside] += part / share[inside].size
        retrieved[inside] = 1
    return share, kept, retrieved


@pytest.mark.parametrize("seed", range(8))
def test_views_of_nested_grids_lie_exactly_over_each_other(seed):
    rng = np.random.default_rng(seed)
    coarse = tuple(int(n) for n in rng.integers(1, 4, 2))
    fine = tuple(int(n * k) for n, k in zip(coarse, rng.integers(1, 4, 2), strict=True))
    views = [a_view(rng, coarse), a_view(rng, fine), a_view(rng, coarse)]
    merged = merge_views(views)
    side = 6 * 36
    wanted = [raster(view, side) for view in views]
    share, kept, retrieved = raster(merged, side)
    assert merged.grid == fine and share == pytest.approx(sum(one[0] for one in wanted))
    assert (kept == np.maximum.reduce([one[1] for one in wanted])).all()
    assert (retrieved == np.maximum.reduce([one[2] for one in wanted])).all()


@pytest.mark.parametrize("seed", range(8))
def test_views_of_any_grids_keep_the_sum_and_every_trace(seed):
    rng = np.random.default_rng(100 + seed)
    views = [a_view(rng, tuple(int(n) for n in rng.integers(1, 14, 2))) for _ in range(3)]
    merged = merge_views(views)
    assert merged.grid == tuple(max(view.grid[i] for view in views) for i in (0, 1))
    total = sum(view.share for view in views)
    assert merged.share == pytest.approx(total) and sum(share for _, _, share in merged.cells) == pytest.approx(total)
    assert {(row, col) for row, col, _ in merged.cells} <= set(merged.kept)
    for view in views:  # every cell of every view has left a mark on a fine cell that it overlaps
        for row, col in view.kept:
            assert any(
                r * view.grid[0] < (row + 1) * merged.grid[0]
                and (r + 1) * view.grid[0] > row * merged.grid[0]
                and c * view.grid[1] < (col + 1) * merged.grid[1]
                and (c + 1) * view.grid[1] > col * merged.grid[1]
                for r, c in merged.kept
            )


def test_frames_of_several_media_and_views_are_counted_once_each():
    evidence = Evidence((look(0, 0.1), look(0, 0.2, grid=(4, 4)), look(2, 0.25), look(0, 0.45, media=1), look(4, 0.0)))
    assert [(one.media, one.frame, one.share) for one in evidence.by_frame()] == [
        (0, 0, pytest.approx(0.3)), (0, 2, 0.25), (1, 0, 0.45), (0, 4, 0.0),
    ]  # fmt: skip
    assert [(one.media, one.frame) for one in evidence.top()] == [(1, 0), (0, 0), (0, 2)]
    assert [(one.media, one.frame) for one in evidence.top(1)] == [(1, 0)]
    single = look(3)
    assert merge_views([single]) is single


def test_places_in_words():
    video = Evidence((look(0, 0.1), look(6, 0.6), look(8, 0.3), look(10, 0.0)))
    assert video.places() == "3.0 s (60%), 4.0 s (30%), 0.0 s (10%)" and video.places(num=1) == "3.0 s (60%)"
    assert Evidence((look(),)).places() == "" == Evidence().places()
    mixed = Evidence((look(0, 0.1), look(6, 0.5), look(0, 0.4, media=1)))
    assert mixed.places() == "media 0 at 3.0 s (50%), media 1 (40%), media 0 at 0.0 s (10%)"
    assert mixed.places(2, ["a.mp4", "b.png"]) == "a.mp4 at 3.0 s (50%), b.png (40%)"


# ---- how values show themselves ---------------------------------------------------------------------------------------------

CELLS = tuple((row, col, 1 / 400) for row in range(20) for col in range(20))
HANDLE = MediaHandle("a" * 64, "video", 64, 32.0, 4096, 1024, 1040, 12_600_000, 50_000_000, ms={"decode": 10.0})


def an_answer(text="a red star"):
    evidence = Evidence(tuple(look(i, 1 / 64, (20, 20), CELLS, [(r, c) for r, c, _ in CELLS]) for i in range(64)))
    usage = Usage(4096, 1024, 102, 1050, 4, 0.1, ms={"ttft": 5.0, "total": 12.5})
    return Answer(text, (1, 2, 3, 4), FinishReason.STOP, evidence, usage)


@pytest.mark.parametrize("value", [an_answer(), an_answer().evidence, an_answer().evidence[0], an_answer().usage, HANDLE], ids=type)
def test_a_value_shows_itself_in_little_room(value):
    assert len(repr(value)) < 400 and "\n" not in repr(value) and repr(value).startswith(type(value).__name__ + "(")
    screen = StringIO()
    Console(file=screen, width=100, color_system=None).print(value)
    assert screen.getvalue().startswith(type(value).__name__) and screen.getvalue().count("\n") < 16
    parser = Tags()
    parser.feed(value._repr_html_())
    assert not parser.open and len(value._repr_html_()) < 4000


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_what_an_answer_says_about_itself():
    answer = an_answer()
    assert "'a red star'" in repr(answer) and "num_tokens=4" in repr(answer) and "total_ms=12.5" in repr(answer)
    assert "0.0 s (2%)" in repr(answer) and "num_frames=64" in repr(answer.evidence)
    assert len(repr(an_answer("word " * 500))) < 400
    parser = Tags()
    parser.feed(an_answer("<b>&amp; more" + "x" * 200)._repr_html_())
    assert "<b>&amp; more" in parser.text and "x" * 200 in parser.text  # the text is escaped, and whole


def test_defaults_and_hidden_fields_are_not_shown():
    assert "reused" not in repr(HANDLE) and "origin" not in repr(HANDLE) and "degraded" not in repr(an_answer().usage)
    assert "kv_bytes=12600000" in repr(HANDLE) and "decode" in repr(HANDLE)
    shown = dict(HANDLE.__rich_repr__())
    assert shown["num_frames"] == 64 and "reused" not in shown
