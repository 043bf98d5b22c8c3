"""A picture that grows downwards: lines of text, rows of pictures, a legend."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Picture = np.ndarray  # u8 [h, w, 3]
Font = ImageFont.FreeTypeFont

WIDTH_PX, MIN_WIDTH_PX = 1600, 900  # of the whole content: the most that tiles fill, the least that text needs
MARGIN_PX, GAP_PX = 28, 8

PAPER, INK, FAINT, RULE, ANSWER = (255, 255, 255), (28, 32, 38), (112, 118, 126), (222, 225, 229), (176, 12, 38)
TITLE_PT, QUESTION_PT, NOTE_PT = 26, 21, 15
# Share of attention from little to most, in even steps: yellow, orange, red, dark red.
RAMP = np.array([(255, 236, 110), (254, 178, 60), (245, 82, 38), (178, 0, 38)], np.float32)


def ramp(level: float | np.ndarray) -> np.ndarray:
    """f32 [..., 3]: the colour of a level in [0, 1]."""
    at = np.clip(np.asarray(level, np.float32), 0, 1) * (len(RAMP) - 1)
    low = np.minimum(at.astype(int), len(RAMP) - 2)
    part = (at - low)[..., None]
    color: np.ndarray = RAMP[low] * (1 - part) + RAMP[low + 1] * part
    return color


class Canvas:
    """Draws from top to bottom on a picture that grows. `tile`: width and height of the box of each picture in a row."""

    def __init__(self, columns: int, tile: tuple[int, int]) -> None:
        self.tile = tile
        self.width = max(MIN_WIDTH_PX, columns * (tile[0] + GAP_PX) - GAP_PX)
        self.image = Image.new("RGB", (self.width + 2 * MARGIN_PX, 400), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.y = MARGIN_PX

    def grow(self, height: int) -> None:
        """Grow the picture so that `height` more pixels fit."""
        if self.y + height + MARGIN_PX > self.image.height:
            taller = Image.new("RGB", (self.image.width, 2 * self.image.height + height), PAPER)
            taller.paste(self.image)
            self.image, self.draw = taller, ImageDraw.Draw(taller)

    def skip(self, height: int) -> None:
        """Leave `height` pixels empty."""
        self.grow(height)
        self.y += height

    def rule(self) -> None:
        """A horizontal line with space around it."""
        self.skip(20)
        self.draw.line([(MARGIN_PX, self.y), (MARGIN_PX + self.width, self.y)], fill=RULE, width=2)
        self.skip(18)

    def write(self, text: str, size: int, fill: Color, width: int | None = None, max_lines: int = 2) -> None:
        """Text in lines of at most `width` pixels (None: all); what does not fit in `max_lines` ends in "..."."""
        font = load_font(size)
        for line in wrap(text, font, width or self.width, max_lines):
            self.grow(size)
            self.draw.text((MARGIN_PX, self.y), line, fill, font)
            self.skip(round(size * 1.35))

    def question(self, question: str, answer: str, most: float) -> None:
        """The question, its answer in red, and at the right what the strongest tint stands for."""
        top, bar, font = self.y, 110, load_font(NOTE_PT)
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

    def tiles(self, pictures: Sequence[Picture], labels: Sequence[str], shares: Sequence[float] | None = None) -> None:
        """A row of pictures with a label below each; with `shares`, a bar as long as its share of the largest."""
        width, height = self.tile
        self.grow(height + 60)
        font = load_font(NOTE_PT)
        best = max(shares) if shares else 0.0
        for column, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            x = MARGIN_PX + column * (width + GAP_PX)
            inset = (width - picture.shape[1]) // 2, (height - picture.shape[0]) // 2
            self.image.paste(Image.fromarray(picture), (x + inset[0], self.y + inset[1]))
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
            text = wrap(label, font, width, 1)[0]
            self.draw.text((x + width / 2, below), text, INK if strong else FAINT, font, anchor="ma")
        self.skip(height + (36 if shares and len(shares) > 1 else 10 if shares else 26))

    def legend(self, entries: Sequence[tuple[Sequence[Picture], tuple[str, ...]]]) -> None:
        """Entries side by side: small pictures of one size, and what they stand for, the longer wording first."""
        font, box = load_font(NOTE_PT), entries[0][0][0].shape[0]
        self.grow(60)
        x = MARGIN_PX
        for swatches, wordings in entries:
            for swatch in swatches:
                self.image.paste(Image.fromarray(swatch), (x, self.y))
                x += box + 3
            room = MARGIN_PX + self.width - x - 5
            text = next((words for words in wordings if font.getlength(words) <= room), wordings[-1])
            self.draw.text((x + 5, self.y + 2), text, INK, font)
            x += 5 + round(font.getlength(text)) + 34
        self.skip(box + 4)

    def finish(self) -> Image.Image:
        """The picture, cut below what was drawn."""
        return self.image.crop((0, 0, self.image.width, self.y + MARGIN_PX))


def load_font(size: int) -> Font:
    """Pillow's own font, which every machine has."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
    return font


def wrap(text: str, font: Font, width: int, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of `width` pixels; what does not fit ends in '...'."""

    def fitting(parts: Sequence[str], glue: str, end: str = "") -> int:
        """How many of the first parts fit into a line, by bisection: measuring text is slow."""
        return bisect_right(
            range(1, len(parts) + 1), width, key=lambda num: math.ceil(font.getlength(glue.join(parts[:num]) + end))
        )

    words, lines = text.split() or [""], list[str]()
    while words and len(lines) < max_lines:
        num = max(1, fitting(words, " "))
        lines.append(" ".join(words[:num]))
        words = words[num:]
    if words or font.getlength(lines[-1]) > width:
        lines[-1] = lines[-1][: fitting(lines[-1], "", "...")].rstrip() + "..."
    return lines
