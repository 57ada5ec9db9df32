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


def ratio_and_stderr(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """Ratio of the means of paired samples, with its standard error to first order (delta method), in float64.

    `stderr = std(top - ratio * bottom) / (|mean(bottom)| sqrt(n))`.

    Args:
        top: `(n,)`.
        bottom: `(n,)`, paired with `top`.

    Returns:
        `(ratio, stderr)`; both `nan` if the mean of `bottom` is 0.
    """
    upper, lower = top.detach().double().cpu(), bottom.detach().double().cpu()
    mean = float(lower.mean())
    if mean == 0:
        return math.nan, math.nan
    ratio = float(upper.mean()) / mean
    return ratio, mean_and_stderr((upper - ratio * lower) / mean)[1]
