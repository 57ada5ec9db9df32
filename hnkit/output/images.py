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
    gap = _gap(base.shape[-1])
    margin = ((gap, gap), (gap, gap), (0, 0))
    rows = [
        np.concatenate([np.pad(to_pixels(image), margin, constant_values=255) for image in images], axis=1)
        for images in (base, steered)
    ]
    return rgb_png(np.concatenate(rows, axis=0))


def _gap(width: int) -> int:
    """White pixels around each image of a grid."""
    return max(1, width // 32)


def grid_cells(png: bytes, columns: int) -> list[list[NDArray[np.float64]]]:
    """The images of a file of `grid_png` with so many columns, `(H, W, 3)` in [0, 1]: base, then steered."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
    height, width = pixels.shape[0] // 2, pixels.shape[1] // columns
    gap = next(g for g in range(1, width) if _gap(width - 2 * g) == g)
    rows = (pixels[:height], pixels[height:])
    cells = [np.split(row, columns, axis=1) for row in rows]
    return [[cell[gap : height - gap, gap : width - gap] for cell in row] for row in cells]
