"""A picture of where each question looked: the sampled frames, what pruning left of them, and the retrieved patches.

Knows: frames and evidence as data, and how to lay them out so that a person understands them at a glance.
Does not know: models, engines or tensors.

    title                         video.mp4: where each question looked
    the frames with their times   [0.0 s] [1.0 s] [2.0 s] ...
    one row per question          pruned patches dark and grey, kept ones as they are, retrieved ones yellow to red
    legend
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsevila_cluster.config import EngineConfig
from sparsevila_cluster.errors import BadRequest
from sparsevila_cluster.media import open_media
from sparsevila_cluster.request import Answer, Evidence, FrameEvidence, MediaSource

Row = tuple[str, str, Evidence]  # question, answer, evidence

MIN_COLUMNS, MAX_COLUMNS = 4, 12
WIDTH_PX, MIN_WIDTH_PX = 1600, 900  # of the whole content: the most that tiles fill, the least that text needs
MAX_TILE_PX = (360, 400)  # wide, high
# Smaller than this nobody recognises a frame (side of a square of its area) or a patch of it.
MIN_TILE_PX, MIN_PATCH_PX, MAX_EDGE_PX = 130, 7, 4
MARGIN_PX, GAP_PX = 28, 8

PAPER, INK, FAINT, RULE, ANSWER = (255, 255, 255), (28, 32, 38), (112, 118, 126), (222, 225, 229), (176, 12, 38)
# Share of attention from little to most, in even steps: yellow, orange, red, dark red.
RAMP = np.array([(255, 236, 110), (254, 178, 60), (245, 82, 38), (178, 0, 38)], np.float32)
MIN_TINT, MAX_TINT = 0.18, 0.38  # opacity: the frame must stay readable below
PRUNED_LIGHT = 0.32

TITLE_PT, QUESTION_PT, NOTE_PT = 26, 21, 15


def ramp(level: float | np.ndarray) -> np.ndarray:
    """f32 [..., 3]: the colour of a level in [0, 1]."""
    at = np.clip(np.asarray(level, np.float32), 0, 1) * (len(RAMP) - 1)
    low = np.minimum(at.astype(int), len(RAMP) - 2)
    part = (at - low)[..., None]
    return RAMP[low] * (1 - part) + RAMP[low + 1] * part


def save_heatmap(
    path: str | Path, source: str | Path, config: EngineConfig, turns: Sequence[tuple[str, Answer]]
) -> None:
    """Decode `source` as an engine with this configuration does; write the picture of a conversation about it as PNG.

    Raises:
        BadRequest: `path` cannot be written. BadMedia, TooLarge, DeadlineExceeded: the source, as `open_media`.
    """
    media = open_media(MediaSource(str(source)), fps=config.fps, max_frames=config.max_frames, limits=config.limits)
    rows = [(question, answer.text, answer.evidence) for question, answer in turns]
    name = Path(source).name if len(str(source)) < 200 else "media"  # a data URL is long and has no name
    picture = draw_heatmap(media.frames, media.times_s, rows, f"{name}: where each question looked")
    try:
        picture.save(path, "PNG")
    except OSError as error:
        raise BadRequest(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def draw_heatmap(
    media_frames: np.ndarray, times_s: Sequence[float], rows: Sequence[Row], title: str = "Where each question looked"
) -> Image.Image:
    """One picture for a conversation about one video or image.

    media_frames: u8 [F, H, W, 3], the sampled frames; times_s: [F]; rows: (question, answer, evidence) of each turn.
    Grids of the evidence are laid over the frames proportionally. Of more moments than fit, the most looked-at are
    shown.
    """
    moments = _moments(media_frames, rows)
    evidences = [evidence for _, _, evidence in rows]
    num_cols = max((frame.grid[1] for evidence in evidences for frame in evidence), default=1)
    chosen = choose_moments(evidences, len(moments), _max_columns(*media_frames.shape[1:3], num_cols))
    tile = _tile_size(media_frames.shape[2], media_frames.shape[1], len(chosen))
    tiles = [
        np.asarray(Image.fromarray(media_frames[moments[g]]).resize(tile, Image.Resampling.LANCZOS)) for g in chosen
    ]
    page = _Page(len(chosen), tile)

    page.write(title, TITLE_PT, INK, max_lines=1)
    page.write(_caption(len(chosen), len(moments), len(media_frames)), NOTE_PT, FAINT)
    page.skip(14)
    page.tiles(tiles, _labels(chosen, moments, times_s, evidences) if len(moments) > 1 else [""])
    for number, (question, answer, evidence) in enumerate(rows, 1):
        page.rule()
        most = max((share for frame in evidence for _, _, share in frame.cells), default=0.0)
        page.question(f"{number}.  {question}", answer or "(no text)", most)
        if evidence:
            shown = [evidence[g] for g in chosen]
            shaded = [shade(picture, frame, most) for picture, frame in zip(tiles, shown, strict=True)]
            page.tiles(shaded, [f"{100 * frame.share:.0f} %" for frame in shown], [frame.share for frame in shown])
    page.rule()
    page.legend()
    return page.finish()


def shade(picture: np.ndarray, evidence: FrameEvidence, most: float) -> np.ndarray:
    """u8 [h, w, 3]: `picture` with pruned cells dark and grey, retrieved ones tinted and framed by share / `most`."""
    height, width = picture.shape[:2]
    num_rows, num_cols = evidence.grid
    top, left = (
        np.linspace(0, height, num_rows + 1).round().astype(int),
        np.linspace(0, width, num_cols + 1).round().astype(int),
    )
    kept = np.zeros(evidence.grid, bool)
    for row, col in evidence.kept:
        kept[row, col] = True
    stays = np.repeat(np.repeat(kept, np.diff(top), 0), np.diff(left), 1)[..., None]
    grey = picture @ np.array([0.299, 0.587, 0.114], np.float32)
    shaded = np.where(stays, picture, PRUNED_LIGHT * grey[..., None]).astype(np.float32)
    edge = min(MAX_EDGE_PX, max(1, min(height // num_rows, width // num_cols) // 8))
    for row, col, share in evidence.cells:
        level = share / most if most > 0 else 0.0
        cell = shaded[top[row] : top[row + 1], left[col] : left[col + 1]]
        color, tint = ramp(level), MIN_TINT + (MAX_TINT - MIN_TINT) * level
        inner = cell[edge:-edge, edge:-edge]
        inner[:] = inner * (1 - tint) + color * tint
        for side in (cell[:edge], cell[-edge:], cell[:, :edge], cell[:, -edge:]):
            side[:] = color
    return shaded.round().astype(np.uint8)


def choose_moments(evidences: Sequence[Evidence], num_moments: int, most: int = MAX_COLUMNS) -> list[int]:
    """At most `most` moments to show, in order of time: all, or else those that some question looked at most.

    A question's shares are measured against its own largest, so that each question's best moments are shown.
    """
    if num_moments <= most:
        return list(range(num_moments))
    peaks = np.zeros(num_moments)
    for evidence in evidences:
        shares = np.array([frame.share for frame in evidence])
        if shares.size and shares.max() > 0:
            peaks = np.maximum(peaks, shares / shares.max())
    if not peaks.any():
        return np.linspace(0, num_moments - 1, most).round().astype(int).tolist()
    return sorted(np.argsort(-peaks, kind="stable")[:most].tolist())


def _moments(media_frames: np.ndarray, rows: Sequence[Row]) -> list[int]:
    """The sampled frame that stands for each temporal group; without evidence, every frame is its own group."""
    evidence = next((evidence for _, _, evidence in rows if evidence), None)
    if evidence is None:
        return list(range(len(media_frames)))
    assert all(not other or len(other) == len(evidence) for _, _, other in rows), "rows about different media"
    return [frame.frame for frame in evidence]


def _labels(
    chosen: Sequence[int], moments: Sequence[int], times_s: Sequence[float], evidences: Sequence[Evidence]
) -> list[str]:
    """When each shown frame is; views of one picture are told apart by how finely they see it."""
    if len(times_s) > 1:
        return [f"{float(times_s[moments[g]]):.1f} s" for g in chosen]
    views = next(evidence for evidence in evidences if evidence)
    return ["{} x {} patches".format(*views[g].grid) for g in chosen]


def _caption(num_shown: int, num_moments: int, num_frames: int) -> str:
    if num_frames == 1:
        seen = "" if num_moments == 1 else ", as coarsely and as finely as the model sees it"
        return f"Top: the picture{seen}. Below, for each question: which patches it looked at."
    which = (
        f"{num_moments} moments"
        if num_shown == num_moments
        else f"The {num_shown} most looked-at of {num_moments} moments"
    )
    frames = "" if num_frames == num_moments else f" of {num_frames} sampled frames"
    return (
        f"{which}{frames}. For each question: the patches that it looked at, and each moment's share of its attention."
    )


def _max_columns(height: int, width: int, num_cols: int) -> int:
    """How many frames of this shape and with so many patches across can stand side by side and still be read."""
    tile = max(MIN_TILE_PX * (width / height) ** 0.5, MIN_PATCH_PX * num_cols)
    return int(min(MAX_COLUMNS, max(MIN_COLUMNS, WIDTH_PX // tile)))


def _tile_size(width: int, height: int, columns: int) -> tuple[int, int]:
    """Pixels of a tile: as large as the columns allow, in the shape of the frames."""
    room = (WIDTH_PX - GAP_PX * (columns - 1)) / columns
    # A single picture may be larger: nothing else competes for the page.
    limit = MAX_TILE_PX if columns > 1 else (WIDTH_PX // 2, WIDTH_PX // 3)
    scale = min(room / width, limit[0] / width, limit[1] / height)
    return max(8, round(width * scale)), max(8, round(height * scale))


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


class _Page:
    """Draws from top to bottom on a page that grows."""

    def __init__(self, columns: int, tile: tuple[int, int]) -> None:
        self.tile = tile
        self.width = max(MIN_WIDTH_PX, columns * (tile[0] + GAP_PX) - GAP_PX)
        self.image = Image.new("RGB", (self.width + 2 * MARGIN_PX, 400), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN_PX

    def room(self, height: int) -> None:
        """Grow the page so that `height` more pixels fit."""
        if self.y + height + MARGIN_PX > self.image.height:
            taller = Image.new("RGB", (self.image.width, 2 * self.image.height + height), PAPER)
            taller.paste(self.image)
            self.image, self.draw = taller, ImageDraw.Draw(taller)

    def skip(self, height: int) -> None:
        self.room(height)
        self.y += height

    def rule(self) -> None:
        self.skip(20)
        self.draw.line([(MARGIN_PX, self.y), (MARGIN_PX + self.width, self.y)], fill=RULE, width=2)
        self.skip(18)

    def write(
        self, text: str, size: int, fill: tuple[int, int, int], width: int | None = None, max_lines: int = 2
    ) -> None:
        font = _font(size)
        for line in wrap(text, font, width or self.width, max_lines):
            self.room(size)
            self.draw.text((MARGIN_PX, self.y), line, fill, font)
            self.skip(round(size * 1.35))

    def question(self, question: str, answer: str, most: float) -> None:
        """The question, its answer in red, and at the right what the strongest tint stands for."""
        top, bar, font = self.y, 110, _font(NOTE_PT)
        least, label = "share per patch: 0", f"{100 * most:.{0 if most >= 0.1 else 1}f} %"
        x = MARGIN_PX + self.width - bar - 10 - round(font.getlength(label))
        left = x - 10 - round(font.getlength(least))
        width = left - MARGIN_PX - 30 if most > 0 else self.width
        self.write(question, QUESTION_PT, INK, width)
        self.write(answer, QUESTION_PT, ANSWER, width)
        if most > 0:
            self.draw.text((left, top + 3), least, FAINT, font)
            colors = np.repeat(ramp(np.linspace(0, 1, bar))[None], 14, 0).astype(np.uint8)
            self.image.paste(Image.fromarray(colors), (x, top + 5))
            self.draw.text((x + bar + 10, top + 3), label, FAINT, font)
        self.skip(8)

    def tiles(self, pictures: list[np.ndarray], labels: list[str], shares: list[float] | None = None) -> None:
        """A row of pictures with a label below each; with `shares`, a bar as long as its share of the largest."""
        width, height = self.tile
        self.room(height + 60)
        font = _font(NOTE_PT)
        best = max(shares) if shares else 0.0
        for column, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            x = MARGIN_PX + column * (width + GAP_PX)
            self.image.paste(Image.fromarray(picture), (x, self.y))
            below = self.y + height + 5
            if shares and best > 0 and len(shares) > 1:
                level = shares[column] / best
                self.draw.rectangle([x, below, x + width - 1, below + 6], fill=RULE)
                if level > 0:
                    fill = tuple(ramp(level).astype(int).tolist())
                    self.draw.rectangle([x, below, x + max(2, round((width - 1) * level)), below + 6], fill=fill)
                below += 10
            elif shares:
                continue
            strong = shares is None or (best > 0 and shares[column] == best)
            self.draw.text((x + width / 2, below), label, INK if strong else FAINT, font, anchor="ma")
        self.skip(height + (36 if shares and len(shares) > 1 else 10 if shares else 26))

    def legend(self) -> None:
        font, box = _font(NOTE_PT), 20
        self.room(60)
        x, y = MARGIN_PX, self.y
        # The swatches are drawn by the same rules as the frames, on a piece of "sky".
        sky = np.full((box, box, 3), (104, 158, 196), np.uint8)
        here, nowhere = ((0, 0),), ()
        pruned = shade(sky, FrameEvidence(0, 0.0, 0.0, (1, 1), nowhere, nowhere), 1.0)
        kept = shade(sky, FrameEvidence(0, 0.0, 0.0, (1, 1), nowhere, here), 1.0)
        for swatch, text in ((pruned, "pruned before any question"), (kept, "kept, not used for this answer")):
            self.image.paste(Image.fromarray(swatch), (x, y))
            self.draw.text((x + box + 8, y + 2), text, INK, font)
            x += box + 8 + round(font.getlength(text)) + 34
        for level in (0.0, 0.5, 1.0):
            cell = FrameEvidence(0, 0.0, level, (1, 1), ((0, 0, level),), here)
            self.image.paste(Image.fromarray(shade(sky, cell, 1.0)), (x, y))
            x += box + 3
        text = "retrieved for this answer: the redder, the larger its share of the attention"
        if x + 6 + font.getlength(text) > MARGIN_PX + self.width:
            text = "retrieved; redder = larger share of the attention"
        self.draw.text((x + 6, y + 2), text, INK, font)
        self.skip(box + 4)

    def finish(self) -> Image.Image:
        return self.image.crop((0, 0, self.image.width, self.y + MARGIN_PX))


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of `width` pixels; what does not fit ends in '...'."""

    def fitting(parts: Sequence[str], glue: str, end: str = "") -> int:
        """How many of the first parts fit into a line, by bisection: measuring text is slow."""
        return bisect_right(
            range(1, len(parts) + 1), width, key=lambda num: font.getlength(glue.join(parts[:num]) + end)
        )

    lines, words = [], text.split() or [""]
    while words and len(lines) < max_lines:
        num = max(1, fitting(words, " "))
        lines.append(" ".join(words[:num]))
        words = words[num:]
    if words or font.getlength(lines[-1]) > width:
        lines[-1] = lines[-1][: fitting(lines[-1], "", "...")].rstrip() + "..."
    return lines
