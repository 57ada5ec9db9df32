"""Means with their standard errors: the one place where a Monte Carlo error bar is computed."""

from __future__ import annotations

import math

from torch import Tensor


def mean_and_stderr(samples: Tensor) -> tuple[float, float]:
    """Mean of independent samples and the standard error of that mean, in float64.

    `stderr = std(samples, ddof=1) / sqrt(n)`. One sample says nothing about its own error, so `n = 1` gives `nan`,
    never zero.

    Args:
        samples: shape `(n,)`, `n >= 1`; the error is in the samples' units.

    Returns:
        `(mean, stderr)`.
    """
    values = samples.detach().double().flatten()
    count = values.numel()
    if count == 0:
        raise ValueError("mean of no samples: give at least one")
    mean = float(values.mean())
    if count == 1:
        return mean, math.nan
    return mean, float(values.std(unbiased=True)) / math.sqrt(count)
