"""Small real files, written with PyAV and Pillow; a frame's grey level tells its index, so selection is exact."""

from __future__ import annotations

import ctypes
import functools
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import DecoderSandbox, Media, open_media
from sparsevila_cluster.media.decoding import decode
from sparsevila_cluster.media.frames import Decoded
from sparsevila_cluster.media.media_source import DecodeDeadline, open_source

STEP = 4  # grey levels between two frames
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "10"}}
BIT_RATE = {"mpeg4": 4_000_000, "libvpx": 4_000_000}  # at their default rate they leave small changes of grey out


def gray(index: int) -> int:
    return 20 + STEP * index


def video_bytes(
    num: int = 10,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    container: str = "mp4",
    codec: str = "libx264",
    pts: list[int] | None = None,
    rotation: int | None = None,
    sar: Fraction | None = None,
    draw=None,
    container_options=None,
    pix_fmt: str = "yuv420p",
    seekable: bool = True,
    codec_options=None,
    title: str | None = None,
) -> bytes:
    """A video whose frame `i` is a flat picture of level gray(i), or draw(i) -> u8 [H, W, 3]; pts in milliseconds."""
    width, height = size
    if container_options:  # `faststart` opens the file once more, by its name
        folder = tempfile.TemporaryDirectory()
        target = str(Path(folder.name) / "video")
    else:
        buffer = io.BytesIO()
        target = buffer if seekable else _Pipe(buffer)
    with (
        ordinary_priority() if codec == "libsvtav1" else nullcontext(),
        av.open(target, "w", format=container, container_options=container_options or {}) as out,
    ):
        stream = out.add_stream(codec, rate=fps, options=QUIET.get(codec, {}) | (codec_options or {}))
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if title is not None:
            out.metadata["title"] = stream.metadata["title"] = title
        if codec in BIT_RATE:
            stream.bit_rate = BIT_RATE[codec]
        if codec == "mpeg4":
            stream.codec_context.qmin = stream.codec_context.qmax = 1
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num):
            picture = np.full((height, width, 3), gray(index), np.uint8) if draw is None else draw(index)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    if container_options:
        with folder:
            return Path(target).read_bytes()
    return buffer.getvalue()


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """SVT-AV1 makes its threads real-time ones where it may, and everything else on the machine starves; here it may not.

    Capabilities belong to a thread and are inherited by those that it starts.
    """
    os.environ["SVT_LOG"] = "0"
    if sys.platform != "linux":
        yield
        return
    libc, header, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~(1 << 23)  # CAP_SYS_NICE, of the effective ones
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = before
        libc.capset(header, sets)


def texture(index: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """A picture that moves and has details, so that a wrong reference shows: u8 [H, W, 3]."""
    picture = np.roll(_noise(size), (2 * index, 3 * index), (0, 1))
    picture[: size[1] // 4, : size[0] // 4] = index * 5 % 256
    return picture


@functools.cache
def _noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def can_encode(codec: str, pix_fmt: str | None = None) -> bool:
    try:
        formats = av.codec.Codec(codec, "w").video_formats
    except av.codec.codec.UnknownCodecError:
        return False
    return pix_fmt is None or not formats or pix_fmt in {known.name for known in formats}


class _Pipe:
    """A file that only takes bytes: a muxer cannot go back to fill in the duration."""

    def __init__(self, target: io.BytesIO):
        self.target = target

    def write(self, data: bytes) -> int:
        return self.target.write(data)


def audio_bytes() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def picture_bytes(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@functools.cache
def sandbox() -> DecoderSandbox:
    """One for all tests; the interpreter's end closes it."""
    return DecoderSandbox()


def load(data, *, kind="auto", fps=2.0, max_frames=64, **limits) -> Media:
    return open_media(MediaSource(data, kind), fps=fps, max_frames=max_frames, limits=MediaLimits(**limits), sandbox=sandbox())


def load_here(data, *, kind="auto", fps=2.0, max_frames=64, **limits) -> Decoded:
    """The same in this process: the reference, and where a test must reach inside."""
    limits = MediaLimits(**limits)
    with open_source(MediaSource(data, kind), limits) as blob:
        deadline = DecodeDeadline(blob.name, limits.decode_timeout_s)
        return decode(blob.file, blob.name, blob.kind, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)


def indices(media: Media) -> list[int]:
    return [round((float(frame.mean()) - gray(0)) / STEP) for frame in media.frames]


def quadrants(index: int = 0) -> np.ndarray:
    """48 high, 64 wide: top-left red, top-right green, bottom-left blue, bottom-right white."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32, 0] = picture[:24, 32:, 1] = picture[24:, :32, 2] = 255
    picture[24:, 32:] = 255
    return picture


def corners(picture: np.ndarray) -> str:
    """The quadrants of a picture in reading order, as letters."""
    h, w = picture.shape[:2]
    letters = ""
    for y, x in ((h // 4, w // 4), (h // 4, 3 * w // 4), (3 * h // 4, w // 4), (3 * h // 4, 3 * w // 4)):
        bright = tuple(bool(v > 128) for v in picture[y, x])
        letters += {(True, False, False): "r", (False, True, False): "g", (False, False, True): "b"}.get(bright, "w")
    return letters
