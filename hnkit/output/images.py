"""Images as PNG files: base and steered ones side by side."""

from __future__ import annotations

import io

import numpy as np
from torch import Tensor


def grid_png(base: Tensor, steered: Tensor) -> bytes:
    """Base images above, steered ones below, column by column from the same noise, as a PNG file.

    Args:
        base: `(n, 3, H, W)` in [0, 1].
        steered: the same shape.
    """
    from matplotlib.image import imsave

    gap = max(1, base.shape[-1] // 32)
    margin = ((0, 0), (gap, gap), (gap, gap), (0, 0))
    rows = [
        np.concatenate(list(np.pad(images.permute(0, 2, 3, 1).numpy(), margin, constant_values=1.0)), axis=1)
        for images in (base, steered)
    ]
    buffer = io.BytesIO()
    imsave(buffer, np.clip(np.concatenate(rows, axis=0), 0.0, 1.0), format="png")
    return buffer.getvalue()
