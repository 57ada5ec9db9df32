"""Whether the L2 term is good enough in place of the KL, from a handful of products at a few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hnkit.errors import InputError, MissingDerivativeError
from hnkit.internal.seeds import check_generator
from hnkit.internal.stats import Estimate, ratio_and_stderr, rounded_to_error, short_exponents, student_quantile
from hnkit.jacobian import RowJacobian, check_batch, check_map, rows_per_pass
from hnkit.kl.estimators import dot, draw_probes
from hnkit.kl.method import check_counts, check_fractions
from hnkit.lipschitz.local import RESOLVED, local_norms
from hnkit.maps import NoiseMap, chunked

TOLERANCE = 0.1
"""Share of the KL that the L2 term may miss: a small budget buys a gain proportional to the root of its nats
(`proofs/small_nats`), so that nats off by a tenth move an efficiency, gain over best gain, by a twentieth."""

PROBES = 4
"""Probes per sample, three transposed products each."""

PERCENT_BELOW = 3
"""Ratio from which words say "47 times" instead of "4,700 % of"."""

_EXACT_UP_TO = 512
"""Dimension up to which d products per sample are cheap enough to be advised."""
_NORM_TOLERANCE = 0.02
_LEVEL = 0.95

Advice = Literal["l2", "second-order", "arnoldi", "exact"]


@dataclass(frozen=True)
class L2Verdict:
    """How far the L2 term is from the KL integrand's mean, `KL = E[|f|^2/2 + E(J)]`, and which `--kl` to use.

    To third order the L2 term leaves out `tr(J^2)/2 - tr(J^3)/3`; what is left is bounded at a sample by `|J^2|_F`,
    `|J^3|_F` and `|J|_2` (see `proofs/second_order`), by infinity where `|J|_2 >= 1`. `KL` is the KL where `x + f(x)`
    is injective, and a lower bound of it elsewhere.

    Attributes:
        missed: estimate of `(KL - L2) / KL`, to third order; negative where the L2 term overcounts. No unit, as all
            shares here; NaN where the estimated KL is not positive.
        lower: lower end of its 95 % interval, sampling error and remainder together; minus infinity if unbounded.
        upper: upper end.
        ratio: `E tr(J^2) / E|f|^2`, which is `E[tr(J^2)/2]` over the L2 term.
        remainder: bound of what lies beyond the third order, over the L2 term; infinite where a local norm is 1 or more
            or not known.
        local_norm: largest `|J(x)|_2` of the samples; NaN where it is not known.
        tolerance: largest share that counts as good enough.
        advice: the term that is good enough, as `--kl` names it.
        samples: n.
        products: products with J and its transpose, over all samples.
    """

    missed: float
    lower: float
    upper: float
    ratio: Estimate
    remainder: float
    local_norm: float
    tolerance: float
    advice: Advice
    samples: int
    products: int

    @property
    def within(self) -> float:
        """The share of the KL that the L2 term is within, with 95 % confidence; infinite if nothing bounds it."""
        return max(abs(self.lower), abs(self.upper))

    @property
    def good(self) -> bool:
        """Whether that is no more than the tolerance."""
        return self.within <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain values, its words as `text`."""
        keys = (
            "missed", "lower", "upper", "within", "good", "advice", "remainder", "local_norm", "tolerance", "samples",
        )  # fmt: skip
        record = {key: getattr(self, key) for key in keys}
        ratio = {"ratio": self.ratio.value, "ratio_stderr": self.ratio.stderr}
        return {"text": self.sentence, **record, **ratio, "products": self.products}

    @property
    def reason(self) -> str:
        """What the verdict rests on, in one clause."""
        if math.isnan(self.ratio.value):
            return "f vanishes at every sample"
        known = self.ratio.value == 0 and self.ratio.stderr == 0
        percent = abs(self.ratio.value) < PERCENT_BELOW
        scale = 100 if percent else 1
        ratio = "0" if known else rounded_to_error(scale * self.ratio.value, scale * self.ratio.stderr)
        base = f"tr(J²) is {ratio} {'% of' if percent else 'times'} |f|²"
        if math.isfinite(self.remainder):
            return f"{base}, and what lies beyond the third order at most {_percent(self.remainder)} of |f|²/2"
        if math.isnan(self.local_norm):
            return f"{base}, and without local norms nothing bounds the rest"
        return f"{base}, and a local norm of {self.local_norm:.3g}, not below 1, leaves the rest without a bound"

    @property
    def sentence(self) -> str:
        """The verdict as a sentence, for the head of a report."""
        text = str(self)
        return f"{text[0].upper()}{text[1:]}."

    def __str__(self) -> str:
        return self.finding if self.good else f"use --kl {self.advice}: {self.finding}"

    @property
    def finding(self) -> str:
        """The verdict without its advice."""
        if self.good:
            return f"the L2 term is within {_percent(self.within)} of the KL (95 %): {self.reason}"
        verb = "overcounts" if self.missed < 0 else "misses"
        if math.isnan(self.missed) and self.local_norm >= 1:
            size = "cannot be judged by the third order"  # a divergent series: its sign means nothing
        elif math.isnan(self.missed):
            size = "is far above the KL to third order"
        elif math.isfinite(self.within) and self.lower * self.upper > 0:
            near, far = sorted((abs(self.lower), abs(self.upper)))
            size = f"{verb} {_percent(near, up=False)} to {_percent(far)} of the KL (95 %)"
        elif math.isfinite(self.within):
            size = f"is shown to be within {_percent(self.within)} of the KL only (95 %)"
        elif self.missed < -1:
            size = f"is about {1 - self.missed:.2g} times the KL to third order, an estimate that nothing bounds"
        else:
            size = (
                f"{verb} about {_percent(abs(self.missed))} of the KL to third order, an estimate that nothing bounds"
            )
        return f"the L2 term {size}; {self.reason}"


