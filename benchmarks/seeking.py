"""Sampling a long film: decoding every frame of it, or around the sample times only. `python -m benchmarks.seeking`.

    segments   a key frame every 2 s, as streaming packagers, phones and cameras write them
    long       the default of x264: a key frame where the scene changes (here every 2 to 12 s), or after 250 frames

Both ways are timed in one process, in turns, from an open file to the sampled frames: survey of the packets, decoding, RGB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import machine
from benchmarks.lib.midsize_checkpoint import default_cache
from benchmarks.lib.report import Report, progress
from benchmarks.lib.stopwatch import Repeats, in_turns
from benchmarks.lib.timing_table import Ledger
from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.media.frames import Decoded, on_heap
from sparsevila_cluster.media.media_source import DecodeDeadline
from sparsevila_cluster.media.video import decode_video

LAYOUT = 1  # change it whenever another film would be made of the same fields
NUM_FRAMES = 64
STAGE, FULL, SEEK = "sample", "every frame", "seeking"


@dataclass(frozen=True)
class Film:
    """H.264 with B-frames at x264's preset `veryfast`. key_s: seconds between key frames, or None for x264's default."""

    name: str = "segments"
    key_s: float | None = 2.0
    length_s: float = 600.0
    fps: int = 25
    width: int = 320
    height: int = 240
    seed: int = 0

    @property
    def num_frames(self) -> int:
        return round(self.length_s * self.fps)

    @property
    def file_name(self) -> str:
        told = json.dumps([LAYOUT, asdict(self)], sort_keys=True).encode()
        return f"film-{self.name}-{hashlib.blake2b(told, digest_size=6).hexdigest()}.mp4"


FILMS = (Film(), Film("long", key_s=None))
TOY = (Film(length_s=40.0, width=64, height=48), Film("long", None, length_s=40.0, width=64, height=48))
OFTEN = Repeats(least=3, most=9, budget_s=30.0)


def make_film(cache: Path, film: Film, say: Callable[[str], None] = lambda text: None) -> Path:
    """The film's file below `cache`, made on first use: half a minute. Complete or absent, never half written."""
    import av

    path = cache / film.file_name
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=".making-", suffix=".mp4", dir=cache)
    os.close(handle)
    try:
        options = {"preset": "veryfast"} | ({"g": str(round(film.key_s * film.fps))} if film.key_s else {})
        with av.open(scratch, "w") as out:
            stream = out.add_stream("libx264", rate=film.fps, options=options)
            stream.width, stream.height, stream.pix_fmt = film.width, film.height, "yuv420p"
            for number, picture in enumerate(scenes(film)):
                if number % 250 == 0:
                    say(f"film {film.name}: {number} of {film.num_frames} frames")
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


def scenes(film: Film) -> Iterator[np.ndarray]:
    """u8 [H, W, 3] of each frame: scenes of 2 to 12 s; in each a camera pans over a grainy view, and three things move."""
    rng = np.random.default_rng(film.seed)
    height, width, side = film.height, film.width, film.height // 6
    left = film.num_frames
    while left > 0:
        view = _view(rng, height, 2 * width)
        pan, colors = rng.uniform(0.0, 1.2), rng.integers(0, 256, (3, 3))
        places, speeds = rng.uniform(0, 1, (3, 2)), rng.uniform(-0.01, 0.01, (3, 2))
        num = min(left, round(rng.uniform(2, 12) * film.fps))
        for number in range(num):
            at = int(pan * number) % width
            picture = view[:, at : at + width].copy()
            for place, speed, color in zip(places, speeds, colors, strict=True):
                x, y = ((place + speed * number) % 1 * (width - side, height - side)).astype(int)
                picture[y : y + side, x : x + side] = color
            yield picture
        left -= num


def _view(rng: np.random.Generator, height: int, width: int, cell: int = 16) -> np.ndarray:
    """A smooth landscape of colours under grain, as u8 [height, width, 3]."""
    coarse = rng.integers(0, 256, (-(-height // cell), -(-width // cell), 3)).astype(np.float32)
    view: Any = coarse.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    for axis in (0, 1):
        view = sum(np.roll(view, shift, axis) for shift in range(0, cell, 4)) / (cell // 4)
    grain = rng.normal(0, 12, (height, width, 1))
    return np.clip(view + grain, 0, 255).astype(np.uint8)


def sample(path: Path, seek: bool) -> Decoded:
    """64 frames of the film, in this process, so that only the way of sampling differs."""
    limits = MediaLimits()
    with path.open("rb") as file:
        deadline = DecodeDeadline(path.name, 3600.0)
        return decode_video(
            file, path.name, fps=240.0, max_frames=NUM_FRAMES, limits=limits, deadline=deadline, allocate=on_heap, seek=seek
        )


def measure(
    ledger: Ledger, cache: Path, films: Sequence[Film] = FILMS, repeats: Repeats = OFTEN,
    say: Callable[[str], None] = lambda text: None,
) -> None:  # fmt: skip
    """Add two rows per film, after checking that both ways give the same frames."""
    for film in films:
        path = make_film(cache, film, say)
        say(f"film {film.name}: sampling")
        full, sparse = sample(path, seek=False), sample(path, seek=True)
        equal = np.array_equal(full.frames, sparse.frames) and np.array_equal(full.times_s, sparse.times_s)
        times = in_turns({FULL: partial(sample, path, False), SEEK: partial(sample, path, True)}, repeats)
        facts: dict[str, Any] = {"num_film_frames": film.num_frames, "length_s": film.length_s, "key_frames": num_key_frames(path)}
        for variant, found in times.items():
            ledger.add(film.name, len(full.frames), STAGE, variant, found, equal_frames=bool(equal), **facts)


def num_key_frames(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        return sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


def figures(ledger: Ledger, by: str = "ms") -> dict[str, float | None]:
    """How many times faster seeking is, by figure; of medians (ms) or best times (best_ms)."""
    names = {"seek_speedup": "segments", "seek_speedup_long_gop": "long"}
    return {figure: ledger.ratio(film, NUM_FRAMES, STAGE, FULL, SEEK, by=by) for figure, film in names.items()}


def show(report: Report, ledger: Ledger) -> None:
    rows = [row for row in ledger.rows if row["stage"] == STAGE]
    head = ("film", "seconds", "frames", "key frames", "sampled", "variant", "ms", "spread", "same frames")
    names = ("model", "length_s", "num_film_frames", "key_frames", "frames", "variant", "ms", "spread", "equal_frames")
    report.show_table("Sampling a long film", head, [[row[name] for name in names] for row in rows])


def main(argv: Sequence[str] | None = None, films: Sequence[Film] = FILMS) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeking", description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the films are kept (35 MB)")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    options = parser.parse_args(argv)
    report, ledger = Report("seeking", machine.card(), quiet=options.json), Ledger()
    report.show_card()
    with progress() as say:
        measure(ledger, options.cache, films, say=say)
    show(report, ledger)
    report.rows = ledger.rows
    report.figures = {name: value for name, value in figures(ledger).items() if value is not None}
    report.show_figures()
    report.finish()


if __name__ == "__main__":
    main()
