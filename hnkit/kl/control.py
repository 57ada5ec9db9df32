"""Fewer samples for the same error: regression on figures whose mean is known, or cheap to know.

A coefficient that is fitted to the samples it corrects biases their mean, because the two depend on each other. Here
each sample is corrected with a coefficient that other samples gave: what it multiplies has mean zero, and so has the
product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.stats import Estimate, mean_and_stderr

FEWEST = 8
"""Samples below which no coefficient is fitted: one from a handful of others is noise."""


def leave_one_out(values: Tensor, control: Tensor) -> Tensor:
    """`values + c control`, `(n,)`, with the coefficient of each sample from all the others; `control` has mean zero.

    The mean is unbiased: `E[c_(-i) s_i] = E[c_(-i)] E[s_i] = 0`. Below `FEWEST` samples `values` come back as they are.

    Args:
        values: `(n,)` independent samples.
        control: `(n,)`, paired with them, each of mean zero.

    Source: `proofs/stein_control_variate`.
    """
    return values if len(values) < FEWEST else values - _slopes_of_others(values, control)[0] * control


def controlled_mean(values: Tensor, control: Tensor) -> Estimate:
    """The mean of `leave_one_out(values, control)` with its standard error.

    The corrected samples share what their coefficients came from, so that their spread is not that of independent
    ones: the error is that of a regression line at the control's mean 0, of square `sum_i w_i^2 e_i^2`, with the
    distance `e_i` of each sample from the line through all others, whatever the law of the residuals (HC3: MacKinnon
    and White 1985, doi 10.1016/0304-4076(85)90158-7).
    """
    n = len(values)
    if n < FEWEST:
        return Estimate(*mean_and_stderr(values))
    slopes, residuals = _slopes_of_others(values, control)
    s = control.double()
    s0 = s - s.mean()
    square = s0.square().sum()
    weights = torch.full_like(s, 1 / n)
    if bool(square > 1e-20 * s.square().sum()):
        weights = weights - s.mean() * s0 / square
    return Estimate(float((values - slopes * control).mean()), float((weights * residuals).norm()))


def _slopes_of_others(values: Tensor, control: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample the slope of the line through all others, and its distance from that line, `(n,)` each."""
    y, s = values.double(), control.double()
    others = len(values) - 1
    # Centred first, so that the sums over the others lose no digits.
    y0, s0 = y - y.mean(), s - s.mean()
    rest_y, rest_s = -y0 / others, -s0 / others  # means over the others of the centred samples
    cross = (y0 * s0).sum() - y0 * s0 - others * rest_y * rest_s
    square = s0.square().sum() - s0.square() - others * rest_s.square()
    known = square > 1e-20 * s.square().sum()
    slopes = torch.where(known, cross / torch.where(known, square, torch.ones_like(square)), 0.0)
    return slopes, y0 - rest_y - slopes * (s0 - rest_s)


def two_level_mean(values: Tensor, cheap: Tensor, further: Tensor) -> Estimate:
    """The mean of few expensive samples, regressed on a cheap figure that many more samples have.

    Each half of the expensive samples is corrected by the coefficient of the other,
    `mean(y_A - b_B g_A) + b_B mean(g of the further samples)`, and the halves are averaged: unbiased, for the
    coefficient is independent of what it multiplies. The standard error is that of independent means, given the
    coefficients.

    Args:
        values: `(n,)`, n >= 16, in an order that does not matter.
        cheap: `(n,)`, the cheap figure at the same samples.
        further: `(N,)`, N >= 8, the cheap figure at samples of the same law, independent of the others.

    Raises:
        InputError: too few samples.
    """
    n = len(values)
    if n < 2 * FEWEST or len(further) < FEWEST:
        raise InputError(f"{n} expensive and {len(further)} further samples: give {2 * FEWEST} and {FEWEST} or more")
    y, g = values.double(), cheap.double()
    halves = [torch.arange(start, n, 2) for start in (0, 1)]
    coefficients = [_slope(y[half], g[half]) for half in halves]
    means, variance = [], 0.0
    for half, slope in zip(halves, reversed(coefficients), strict=True):
        mean, stderr = mean_and_stderr(y[half] - slope * g[half])
        means.append(mean)
        variance += (stderr * len(half) / n) ** 2
    weights = [len(half) / n for half in halves]
    slope = sum(w * b for w, b in zip(weights, reversed(coefficients), strict=True))
    mean, stderr = mean_and_stderr(further)
    value = sum(w * part for w, part in zip(weights, means, strict=True)) + slope * mean
    return Estimate(value, math.sqrt(variance + (slope * stderr) ** 2))


def _slope(y: Tensor, g: Tensor) -> float:
    centred = g - g.mean()
    square = float(centred.square().sum())
    return float((centred * y).sum()) / square if square > 1e-20 * float(g.square().sum()) else 0.0
