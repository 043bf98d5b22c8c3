"""Seeds for fuzzing, one of every container and codec that we read, and the ways in which they are broken.

Everything follows from a seed: the same number makes the same mutant on every machine with the same encoders.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.media.media_files import can_encode, picture_bytes, quadrants, texture, video_bytes

SMALL = (64, 48)  # libx265 spoils its own memory below
HEVC = "log-level=none:keyint=8:bframes=2"


def _video(num: int, container: str, codec: str, **options) -> Callable[[], bytes]:
    draw = functools.partial(texture, size=SMALL)
    return lambda: video_bytes(num, container=container, codec=codec, size=SMALL, draw=draw, **options)


# name -> (encoder that it needs, maker). The long ones are sampled by seeking.
VIDEOS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "mp4 h264": ("libx264", _video(16, "mp4", "libx264", codec_options={"bf": "2", "g": "6"})),
    "mp4 h264 faststart": ("libx264", _video(12, "mp4", "libx264", container_options={"movflags": "faststart"})),
    "mp4 h264 fragments": ("libx264", _video(12, "mp4", "libx264", container_options={"movflags": "frag_keyframe+empty_moov"})),
    "mp4 h264 10 bits": ("libx264", _video(8, "mp4", "libx264", pix_fmt="yuv420p10le")),
    "mp4 h264 turned": ("libx264", _video(8, "mp4", "libx264", rotation=90)),
    "mp4 h264 long": ("libx264", _video(400, "mp4", "libx264", codec_options={"g": "12", "preset": "ultrafast"})),
    "mkv h264": ("libx264", _video(12, "matroska", "libx264", codec_options={"bf": "2"})),
    "mkv h264 long": ("libx264", _video(400, "matroska", "libx264", codec_options={"g": "12", "preset": "ultrafast"})),
    "ts h264": ("libx264", _video(12, "mpegts", "libx264")),
    "ts h264 long": ("libx264", _video(400, "mpegts", "libx264", codec_options={"g": "12", "preset": "ultrafast"})),
    "flv h264": ("libx264", _video(12, "flv", "libx264")),
    "raw h264": ("libx264", _video(12, "h264", "libx264")),
    "mov hevc": ("libx265", _video(12, "mov", "libx265", codec_options={"x265-params": HEVC})),
    "mkv hevc 10 bits": ("libx265", _video(8, "matroska", "libx265", pix_fmt="yuv420p10le")),
    "ts hevc": ("libx265", _video(12, "mpegts", "libx265", codec_options={"x265-params": HEVC})),
    "raw hevc": ("libx265", _video(12, "hevc", "libx265")),
    "webm vp8": ("libvpx", _video(12, "webm", "libvpx", codec_options={"deadline": "realtime"})),
    "webm vp9": ("libvpx-vp9", _video(12, "webm", "libvpx-vp9", codec_options={"deadline": "realtime"})),
    "mp4 vp9": ("libvpx-vp9", _video(8, "mp4", "libvpx-vp9", codec_options={"deadline": "realtime"})),
    "mp4 av1": ("libsvtav1", _video(12, "mp4", "libsvtav1")),
    "mkv av1": ("libsvtav1", _video(12, "matroska", "libsvtav1")),
    "mp4 mpeg4": ("mpeg4", _video(12, "mp4", "mpeg4", codec_options={"bf": "2"})),
    "avi mpeg4": ("mpeg4", _video(12, "avi", "mpeg4")),
    "avi mjpeg": ("mjpeg", _video(6, "avi", "mjpeg", pix_fmt="yuvj420p")),
    "mpeg mpeg2": ("mpeg2video", _video(12, "mpeg", "mpeg2video")),
    "mov prores": ("prores_ks", _video(4, "mov", "prores_ks", pix_fmt="yuv422p10le")),
}


def _moving(format: str, **options) -> bytes:
    steps = [Image.fromarray(texture(i, SMALL)) for i in range(5)]
    return picture_bytes(steps[0], format, save_all=True, append_images=steps[1:], duration=[40, 80, 120, 200, 90], **options)


def _still(format: str, mode: str = "RGB", **options) -> bytes:
    return picture_bytes(Image.fromarray(texture(3)).convert(mode), format, **options)


def _turned(format: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture_bytes(Image.fromarray(quadrants()), format, exif=exif)


PICTURES: dict[str, Callable[[], bytes]] = {
    "gif moving": lambda: _moving("GIF"),
    "webp moving": lambda: _moving("WEBP"),
    "webp moving lossless": lambda: _moving("WEBP", lossless=True),
    "png moving": lambda: _moving("PNG"),
    "gif": lambda: _still("GIF", "P"),
    "webp": lambda: _still("WEBP"),
    "webp lossless alpha": lambda: _still("WEBP", "RGBA", lossless=True),
    "webp turned": lambda: _turned("WEBP", 5),
    "png": lambda: _still("PNG"),
    "png palette": lambda: _still("PNG", "P"),
    "png 16 bits": lambda: picture_bytes(Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64) * 20)),
    "png turned": lambda: _turned("PNG", 8),
    "jpeg": lambda: _still("JPEG"),
    "jpeg progressive": lambda: _still("JPEG", progressive=True),
    "jpeg turned": lambda: _turned("JPEG", 6),
}


@functools.cache
def seeds() -> dict[str, bytes]:
    """A small whole file of every kind whose encoder is here."""
    found = {name: make() for name, (codec, make) in VIDEOS.items() if can_encode(codec)}
    return found | {name: make() for name, make in PICTURES.items()}


def mutant(seed: int, number: int) -> tuple[str, str, bytes]:
    """The seed file's name, what was done to it (up to three things), and the bytes."""
    rng = random.Random(f"{seed}/{number}")
    files = seeds()
    names = list(files)
    name = names[number % len(names)]
    data, done = bytearray(files[name]), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        way = rng.choice(WAYS)
        way(data, rng, files[rng.choice(names)])
        done.append(way.__name__.removeprefix("_"))
    return name, " + ".join(done), bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Half of the time near an end, where the headers are."""
    anywhere, near_end = rng.randrange(len(data)), rng.randrange(min(len(data), 1024))
    return rng.choice((anywhere, anywhere, near_end, len(data) - 1 - near_end))


def _flip_bits(data: bytearray, rng: random.Random, other: bytes) -> None:
    for _ in range(rng.choice((1, 3, 16, 64)) if data else 0):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _noise(data: bytearray, rng: random.Random, other: bytes) -> None:
    if data:
        at = _place(data, rng)
        size = min(rng.choice((1, 8, 64, 512)), len(data) - at)
        data[at : at + size] = rng.randbytes(size) if rng.random() < 0.7 else bytes([rng.choice((0, 255))]) * size


def _cut(data: bytearray, rng: random.Random, other: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.8:
        del data[at:]
    else:
        del data[:at]


def _splice(data: bytearray, rng: random.Random, other: bytes) -> None:
    """The head of another file before the rest of this one, or its rest behind this one's head."""
    size = rng.choice((8, 16, 64, 256, len(other) // 2))
    if rng.random() < 0.5:
        data[: min(size, len(data))] = other[:size]
    else:
        data[size:] = other[size:]


def _swap_chunks(data: bytearray, rng: random.Random, other: bytes) -> None:
    size = min(rng.choice((4, 16, 188, 512)), len(data) // 2)
    if size:
        a, b = sorted(rng.randrange(len(data) - size + 1) for _ in range(2))
        if b >= a + size:
            data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _repeat_chunk(data: bytearray, rng: random.Random, other: bytes) -> None:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 8, 188, 1024))
    data[at:at] = data[at : at + size] * rng.choice((1, 2, 20))


def _drop_chunk(data: bytearray, rng: random.Random, other: bytes) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 4, 64, 512))]


def _edit_length(data: bytearray, rng: random.Random, other: bytes) -> None:
    """Another number where a length, a count or a size may stand: before or behind a name of four letters, or anywhere."""
    if len(data) < 16:
        return
    names = [i for i in range(len(data) - 4) if data[i : i + 4].isalpha()] if rng.random() < 0.7 else []
    at = rng.choice(names) + rng.choice((-4, 4, 8, 12)) if names else _place(data, rng)
    width = rng.choice((1, 2, 4, 4, 8))
    at = max(0, min(at, len(data) - width))
    big = (1 << 8 * width) - 1
    old = int.from_bytes(data[at : at + width], "big")
    odd = (0, 1, big, big >> 1, (big >> 1) + 1, len(data), len(data) - at, old + 1, old - 1, old * 2, rng.randint(0, big))
    value = rng.choice(odd)
    data[at : at + width] = (value & big).to_bytes(width, rng.choice(("big", "little")))


WAYS = (_flip_bits, _noise, _cut, _splice, _swap_chunks, _repeat_chunk, _drop_chunk, _edit_length, _edit_length)
