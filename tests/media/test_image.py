"""Pictures: told by their bytes, upright, on white, and never larger than allowed."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.core.errors import BadMedia, TooLarge
from tests.media.media_files import corners, load, picture_bytes, quadrants


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_pictures_are_told_by_their_bytes(format, tmp_path):
    path = tmp_path / "picture.bin"
    path.write_bytes(picture_bytes(Image.fromarray(quadrants()), format))
    media = load(str(path))
    assert media.kind == "image" and media.frames.shape == (1, 48, 64, 3) and corners(media.frames[0]) == "rgbw"
    assert media.times_s.tolist() == [0.0] and media.duration_s == 0.0


def test_one_pixel():
    assert load(picture_bytes(Image.new("L", (1, 1), 7))).frames.tolist() == [[[[7, 7, 7]]]]


@pytest.mark.smoke
def test_exif_orientation_is_honoured():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    media = load(picture_bytes(Image.fromarray(quadrants()), "JPEG", exif=exif, quality=95))
    assert media.frames.shape == (1, 64, 48, 3) and corners(media.frames[0]) == "brwg"


UPRIGHT = {
    1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})])
def test_every_exif_orientation(format, options):
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        frame = load(picture_bytes(Image.fromarray(quadrants()), format, exif=exif, **options)).frames[0]
        want = upright(quadrants()).astype(int)
        assert frame.shape == want.shape and np.abs(frame - want).mean() <= (3 if format == "JPEG" else 0), orientation


def test_transparency_shows_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    assert load(picture_bytes(image)).frames[0, 0].tolist() == [[255, 0, 0], [255, 255, 255]]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([0, 0, 0])
    assert load(picture_bytes(palette, transparency=0)).frames[0, 0].tolist() == [[255, 255, 255]]
    assert load(picture_bytes(Image.new("LA", (1, 1), (0, 0)))).frames[0, 0].tolist() == [[255, 255, 255]]


def test_deep_grey_is_scaled():
    image = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], np.uint16))
    assert load(picture_bytes(image)).frames[0, 0, :, 0].tolist() == [0, 0x80, 0xFF]


def test_cmyk_becomes_rgb():
    assert load(picture_bytes(Image.new("CMYK", (8, 8)), "JPEG")).frames.min() >= 250


def test_a_moving_gif_is_a_video_unless_told_otherwise():
    steps = [Image.new("L", (32, 32), 60 * i) for i in range(4)]
    data = picture_bytes(steps[0], "GIF", save_all=True, append_images=steps[1:], duration=[100, 200, 300, 400])
    media = load(data, fps=10)
    assert media.kind == "video" and media.times_s == pytest.approx([0.0, 0.1, 0.3, 0.6])
    assert load(data, kind="image").kind == "image"


def test_picture_limits_are_checked_before_decoding():
    def claim(width: int, height: int) -> bytes:
        """A few bytes of PNG whose header claims any size."""
        data = picture_bytes(Image.new("1", (1, 1)))
        header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
        return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]

    with pytest.raises(TooLarge, match="60000 x 1400 pixels are more than max_pixels = 67108864"):
        load(claim(60000, 1400))
    with pytest.raises(TooLarge, match="max_pixels = 3071"):
        load(picture_bytes(Image.fromarray(quadrants())), max_pixels=3071)
    with pytest.raises(TooLarge):  # above Pillow's own cap, too
        load(claim(65000, 65000), max_pixels=1 << 40)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_cut_pictures_are_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = picture_bytes(Image.fromarray(noise), format)
    with pytest.raises(BadMedia):
        load(data[: len(data) // 2])