def l2_verdict(
    f: NoiseMap,
    x: Tensor,
    *,
    tolerance: float = TOLERANCE,
    probes: int = PROBES,
    generator: torch.Generator | None = None,
) -> L2Verdict:
    """Judge whether the L2 term stands for the KL of this map, from a handful of products at each sample.

    It is not the size of J that decides but `E tr(J^2) / E|f|^2`: a gradient field loses half, a rotation costs nothing
    and is counted, a generic J is counted right. The interval adds the sampling error of the mean over samples and
    probes (Student's law of n - 1 degrees of freedom on the ratio of means) and a bound of what lies beyond the third
    order, for which local norms are taken. The advice is the cheapest term that is within the tolerance: "l2",
    "second-order", else "exact" up to d = 512 and where a local norm reaches 1 there, else "arnoldi".

    Args:
        f: batch-first map, rows independent, differentiable.
        x: `(n, *shape)`, draws of `N(0, I_d)`, n >= 2; 16 to 64 give a verdict to some percent.
        tolerance: largest share of the KL that the L2 term may be off by.
        probes: probes per sample, three transposed products each.
        generator: the generator of the probes.

    Raises:
        InputError: fewer than two samples, a bad option or map.
        NonFiniteError: a non-finite value or product; the sample is named.

    Source: `proofs/second_order`, `proofs/symmetry_index`.
    """
    check_fractions(tolerance=tolerance)
    check_counts(probes=probes)
    check_generator(generator)
    check_batch(x)
    if x.shape[0] < 2:
        raise InputError("x has one sample, which tells nothing of its own error: give 2 or more, such as 16")
    try:
        check_map(f, x)
    except MissingDerivativeError:  # products with J itself: local norms stay unknown
        check_map(f, x, jvp=False)
    return verdict_of(verdict_rows(f, x, probes, generator), x[0].numel(), tolerance)


def verdict_of(rows: VerdictRows, dim: int, tolerance: float = TOLERANCE) -> L2Verdict:
    """The verdict that samples in `dim` dimensions lead to."""
    moments, norm = rows, rows.norm
    remainder = _beyond_third(moments, norm)
    correction = moments.square / 2 - moments.cube / 3
    lower, upper = _interval(correction - remainder, correction + remainder, moments.l2)
    third = -moments.cube / 3
    beyond = _interval(third - remainder, third + remainder, moments.l2 + moments.square / 2)
    largest = float(norm.max())
    advice: Advice = "arnoldi"
    if max(abs(lower), abs(upper)) <= tolerance:
        advice = "l2"
    elif max(abs(beyond[0]), abs(beyond[1])) <= tolerance:
        advice = "second-order"
    elif not largest < 1 and dim <= _EXACT_UP_TO:
        advice = "exact"
    return L2Verdict(
        missed=_share(_ratio(correction, moments.l2)),
        lower=lower,
        upper=upper,
        ratio=Estimate(*ratio_and_stderr(moments.square / 2, moments.l2)),
        remainder=_ratio(remainder, moments.l2),
        local_norm=largest,
        tolerance=tolerance,
        advice=advice,
        samples=len(moments.l2),
        products=moments.products,
    )


@dataclass(frozen=True)
class _Moments:
    """Per sample, `(n,)`: `|f|^2/2` and, from the same probes, estimates of traces and squared Frobenius norms."""

    l2: Tensor
    square: Tensor
    """`tr J^2`"""
    cube: Tensor
    """`tr J^3`"""
    fourth: Tensor
    """`|J^2|_F^2`"""
    sixth: Tensor
    """`|J^3|_F^2`"""
    products: int


@dataclass(frozen=True)
class VerdictRows(_Moments):
    """What `verdict_of` is told of samples."""

    norm: Tensor
    """`|J|_2`, moved up by the residual that is left; NaN where it is not known"""

    @classmethod
    def joined(cls, parts: Sequence[VerdictRows]) -> VerdictRows:
        """Those of successive samples as one."""
        columns = ("l2", "square", "cube", "fourth", "sixth", "norm")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in columns}
        return cls(**joined, products=sum(part.products for part in parts))


def verdict_rows(f: NoiseMap, x: Tensor, probes: int, generator: torch.Generator | None) -> VerdictRows:
    """What `verdict_of` is told of these samples."""
    moments = _moments(f, x, probes, generator)
    norm, products = _norms(f, x)
    return VerdictRows(**{**vars(moments), "products": products + moments.products}, norm=norm)


