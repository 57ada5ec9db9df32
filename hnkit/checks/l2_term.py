"""The verdict on the L2 term against dense Jacobians at the same samples: its ratio, its shares, and its words."""

from __future__ import annotations

import math
import re

from torch import Tensor

from hnkit.checks.check import UNDERFLOWN, Finding, confidence_radius, worst
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.jacobian import dense_jacobian
from hnkit.kl.verdict import PERCENT_BELOW, PROBES

_ROUNDED = 0.06
"""Figures in words have two digits or more; a share that is rounded outward to two is off by a twentieth at most."""


def l2_verdict(measured: MeasuredMap) -> Finding:
    """The worst deviation of the verdict's figures and words from the dense ones, as a share of what is allowed.

    Allowed is the confidence radius of its Rademacher probes, whose variance is known from the dense Jacobians: that of
    `v' B v` is twice the sum of the squares off the diagonal of the symmetric part of B.
    """
    verdict = measured.l2_verdict
    if verdict is None:
        raise NotApplicable("one sample tells nothing of its own error: use --samples 2 or more")
    count = verdict.samples
    if measured.dense_count < count:
        raise NotApplicable(f"needs dense Jacobians of {count} samples")
    l2 = float(measured.half_square[:count].mean())
    J = dense_jacobian(*measured.first(count))
    if l2 == 0 and not bool(J.any()):
        vanishes = math.isnan(verdict.ratio.value) and "f vanishes at every sample" in str(verdict)
        return Finding(float(not (vanishes and verdict.good)), 0.0, 0.0, note="f vanishes at every sample")
    if l2 == 0:
        raise NotApplicable("f vanishes at every sample, and its Jacobian does not")
    if l2 < UNDERFLOWN:
        raise NotApplicable(f"|f|²/2 = {l2:.3g} is so small that its digits have underflowed")
    square, cube = J @ J / 2, J @ J @ J / 3
    second, third = (float(_trace(B).mean()) / l2 for B in (square, square - cube))
    error = float(measured.rows.error[:count].mean()) / l2
    floor = measured.resolution * (1 + float(J.square().sum((1, 2)).mean()) / l2)
    radius, radius_third = (_radius(B, l2, count) + floor for B in (square, square - cube))
    text = str(verdict)
    deviations = {
        "ratio": abs(verdict.ratio.value - second) / radius,
        "ratio in words": abs(_ratio_in_words(text) - second)
        / (radius + _ROUNDED * (abs(second) + verdict.ratio.stderr)),
        "share": _beyond(third, *_excess(verdict.missed, verdict.missed), radius_third),
        "interval": _beyond(error, *_excess(verdict.lower, verdict.upper), radius_third),
        "words": _beyond(error, *_excess(*_claimed(text)), radius_third),
        "rough words": _beyond(third, *_excess(*_roughly(text)), radius_third),
        "advice": 0.0 if (verdict.advice == "l2") == verdict.good and _advised(text) == verdict.advice else math.inf,
    }
    note = f"tr(J²) is {_times(second)} |f|², E(J) {_times(error)} |f|²/2 at {count} samples"
    found = worst(*deviations.values())
    if not found <= 1:
        note += f"; off: {', '.join(name for name, value in deviations.items() if not value <= 1)}"
    return Finding(found, 1.0, 0.0, "<=", note)


def _times(ratio: float) -> str:
    """A ratio in words, in percent where it is small."""
    return f"{ratio:.3g} times" if abs(ratio) >= PERCENT_BELOW else f"{100 * ratio:.3g} % of"


def _trace(B: Tensor) -> Tensor:
    return B.diagonal(dim1=1, dim2=2).sum(1)


def _radius(B: Tensor, l2: float, count: int) -> float:
    """Confidence radius of the mean of `v' B v` over probes and samples, over the L2 term."""
    symmetric = (B + B.mT) / (2 * l2)  # squared as a ratio, which does not underflow
    off = symmetric.square().sum((1, 2)) - symmetric.diagonal(dim1=1, dim2=2).square().sum(1)
    variance = float((2 * off.clamp(min=0)).sum()) / PROBES / count**2
    return confidence_radius(math.sqrt(variance), count * PROBES)


def _beyond(value: float, least: float, most: float, radius: float) -> float:
    """How far a figure lies outside an interval, over the radius; NaN where one is NaN."""
    if value < least:
        return (least - value) / radius
    return (value - most) / radius if not value <= most else 0.0


def _excess(lower: float, upper: float) -> tuple[float, float]:
    """An interval of `(KL - L2) / L2`, in which errors add up, from one of the share `(KL - L2) / KL`.

    A share that is not a number means that the KL is not positive; one of 1 and more bounds nothing.
    """
    least, most = (share / (1 - share) if -math.inf < share < 1 else None for share in (lower, upper))
    if math.isnan(lower) and math.isnan(upper):
        return -math.inf, -1.0
    return -math.inf if least is None else least, math.inf if most is None else most


_NUMBER = r"([\d.]+(?:e[-+]?\d+)?)"


def _ratio_in_words(text: str) -> float:
    """`E tr(J^2) / E|f|^2` as the words say it; NaN where it does not."""
    found = re.search(r"tr\(J²\) is (\S+)(?: ± \S+)? (% of|times) \|f\|²", text)
    return float(found[1]) / (100 if found[2] == "% of" else 1) if found else math.nan


def _claimed(text: str) -> tuple[float, float]:
    """The interval of the share that the words claim with 95 %; without bounds where they claim none."""
    if found := re.search(rf"is (?:shown to be )?within {_NUMBER} % of the KL", text):
        return -float(found[1]) / 100, float(found[1]) / 100
    if found := re.search(rf"(misses|overcounts) {_NUMBER} % to {_NUMBER} % of the KL", text):
        near, far = float(found[2]) / 100, float(found[3]) / 100
        return (near, far) if found[1] == "misses" else (-far, -near)
    return -math.inf, math.inf


def _roughly(text: str) -> tuple[float, float]:
    """The interval of the share to third order that the words leave, two digits being rounded outward."""
    if found := re.search(rf"(misses|overcounts) about {_NUMBER} % of the KL", text):
        size = float(found[2]) / 100
        return (0.9 * size, size) if found[1] == "misses" else (-size, -0.9 * size)
    if found := re.search(rf"is about {_NUMBER} times the KL", text):
        return 1 - (1 + _ROUNDED) * float(found[1]), 1 - (1 - _ROUNDED) * float(found[1])
    return (math.nan, math.nan) if "far above the KL" in text else (-math.inf, math.inf)


def _advised(text: str) -> str:
    """Which term the words advise."""
    found = re.match(r"use --kl (\S+):", text)
    return found[1] if found else "l2"
