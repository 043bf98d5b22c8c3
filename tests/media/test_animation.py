"""Pictures that move: GIF and WebP by their own frame times, their first frames as images."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded, TooLarge
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import identify, sample_times
from sparsevila_cluster.media.file_kinds import webp_frames
from tests.media.media_files import corners, gray, indices, load, load_here, picture_bytes, quadrants, texture


def moving(format: str, durations: list[int], *, size: int = 32, **options) -> bytes:
    """Frame `i` is flat, of level gray(i), but for one dark corner; durations in milliseconds."""
    steps = []
    for i in range(len(durations)):
        picture = np.full((size, size), gray(i), np.uint8)
        steps.append(Image.fromarray(picture).convert("RGB" if format == "WEBP" else "L"))
    if format == "WEBP":
        options = {"lossless": True} | options
    return picture_bytes(steps[0], format, save_all=True, append_images=steps[1:], duration=durations, **options)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_frames_show_at_their_own_times(format):
    media = load(moving(format, [100, 200, 300, 400]), fps=10)
    assert media.kind == "video" and media.times_s == pytest.approx([0.0, 0.1, 0.3, 0.6])
    assert indices(media) == [0, 1, 2, 3] and media.duration_s == pytest.approx(1.0)
    rng = random.Random(format)
    for _ in range(4):
        durations = [rng.choice((20, 50, 90, 400, 1000)) for _ in range(rng.randint(2, 20))]
        starts = [sum(durations[:i]) / 1000 for i in range(len(durations))]
        fps, max_frames = rng.choice((0.4, 2, 30)), rng.choice((1, 3, 64))
        media = load(moving(format, durations), fps=fps, max_frames=max_frames)
        times_s = sample_times(sum(durations) / 1000, fps, max_frames)
        want = sorted({max(i for i, start in enumerate(starts) if start <= t + 1e-9) for t in times_s})
        assert indices(media) == want and media.times_s == pytest.approx([starts[i] for i in want])


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_frames_without_a_duration_last_a_tenth_of_a_second(format):
    media = load(moving(format, [0, 0, 0, 0]), fps=20)
    assert media.times_s == pytest.approx([0.0, 0.1, 0.2, 0.3]) and media.duration_s == pytest.approx(0.4)


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_the_first_frame_as_an_image(format, tmp_path):
    data = moving(format, [100, 200])
    path = tmp_path / "moving.bin"
    path.write_bytes(data)
    media = load(str(path), kind="image")
    assert media.kind == "image" and indices(media) == [0] and media.frames.shape == (1, 32, 32, 3)
    kinds = {kind: identify(MediaSource(data, kind), fps=2.0, max_frames=4, limits=MediaLimits()) for kind in ("auto", "image")}
    assert kinds["auto"][1] == "video" and kinds["image"][1] == "image" and kinds["auto"][0] != kinds["image"][0]


def test_a_moving_png_is_its_first_frame():
    steps = [Image.fromarray(texture(i)) for i in range(3)]
    media = load(picture_bytes(steps[0], "PNG", save_all=True, append_images=steps[1:], duration=[100] * 3))
    assert media.kind == "image" and np.array_equal(media.frames[0], texture(0))


def test_one_frame_does_not_move():
    assert load(moving("GIF", [100])).kind == "image"
    still = moving("WEBP", [100])
    assert load(still).kind == "image"
    with pytest.raises(BadMedia, match="sent as 'video' but is a WEBP picture"):
        load(still, kind="video")


def test_webp_frames_are_drawn_over_one_another():
    """Lossless frames that change a part of the picture, with transparency: what Pillow was given comes back, on white."""
    steps = []
    for i in range(6):
        picture = Image.fromarray(texture(0)).convert("RGBA")
        picture.paste((250, 0, 0, 255), (8 * i, 4, 8 * i + 8, 20))
        picture.putpixel((40, 40), (0, 0, 0, 0))
        picture.putpixel((41, 40), (0, 0, 255, 51))
        steps.append(picture)
    data = picture_bytes(steps[0], "WEBP", save_all=True, append_images=steps[1:], duration=50, lossless=True, exact=True)
    media = load(data, fps=20)
    want = np.stack([np.asarray(Image.alpha_composite(Image.new("RGBA", s.size, "white"), s).convert("RGB")) for s in steps])
    assert np.array_equal(media.frames, want) and media.frames[0, 40, 40].tolist() == [255, 255, 255]


def test_webp_turned_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    steps = [Image.fromarray(quadrants()), Image.fromarray(255 - quadrants())]
    data = picture_bytes(steps[0], "WEBP", save_all=True, append_images=steps[1:], duration=100, exif=exif)
    media = load(data, fps=10)
    assert media.frames.shape == (2, 64, 48, 3) and corners(media.frames[0]) == "brwg"


def test_webp_limits_and_damage():
    data = moving("WEBP", [1000] * 6)
    with pytest.raises(TooLarge, match="6 s are longer than max_duration_s = 5"):
        load(data, max_duration_s=5)
    with pytest.raises(TooLarge, match="32 x 32 pixels are more than max_pixels = 1000"):
        load(data, max_pixels=1000)
    with pytest.raises(DeadlineExceeded):
        load_here(data, decode_timeout_s=1e-9)
    for share in (0.4, 0.7, 0.95):
        with pytest.raises(BadMedia):
            load(data[: int(len(data) * share)])


@pytest.mark.parametrize("tail", [b"", b"ANMF\x00\x00\x00\x00" * 5, b"\x00" * 100, b"ANMF\xff\xff\xff\xff"])
def test_walking_over_chunks_ends(tail):
    head = b"RIFF\x00\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02" + bytes(9)
    assert list(webp_frames(io.BytesIO(head + tail))) == []
    whole = b"ANMF\x10\x00\x00\x00" + bytes(12) + b"\x64\x00\x00\x00"
    assert list(webp_frames(io.BytesIO(head + whole * 3 + tail))) == [100] * 3
