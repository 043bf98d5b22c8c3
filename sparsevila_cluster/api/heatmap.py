"""A picture of where each question looked: the sampled frames, what pruning left of them, and the retrieved patches.

title                         video.mp4: where each question looked
the frames with their times   [0.0 s] [1.0 s] [2.0 s] ...
one row per question          pruned patches dark and grey, kept ones as they are, retrieved ones yellow to red
legend
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sparsevila_cluster.api.canvas import FAINT, GAP_PX, INK, NOTE_PT, TITLE_PT, WIDTH_PX, Canvas, Picture, ramp
from sparsevila_cluster.api.frame_reader import read_frames_again, source_names
from sparsevila_cluster.core.errors import BadMedia, BadRequest
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import Answer, MediaOrigin
from sparsevila_cluster.media import Media

Row = tuple[str, str, Evidence]  # question, answer, evidence
Spot = tuple[int, int]  # media, frame of it

MIN_COLUMNS, MAX_COLUMNS = 4, 12
MAX_TILE_PX = (360, 400)  # wide, high
# Smaller than this nobody recognises a frame (side of a square of its area) or a patch of it.
MIN_TILE_PX, MIN_PATCH_PX, MAX_EDGE_PX = 130, 7, 4
SWATCH_PX = 20
MIN_TINT, MAX_TINT = 0.18, 0.38  # opacity: the frame must stay readable below
PRUNED_LIGHT = 0.32


def draw_conversation(origin: MediaOrigin, turns: Sequence[tuple[str, Answer]]) -> Image.Image:
    """One picture of all turns. Raises BadMedia, TooLarge, DeadlineExceeded: as `read_frames_again`."""
    rows = [(question, answer.text, answer.evidence) for question, answer in turns]
    return draw_heatmap(read_frames_again(origin), rows, source_names(origin))


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG file. Raises BadRequest if `path` cannot be written."""
    try:
        picture.save(path, "PNG")
    except OSError as error:
        raise BadRequest(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def draw_heatmap(medias: Sequence[Media], rows: Sequence[Row], names: Sequence[str] = ()) -> Image.Image:
    """One picture for a conversation about one or several media.

    rows: (question, answer, evidence) of each turn, all about these media; names: of each media. Grids of the evidence are laid
    over the frames proportionally. Of more moments than fit, the most looked-at are shown.

    Raises:
        BadMedia: evidence of frames that the media do not have.
    """
    merged = [{(one.media, one.frame): one for one in evidence.by_frame()} for _, _, evidence in rows]
    spots = _spots(medias, merged)
    num_cols = max((one.grid[1] for seen in merged for one in seen.values()), default=1)
    shares = [[seen[spot].share for spot in spots] for seen in merged if seen]
    most_columns = min(_max_columns(media.frames.shape[1], media.frames.shape[2], num_cols) for media in medias)
    chosen = [spots[i] for i in choose_moments(shares, len(spots), most_columns)]
    tiles = [_tile(medias[media].frames[frame], len(chosen)) for media, frame in chosen]
    canvas = Canvas(len(chosen), (max(tile.shape[1] for tile in tiles), max(tile.shape[0] for tile in tiles)))

    canvas.write(f"{_title(names)}: where each question looked", TITLE_PT, INK, max_lines=1)
    canvas.write(_caption(medias, len(chosen), len(spots)), NOTE_PT, FAINT)
    canvas.skip(14)
    canvas.tiles(tiles, [_label(medias, names, spot) for spot in chosen])
    for number, ((question, answer, _), seen) in enumerate(zip(rows, merged, strict=True), 1):
        canvas.rule()
        most = max((share for one in seen.values() for _, _, share in one.cells), default=0.0)
        canvas.question(f"{number}.  {question}" if len(rows) > 1 else question, answer or "(no text)", most)
        if seen:
            shown = [seen[spot] for spot in chosen]
            shaded = [shade(picture, one, most) for picture, one in zip(tiles, shown, strict=True)]
            canvas.tiles(shaded, [f"{100 * one.share:.0f} %" for one in shown], [one.share for one in shown])
    canvas.rule()
    canvas.legend(_legend())
    return canvas.finish()


def shade(picture: Picture, evidence: FrameEvidence, most: float) -> Picture:
    """u8 [h, w, 3]: `picture` with pruned cells dark and grey, retrieved ones tinted and framed by share / `most`."""
    height, width = picture.shape[:2]
    num_rows, num_cols = evidence.grid
    top = np.linspace(0, height, num_rows + 1).round().astype(int)
    left = np.linspace(0, width, num_cols + 1).round().astype(int)
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


def choose_moments(shares: Sequence[Sequence[float]], num_moments: int, most: int = MAX_COLUMNS) -> list[int]:
    """At most `most` moments to show, in order: all, or else those that some question looked at most.

    shares: for each question, each moment's share. They are measured against the question's own largest, so that each question's
    best moments are shown.
    """
    if num_moments <= most:
        return list(range(num_moments))
    peaks = np.zeros(num_moments)
    for one in map(np.asarray, shares):
        if one.max() > 0:
            peaks = np.maximum(peaks, one / one.max())
    if not peaks.any():
        return [round(moment) for moment in np.linspace(0, num_moments - 1, most)]
    return sorted(int(moment) for moment in np.argsort(-peaks, kind="stable")[:most])


def _spots(medias: Sequence[Media], merged: Sequence[dict[Spot, FrameEvidence]]) -> list[Spot]:
    """The sampled frame that stands for each moment; without evidence, every frame is a moment of its own."""
    spots = next((list(seen) for seen in merged if seen), None)
    if spots is None:
        return [(number, frame) for number, media in enumerate(medias) for frame in range(len(media.frames))]
    assert all(not seen or list(seen) == spots for seen in merged), "rows about different media"
    for media, frame in spots:
        if media >= len(medias) or frame >= len(medias[media].frames):
            raise BadMedia(f"frame {frame} of media {media} was looked at, but the source does not hold it any more")
    return spots


def _title(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "Media"


def _label(medias: Sequence[Media], names: Sequence[str], spot: Spot) -> str:
    """Below a frame: its time, if it has one, and of several media, whose it is."""
    media = medias[spot[0]]
    when = f"{media.times_s[spot[1]]:.1f} s" if media.kind == "video" else ""
    whose = (names[spot[0]] if names else str(spot[0] + 1)) if len(medias) > 1 else ""
    return ", ".join(filter(None, (when, whose)))


def _caption(medias: Sequence[Media], num_shown: int, num_moments: int) -> str:
    num_frames = sum(len(media.frames) for media in medias)
    if num_frames == 1:
        return "Top: the picture. Below, for each question: which patches it looked at."
    noun = "pictures" if all(media.kind == "image" for media in medias) else "moments"
    all_shown = num_shown == num_moments
    which = f"{num_moments} {noun}" if all_shown else f"The {num_shown} most looked-at of {num_moments} {noun}"
    frames = "" if num_frames == num_moments else f" of {num_frames} sampled frames"
    return f"{which}{frames}. For each question: the patches that it looked at, and each one's share of its attention."


def _max_columns(height: int, width: int, num_cols: int) -> int:
    """How many frames of this shape and with so many patches across can stand side by side and still be read."""
    tile = max(MIN_TILE_PX * (width / height) ** 0.5, MIN_PATCH_PX * num_cols)
    return int(min(MAX_COLUMNS, max(MIN_COLUMNS, WIDTH_PX // tile)))


def _tile(frame: Picture, columns: int) -> Picture:
    """A frame as large as the columns allow, in its own shape."""
    height, width = frame.shape[:2]
    room = (WIDTH_PX - GAP_PX * (columns - 1)) / columns
    # A single picture may be larger: nothing else competes for the canvas.
    limit = MAX_TILE_PX if columns > 1 else (WIDTH_PX // 2, WIDTH_PX // 3)
    scale = min(room / width, limit[0] / width, limit[1] / height)
    size = max(8, round(width * scale)), max(8, round(height * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _legend() -> list[tuple[list[Picture], tuple[str, ...]]]:
    """The swatches are drawn by the same rules as the frames, on a piece of "sky"."""
    sky = np.full((SWATCH_PX, SWATCH_PX, 3), (104, 158, 196), np.uint8)
    here = ((0, 0),)
    pruned = shade(sky, FrameEvidence(0, 0.0, 0.0, (1, 1), (), ()), 1.0)
    kept = shade(sky, FrameEvidence(0, 0.0, 0.0, (1, 1), (), here), 1.0)
    levels = [FrameEvidence(0, 0.0, level, (1, 1), ((0, 0, level),), here) for level in (0.0, 0.5, 1.0)]
    retrieved = (
        "retrieved for this answer: the redder, the larger its share of the attention",
        "retrieved; redder = larger share of the attention",
    )
    return [
        ([pruned], ("pruned before any question",)),
        ([kept], ("kept, not used for this answer",)),
        ([shade(sky, one, 1.0) for one in levels], retrieved),
    ]
