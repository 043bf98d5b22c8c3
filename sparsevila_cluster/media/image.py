"""One picture to one upright RGB frame. The size in the header is checked before a pixel is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps, WebPImagePlugin

from sparsevila_cluster.core.errors import BadMedia, SparseVilaError, TooLarge
from sparsevila_cluster.media.frames import Allocate, Decoded, check_pixels, out_of_memory

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

# Importing the plugin makes WebP known; Pillow would import all its plugins to find it.
FORMATS = ("PNG", "JPEG", WebPImagePlugin.WebPImageFile.format, "GIF")


def decode_image(file: BinaryIO, name: str, limits: MediaLimits, allocate: Allocate) -> Decoded:
    """The picture (of an animation: its first frame) as u8 [1, H, W, 3] RGB, upright.

    Raises:
        BadMedia: bytes that are no whole PNG, JPEG, WebP or GIF picture.
        TooLarge: more pixels than `limits.max_pixels`, or more memory than `limits.decode_memory_bytes`.
    """
    with open_picture(file, name, limits, FORMATS) as image:
        picture = to_rgb(ImageOps.exif_transpose(image))
        frames = allocate((1, *picture.shape))
        frames[0] = picture
    return Decoded(frames, np.zeros(1), 0.0)


@contextmanager
def open_picture(file: BinaryIO, name: str, limits: MediaLimits, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An opened picture of legal size whose pixels are not decoded yet; what Pillow raises in the block, as one of ours."""
    try:
        file.seek(0)
        with Image.open(file, formats=formats) as image:
            check_pixels(image.width, image.height, name, limits)
            yield image
    except SparseVilaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's process-wide cap (about 179 million pixels) stands above every larger max_pixels.
        raise TooLarge(f"{name}: {_lower(error)}; max_pixels = {limits.max_pixels}") from error
    except MemoryError as error:
        raise out_of_memory(name, limits) from error
    except Exception as error:  # on broken bytes Pillow raises OSError, SyntaxError, struct.error and more
        raise BadMedia(f"{name} is not a whole picture: {_lower(error)}") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """u8 [H, W, 3]; transparency shows white."""
    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip at 255 instead of scaling
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _lower(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text[0].lower() + text[1:]
