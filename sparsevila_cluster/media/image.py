"""One picture to one upright RGB frame.

Knows: Pillow, EXIF orientation, transparency (composited on white) and deep grey scales.
Does not know: where the bytes came from, or sampling. The size in the header is checked before a pixel is decoded.
"""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from sparsevila_cluster.config import MediaLimits
from sparsevila_cluster.errors import BadMedia, TooLarge

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


def decode_image(file: BinaryIO, name: str, limits: MediaLimits) -> np.ndarray:
    """The picture (of an animation: its first frame) as u8 [1, H, W, 3] RGB, upright.

    Raises:
        BadMedia: bytes that are no whole PNG, JPEG, WebP or GIF picture.
        TooLarge: more pixels than `limits.max_pixels`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                size = f"{image.width} x {image.height}"
                raise TooLarge(f"{name}: {size} pixels are more than max_pixels = {limits.max_pixels}")
            return np.ascontiguousarray(_to_rgb(ImageOps.exif_transpose(image)))[None]
    except TooLarge:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Pillow's process-wide cap (about 179 million pixels) stands above every larger max_pixels.
        raise TooLarge(f"{name}: {_lower(error)}; max_pixels = {limits.max_pixels}") from error
    except MemoryError as error:
        raise TooLarge(f"{name} does not fit into memory") from error
    except Exception as error:  # on broken bytes Pillow raises OSError, SyntaxError, struct.error and more
        raise BadMedia(f"{name} is not a whole picture: {_lower(error)}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey: `convert` would clip at 255 instead of scaling
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))  # a copy: Pillow lends read-only memory


def _lower(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text[0].lower() + text[1:]
