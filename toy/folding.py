"""A generator that folds the noise, `g(x) = |x|` entry by entry: many noise laws have the same output law.

With `r(y) = q.y - sum_i Q_i y_i^2/2` the entries are independent; with `b = q_i/alpha`, `h = Q_i/alpha`,
`s = 1/(1 + h)` an entry of the output law is `N(s b, s)` truncated to the half-line, and the tilted noise law is its
even extension. Any other rule for the signs gives a law with the same outputs at a larger divergence from `p0`
(Theorem 3, part 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from scipy.integrate import quad
from torch import Tensor
from torch.special import log_ndtr, ndtri

from hnkit.errors import InputError
from hnkit.maps import NoiseMap
from hnkit.tilt import NoiseLaw
from hnkit.toy.numerics import monotone_transport, normal_cdf
from hnkit.toy.problem import Toy, float64, require_alpha

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Folding(Toy):
    """`y = |x|` entry by entry, `r(y) = slope . y - sum_i curvature_i y_i^2 / 2`.

    Args:
        slope: `q`, `(d,)`.
        curvature: `Q`, `(d,)`, each entry above `-alpha`.
        alpha: temperature.

    Source:
        arXiv 2508.09968, Theorem 3.
    """

    unavailable = Toy.unavailable - {"alternatives"}
    discontinuous = frozenset({"l2_map"})
    injective = False

    slope: Tensor
    curvature: Tensor
    alpha: float = 1.0
    name: str = field(default="folding", kw_only=True)

    def __post_init__(self) -> None:
        require_alpha(self.alpha)
        for attribute in ("slope", "curvature"):
            object.__setattr__(self, attribute, float64(getattr(self, attribute)))
        if self.slope.dim() != 1 or self.slope.numel() == 0 or self.slope.shape != self.curvature.shape:
            given = (tuple(self.slope.shape), tuple(self.curvature.shape))
            raise InputError(f"slope and curvature of shapes {given[0]}, {given[1]}: give (d,) and (d,)")
        if not bool((self.curvature > -self.alpha).all()):
            raise InputError("a curvature is at most -alpha, so Z* is infinite: give larger ones")

    @property
    def statement(self) -> str:
        """One line: generator, reward, dimension."""
        return f"y = |x| in {self.dim} dimensions, quadratic reward, alpha = {self.alpha:g}"

    @property
    def dim(self) -> int:
        """Dimension `d` of the noise."""
        return int(self.slope.numel())

    @cached_property
    def _tilt(self) -> tuple[Tensor, Tensor, Tensor]:
        """`b`, `h` and `s = 1/(1 + h)`, each `(d,)`."""
        b, h = self.slope / self.alpha, self.curvature / self.alpha
        return b, h, 1 / (1 + h)

    @cached_property
    def _log_z(self) -> Tensor:
        b, _, s = self._tilt
        log_z: Tensor = math.log(2) + 0.5 * (torch.log(s) + s * b.square()) + log_ndtr(b * s.sqrt())
        return log_z

    def generate(self, x: Tensor) -> Tensor:
        """`|x|`, `(n, d)`."""
        return x.abs()

    def reward(self, y: Tensor) -> Tensor:
        """`q.y - sum_i Q_i y_i^2/2`, `(n,)`."""
        return (self.slope.to(y) * y - 0.5 * self.curvature.to(y) * y.square()).sum(1)

    def log_z(self) -> float:
        """`sum_i log(2 sqrt(s) exp(s b^2/2) Phi(b sqrt(s)))`."""
        return float(self._log_z.sum())

    def log_z_check(self) -> tuple[float, float]:
        """Adaptive quadrature over the whole line, one integral for each entry, through generator and reward."""
        entries = [Folding(q[None], Q[None], self.alpha) for q, Q in zip(self.slope, self.curvature, strict=True)]
        values, errors = zip(*(entry._log_z_by_quadrature() for entry in entries), strict=True)
        return sum(values), sum(errors)

    def _log_z_by_quadrature(self) -> tuple[float, float]:
        """Logarithm of Z* of a problem of one entry, and its error."""
        b, _, s = (float(part) for part in self._tilt)
        peak = max(0.0, b * s)  # the integrand is largest at both signs of it, and may be narrow there

        def exponent(x: float) -> float:
            return float(self.log_tilt(torch.tensor([[x]], dtype=torch.float64))) - 0.5 * x * x - _HALF_LOG_2PI

        top = exponent(peak)
        reach = 12 * max(math.sqrt(s), s) + peak
        cuts = sorted({-reach, -peak, 0.0, peak, reach})
        parts = [quad(lambda x: math.exp(exponent(x) - top), *ends, epsabs=0, epsrel=1e-11) for ends in pairwise(cuts)]
        value = sum(part[0] for part in parts)
        return top + math.log(value), sum(part[1] for part in parts) / value + 1e-13

    def _log_density(self, x: Tensor) -> Tensor:
        """Log density of each entry of the tilted noise law."""
        b, h, _ = (part.to(x) for part in self._tilt)
        return b * x.abs() - 0.5 * (1 + h) * x.square() - _HALF_LOG_2PI - self._log_z.to(x)

    def _score(self, x: Tensor) -> Tensor:
        b, h, _ = (part.to(x) for part in self._tilt)
        return b * x.sign() - (1 + h) * x

    def log_p0_star(self, x: Tensor) -> Tensor:
        """Sum over entries of `log p0(x) + b|x| - h x^2/2 - log Z`."""
        return self._log_density(x).sum(1)

    def _sample_outputs(self, n: int, generator: torch.Generator) -> Tensor:
        b, _, s = self._tilt
        if n < 1:
            raise InputError(f"{n} samples: give at least 1")
        u = torch.rand(n, self.dim, dtype=torch.float64, generator=generator).clamp(min=1e-16)
        outputs: Tensor = s * b - s.sqrt() * ndtri(u * normal_cdf(b * s.sqrt()))
        return outputs.clamp(min=0)

    def _signs(self, n: int, generator: torch.Generator, positive: float = 0.5) -> Tensor:
        u = torch.rand(n, self.dim, dtype=torch.float64, generator=generator)
        return torch.where(u < positive, 1.0, -1.0).double()

    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """Truncated normals with independent fair signs."""
        return self._sample_outputs(n, generator) * self._signs(n, generator)

    def log_p_base(self, y: Tensor) -> Tensor:
        """Log density `d log 2 + log p0(y)` on the positive orthant, minus infinity off it."""
        density = (-0.5 * y.square() - _HALF_LOG_2PI + math.log(2)).sum(1)
        return torch.where((y >= 0).all(1), density, -math.inf)

    def log_p_star(self, y: Tensor) -> Tensor:
        """Log density of `N(s b, s)` truncated to the positive half-line, entry by entry."""
        b, _, s = (part.to(y) for part in self._tilt)
        z = (y - s * b) / s.sqrt()
        density = (-0.5 * (z.square() + torch.log(s)) - _HALF_LOG_2PI - log_ndtr(b * s.sqrt())).sum(1)
        return torch.where((y >= 0).all(1), density, -math.inf)

    def optimal_map(self) -> NoiseMap:
        """The odd increasing map of each entry: `2 Phi(-|x|)` becomes the tail mass of the truncated normal."""

        def f(x: Tensor) -> Tensor:
            b, _, s = (part.to(x) for part in self._tilt)
            with torch.no_grad():
                kept, cut = normal_cdf(b * s.sqrt()), normal_cdf(-b * s.sqrt())
                upper = 2 * normal_cdf(-x.abs()) * kept
                lower = cut + kept * torch.erf(x.abs() / math.sqrt(2))
                z = torch.where(lower < 0.5, ndtri(lower), -ndtri(upper))
                T = torch.where(x >= 0, 1.0, -1.0).to(x) * (s * b + s.sqrt() * z).clamp(min=0)
            return monotone_transport(x, T, self._log_density, self._score) - x

        return f

    def l2_map(self) -> NoiseMap:
        """`x + f(x) = s sign(x) max(|x| + b, 0)`: a jump over 0 where `b > 0`, soft thresholding where `b < 0`."""

        def f(x: Tensor) -> Tensor:
            b, _, s = (part.to(x) for part in self._tilt)
            sign = torch.where(x >= 0, 1.0, -1.0).to(x)
            return s * sign * torch.relu(sign * x + b) - x

        return f

    def kl_optimal(self) -> float:
        """`sum_i b E|x_i| - h E x_i^2/2 - log Z_i`, with the moments of a truncated normal."""
        b, h, s = self._tilt
        mean, scale = s * b, s.sqrt()
        ratio = torch.exp(-0.5 * (mean / scale).square() - _HALF_LOG_2PI - log_ndtr(mean / scale))
        first = mean + scale * ratio
        second = s + mean.square() + mean * scale * ratio
        return float((b * first - 0.5 * h * second - self._log_z).sum())

    def l2_gap(self) -> float:
        """`sum_i (s - 1 - log s)/2 + log(2 Phi(b sqrt(s)))`; infinite if some `b < 0`, which puts mass on `x_i = 0`."""
        b, _, s = self._tilt
        if bool((b < 0).any()):
            return math.inf
        return float((0.5 * (s - 1 - torch.log(s)) + math.log(2) + log_ndtr(b * s.sqrt())).sum())

    def alternatives(self) -> list[NoiseLaw]:
        """The same outputs with other signs: all positive, one entry biased, all signs equal."""
        optimum = self.kl_optimal()
        bias = 0.9
        entropy = -bias * math.log(bias) - (1 - bias) * math.log(1 - bias)

        def biased(n: int, generator: torch.Generator) -> Tensor:
            magnitude = self._sample_outputs(n, generator)
            signs = self._signs(n, generator)
            signs[:, 0] = self._signs(n, generator, bias)[:, 0]
            return magnitude * signs

        def equal(n: int, generator: torch.Generator) -> Tensor:
            return self._sample_outputs(n, generator) * self._signs(n, generator)[:, :1]

        laws = [
            NoiseLaw("folded to the positive orthant", self._sample_outputs, optimum + self.dim * math.log(2)),
            NoiseLaw(f"first sign positive with probability {bias:g}", biased, optimum + math.log(2) - entropy),
        ]
        if self.dim > 1:
            laws.append(NoiseLaw("all signs equal", equal, optimum + (self.dim - 1) * math.log(2)))
        return laws


def folding(alpha: float = 0.5) -> Folding:
    """The default: two entries, both pushed away from the fold."""
    return Folding(torch.tensor([0.6, 0.3]), torch.tensor([0.25, 1.0]), alpha)


__all__ = ["Folding", "folding"]
