"""Images as PNG files with three channels, which every scorer reads: one image, or base and steered side by side."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


def rgb_png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels `(H, W, 3)` as the bytes of a PNG file without an alpha channel."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
    return buffer.getvalue()


def to_pixels(image: Tensor) -> NDArray[np.uint8]:
    """A `(3, H, W)` image in [0, 1] as `(H, W, 3)` bytes, clipped and rounded to the nearest."""
    values = image.permute(1, 2, 0).clamp(0, 1).mul(255).round()
    return np.asarray(values.numpy(), dtype=np.uint8)


def image_png(image: Tensor) -> bytes:
    """A `(3, H, W)` image in [0, 1] as the bytes of a PNG file, rounded to 8 bits."""
    return rgb_png(to_pixels(image))


def grid_png(base: Tensor, steered: Tensor) -> bytes:
    """Base images above, steered ones below, column by column from the same noise, as a PNG file.

    Args:
        base: `(n, 3, H, W)` in [0, 1].
        steered: the same shape.
    """
    gap = max(1, base.shape[-1] // 32)
    margin = ((gap, gap), (gap, gap), (0, 0))
    rows = [
        np.concatenate([np.pad(to_pixels(image), margin, constant_values=255) for image in images], axis=1)
        for images in (base, steered)
    ]
    return rgb_png(np.concatenate(rows, axis=0))