def _moments(f: NoiseMap, x: Tensor, probes: int, generator: torch.Generator | None) -> _Moments:
    n, dim = x.shape[0], x[0].numel()
    columns = []
    products = 0
    rows = torch.arange(n, device=x.device).repeat_interleave(probes)
    for index, inner, points in chunked(f, x, rows_per_pass(dim, x.device), rows):
        operator = RowJacobian(inner, points, samples=index)
        probe = draw_probes(index.numel(), dim, "rademacher", generator, x.device)
        second = operator.vjp(operator.vjp(probe))
        third = operator.vjp(second)
        l2 = operator.value.square().sum(1) / 2
        sizes = second.square().sum(1), third.square().sum(1)
        columns.append(torch.stack([l2, dot(probe, second), dot(probe, third), *sizes]))
        products += operator.num_vjp
    l2, square, cube, fourth, sixth = torch.cat(columns, 1).reshape(5, n, probes).mean(2)
    return _Moments(l2, square, cube, fourth, sixth, products)


def _beyond_third(moments: _Moments, norm: Tensor) -> Tensor:
    """Bound of `|E(J) - tr(J^2)/2 + tr(J^3)/3|` per sample, linear in what is estimated, so that no bias enters.

    Over the eigenvalues, `sum_(k >= 4) |z|^k / k <= |z|^4/4 + (L |z|^4 + |z|^6/L)/10 + |z|^6 / (6 (1 - L))` for
    `|z| <= L < 1`; and by Schur `sum |z|^4 <= |J^2|_F^2`, `sum |z|^6 <= |J^3|_F^2`.
    """
    inside = norm < 1
    L = torch.where(inside & (norm > 0), norm, 0.5)
    bound = moments.fourth * (1 / 4 + L / 10) + moments.sixth * (1 / (10 * L) + 1 / (6 * (1 - L)))
    # J^2 = 0 leaves nothing, whatever the norm.
    return torch.where(inside | (moments.fourth == 0), bound, torch.inf)


def _norms(f: NoiseMap, x: Tensor) -> tuple[Tensor, int]:
    """`|J(x)|_2` per row, moved up by the residual that is left, and the products spent; NaN where it is not known."""
    try:
        found = local_norms(f, x, tolerance=_NORM_TOLERANCE)
    except MissingDerivativeError:
        return torch.full((x.shape[0],), torch.nan, dtype=torch.float64, device=x.device), 0
    known = torch.where(found.residual <= RESOLVED, found.value * (1 + found.residual), torch.nan)
    return known, found.products


def _interval(least: Tensor, most: Tensor, base: Tensor) -> tuple[float, float]:
    """95 % interval of the share `u / (1 + u)`, `u` between `E least / E base` and `E most / E base`."""
    if not bool(base.any()) and not bool(least.any()) and not bool(most.any()):
        return 0.0, 0.0
    if not float(base.mean()) > 0:
        return -math.inf, math.inf
    # A mean that few samples carry is known as well as from so few: their law has the fewer degrees of freedom.
    shares = base / base.max()
    carrying = float(shares.sum().square() / shares.square().sum())
    if carrying < 2:
        return -math.inf, math.inf
    factor = student_quantile((1 + _LEVEL) / 2, carrying - 1)
    ends = [
        value + sign * factor * stderr
        for sign, (value, stderr) in ((-1, _bounded_ratio(least, base)), (1, _bounded_ratio(most, base)))
    ]
    # Written so that a NaN bounds nothing.
    return (
        _share(ends[0]) if ends[0] > -1 else -math.inf,
        _share(ends[1]) if ends[0] > -1 and ends[1] < math.inf else math.inf,
    )


def _bounded_ratio(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """`ratio_and_stderr`, with an infinite mean of `top` as it is."""
    if not bool(top.isfinite().all()):
        return float(top.mean()), 0.0
    return ratio_and_stderr(top, bottom)


def _ratio(top: Tensor, base: Tensor) -> float:
    """Ratio of two means; 0 where both vanish, infinite where the base alone does."""
    above, below = float(top.mean()), float(base.mean())
    return above / below if below > 0 else math.copysign(math.inf, above) if above else 0.0


def _share(u: float) -> float:
    """`u / (1 + u)`, which `(KL - L2) / KL` is for `u = (KL - L2) / L2`; NaN where the KL is not positive."""
    if u == math.inf:
        return math.nan
    return u / (1 + u) if u > -1 else math.nan


def _percent(share: float, *, up: bool = True) -> str:
    """Percent to two digits at most, rounded outward: within 4.23 % is within 4.3 %, and at least 4.28 % is 4.2 %."""
    percent = 100 * share
    if percent == 0:
        return "0 %"
    unit = 10.0 ** min(0, math.floor(math.log10(percent)) - 1)
    steps = percent / unit
    rounded = math.ceil(steps - 1e-9) if up else math.floor(steps + 1e-9)
    return short_exponents(f"{rounded * unit:.12g} %")
