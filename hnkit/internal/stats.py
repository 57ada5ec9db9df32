"""Means with their standard errors: the one place where a Monte Carlo error bar is computed, and its record."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from scipy.special import stdtrit
from torch import Tensor

# A spread below this share of the mean is rounding: every sample has the same value.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """An estimated number with its Monte Carlo error and, where one is proved, a bound of its bias.

    `str` rounds the value to the second digit of its standard error: `7.518 ± 0.068`.

    Attributes:
        value: the estimate, in the unit of what it estimates.
        stderr: its standard error; NaN where it is unknown, as for a single sample. Zero is known: all samples agree.
        bias_bound: proved bound of `|E[value] - truth|`; `None` where none is known.
    """

    value: float
    stderr: float
    bias_bound: float | None = None

    @classmethod
    def of(cls, samples: Tensor, *, bias_bound: float | None = None) -> Estimate:
        """The mean of independent samples `(n,)`, n >= 1, with its standard error (see `mean_and_stderr`)."""
        return Estimate(*mean_and_stderr(samples), bias_bound)

    def __str__(self) -> str:
        text = rounded_to_error(self.value, self.stderr)
        return f"{text} (bias at most {rounded_up(self.bias_bound, 2)})" if self.bias_bound else text


def student_quantile(probability: float, freedom: float) -> float:
    """What Student's t with `freedom` degrees of freedom stays below with `probability`."""
    return float(stdtrit(freedom, probability))  # as scipy.stats, which takes half a second to import


def rounded_to_error(value: float, stderr: float) -> str:
    """`value ± stderr`, both rounded to the second digit of the standard error, as errors are quoted.

    An error that is not known (NaN) is said to be unknown. Where there is none, or rounding alone, every sample has the
    same value, which the mean is exactly.
    """
    if math.isnan(stderr):
        return f"{value:.5g} ± unknown"
    if not math.isfinite(value):
        return f"{value:.6g} ± {0 if math.isfinite(stderr) else stderr}"
    if stderr <= _ROUNDING * abs(value):
        return short_exponents(f"exactly {value:.6g}") if value else "0"
    if not math.isfinite(stderr):
        return f"{value:.5g} ± {stderr}"
    places = max(0, 1 - math.floor(math.log10(stderr)))
    if abs(value) >= 1e6 or 0 < max(abs(value), stderr) < 1e-4:
        return short_exponents(f"{value:.3g} ± {stderr:.2g}")
    return f"{round(value, places) + 0.0:.{places}f} ± {stderr:.{places}f}"  # + 0.0: no zero has a sign


def short_exponents(text: str) -> str:
    """Numbers as they are read by people: 1.5e-7, not 1.5e-07."""
    return _EXPONENT.sub(r"e\1\2", text)


_EXPONENT = re.compile(r"(?<=\d)e(?:\+|(-))0*(\d)")


def rounded_up(value: float, digits: int = 4, *, below: float = math.inf) -> str:
    """An upper bound for people: the least number of so many significant digits that, read back, is not below it.

    Where that is no longer below `below`, though the bound is, it has all 17 digits.
    """
    return _directed(value, digits, ROUND_CEILING, value < below, lambda shown: shown < below)


def rounded_down(value: float, digits: int = 4, *, above: float = -math.inf) -> str:
    """A lower bound for people: the largest number of so many significant digits that, read back, is not above it."""
    return _directed(value, digits, ROUND_FLOOR, value > above, lambda shown: shown > above)


def _directed(value: float, digits: int, rounding: str, inside: bool, kept: Callable[[float], bool]) -> str:
    if not math.isfinite(value):
        return str(value)
    rounded = Context(prec=digits, rounding=rounding).create_decimal(Decimal(repr(float(value))))
    if inside and not kept(float(rounded)):
        return repr(value)
    return short_exponents(f"{float(rounded):.{digits}g}")


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
    return mean, standard_deviation(values) / math.sqrt(count)


def standard_deviation(values: Tensor) -> float:
    """Of samples `(n,)`, n >= 2, with n - 1 degrees of freedom; of any size whose differences are numbers."""
    found = float(values.std())
    if 1e-150 < found < math.inf:
        return found
    centred = values - values.mean()  # their squares over- or underflow
    scale = float(centred.abs().max())
    return scale * float((centred / scale).std()) if 0 < scale < math.inf else found


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
