"""One dimension, any reward: quadrature, the monotone transport, and the proximal map with its jumps.

With `rho(x) = r(g(x))/alpha` the tilted noise law has density `p0(x) exp(rho(x))/Z*`. The optimal map is the increasing
map `T = F*^-1 o Phi`. The L2 optimum is `argmin_u psi(u) - x u` with `psi(u) = u^2/2 - rho(u)`: it runs along the
convex hull of `psi` and jumps over every interval on which `psi` lies above its hull.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor

from hnkit.errors import InputError
from hnkit.maps import NoiseMap
from hnkit.toy.numerics import (
    Panels,
    antiderivative,
    derivatives,
    integrate,
    monotone_transport,
    normal_cdf,
    solve_increasing,
    with_derivatives,
)
from hnkit.toy.problem import Toy, require_alpha, standard_normal

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_STEP = 0.01
_RANGE = 40.0
_NATS = 60.0  # the window holds every point whose tilted density is above exp(-60) of the largest
_REACH = 10.0  # noise beyond it has probability 1.5e-23


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class OneDimensional(Toy):
    """`y = g(x)` on the line with any increasing generator and any reward.

    Args:
        reward_function: `r`, acts entry by entry, differentiable away from `breakpoints`.
        generator_function: `g`, increasing, acts entry by entry; default the identity.
        inverse_function: `g^-1`; needed unless `g` is the identity.
        breakpoints: noise `x` at which `r(g(x))` or its derivatives break; the L2 optimum is then unavailable.
        alpha: temperature.
        formula: the reward and the generator in words, for reports.

    Raises:
        InputError: the tilted law does not fit into `|x| < 40`, where `Z*` is taken to be infinite.
    """

    injective = True

    reward_function: Callable[[Tensor], Tensor]
    generator_function: Callable[[Tensor], Tensor] = _identity
    inverse_function: Callable[[Tensor], Tensor] | None = None
    breakpoints: tuple[float, ...] = ()
    alpha: float = 1.0
    formula: str = "a reward on the line"
    name: str = field(default="one-dimensional", kw_only=True)

    def __post_init__(self) -> None:
        require_alpha(self.alpha)
        if self.inverse_function is None and self.generator_function is not _identity:
            raise InputError("generator_function without inverse_function: give both, densities of outputs need g^-1")
        if list(self.breakpoints) != sorted(set(self.breakpoints)):
            raise InputError(f"breakpoints {self.breakpoints} are not increasing: sort them, each once")

    @property
    def statement(self) -> str:
        """One line: generator, reward, dimension."""
        return f"{self.formula}, alpha = {self.alpha:g}"

    @property
    def dim(self) -> int:
        """1."""
        return 1

    @property
    def unavailable(self) -> frozenset[str]:  # type: ignore[override]
        """With break points also the L2 optimum, whose law may then have atoms."""
        return Toy.unavailable | (frozenset({"l2_map", "l2_gap"}) if self.breakpoints else frozenset())

    @property
    def discontinuous(self) -> frozenset[str]:  # type: ignore[override]
        """The L2 optimum, if `psi` is not convex."""
        return frozenset({"l2_map"} if not self.breakpoints and len(self._branches) > 1 else ())

    def generate(self, x: Tensor) -> Tensor:
        """`g(x)`, `(n, 1)`."""
        return self.generator_function(x)

    def reward(self, y: Tensor) -> Tensor:
        """`r(y)`, `(n,)`."""
        return self.reward_function(y)[:, 0]

    # The tilted law, by quadrature on panels. Functions below act entry by entry, on any shape.

    def _rho(self, x: Tensor) -> Tensor:
        return self.reward_function(self.generator_function(x)) / self.alpha

    def _log_weight(self, x: Tensor) -> Tensor:
        """`log(p0(x) exp(rho(x)))`."""
        return self._rho(x) - 0.5 * x.square() - _HALF_LOG_2PI

    @cached_property
    def _grid(self) -> Tensor:
        return torch.linspace(-_RANGE, _RANGE, round(2 * _RANGE / _STEP) + 1, dtype=torch.float64)

    @cached_property
    def _peak(self) -> tuple[float, float, float]:
        """Largest log weight on the grid, and the window around all that matters."""
        weight = self._log_weight(self._grid)
        if not bool(torch.isfinite(weight).any()) or bool(torch.isnan(weight).any()):
            raise InputError(f"the reward of {self.name!r} is NaN or nowhere finite on [-40, 40]")
        top = float(weight.max())
        inside = (weight > top - _NATS).nonzero()[:, 0]
        if int(inside[0]) == 0 or int(inside[-1]) == len(weight) - 1:
            raise InputError(f"the tilted law of {self.name!r} reaches beyond |x| = 40: raise alpha")
        return top, float(self._grid[inside[0] - 1]), float(self._grid[inside[-1] + 1])

    def _edges(self, low: float, high: float) -> Tensor:
        inner = [b for b in self.breakpoints if low < b < high]
        edges = torch.linspace(low, high, max(2, math.ceil(4 * (high - low))), dtype=torch.float64)
        return torch.tensor(sorted({*edges.tolist(), *inner}), dtype=torch.float64)

    @cached_property
    def _panels(self) -> Panels:
        """The integral of `exp(log weight - peak)`."""
        top, low, high = self._peak
        return integrate(lambda x: torch.exp(self._log_weight(x) - top), self._edges(low, high), floor=1e-28)

    @cached_property
    def _series(self) -> Tensor:
        """Legendre coefficients on each panel of what `_panels` integrates."""
        return self._panels.coefficients(lambda x: torch.exp(self._log_weight(x) - self._peak[0]))

    def log_z(self) -> float:
        """`log int p0(x) exp(rho(x)) dx`, Gauss rules on adaptive panels."""
        return self._peak[0] + math.log(self._panels.total)

    def log_z_check(self) -> tuple[float, float]:
        """The same integral by SciPy's adaptive Gauss-Kronrod rule (QUADPACK), through generator and reward."""
        top, low, high = self._peak

        def integrand(x: float) -> float:
            point = torch.tensor([[x]], dtype=torch.float64)
            return math.exp(float(self.log_tilt(point)) - 0.5 * x * x - _HALF_LOG_2PI - top)

        inner = [b for b in self.breakpoints if low < b < high]
        cuts = [low, *inner, high]
        parts = [quad(integrand, a, b, epsabs=0, epsrel=1e-10, limit=400) for a, b in itertools.pairwise(cuts)]
        value = float(sum(part[0] for part in parts))
        return top + math.log(value), float(sum(part[1] for part in parts)) / value + 1e-13

    def _expect(self, function: Callable[[Tensor], Tensor]) -> float:
        """Expectation under the tilted noise law."""
        top, low, high = self._peak
        mass = self._panels.total
        edges = self._edges(low, high)
        return integrate(lambda x: torch.exp(self._log_weight(x) - top) * function(x), edges, scale=mass).total / mass

    def _log_density(self, x: Tensor) -> Tensor:
        return self._log_weight(x) - self.log_z()

    def _score(self, x: Tensor) -> Tensor:
        return derivatives(self._rho, x, 1)[1] - x

    def log_p0_star(self, x: Tensor) -> Tensor:
        """`log p0(x) + rho(x) - log Z*`."""
        return self._log_density(x)[:, 0]

    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """Quantiles of the tilted law at random levels."""
        return self._transport(standard_normal(n, 1, generator)[:, 0])[:, None]

    def _inverse(self, y: Tensor) -> Tensor:
        return y if self.inverse_function is None else self.inverse_function(y)

    def _log_slope(self, x: Tensor) -> Tensor:
        return torch.log(derivatives(self.generator_function, x, 1)[1])

    def log_p_base(self, y: Tensor) -> Tensor:
        """`log p0(x) - log g'(x)` at `x = g^-1(y)`."""
        x = self._inverse(y)
        return (-0.5 * x.square() - _HALF_LOG_2PI - self._log_slope(x))[:, 0]

    def log_p_star(self, y: Tensor) -> Tensor:
        """`log p0*(x) - log g'(x)` at `x = g^-1(y)`."""
        x = self._inverse(y)
        return (self._log_density(x) - self._log_slope(x))[:, 0]

    def _transport(self, s: Tensor) -> Tensor:
        """`F*^-1(Phi(s))`, `(n,)`, from whichever tail is the smaller."""
        panels = self._panels
        edges, zero = panels.edges, torch.zeros(1, dtype=torch.float64)
        below = torch.cat([zero, panels.masses.cumsum(0)])
        above = torch.cat([panels.masses.flip(0).cumsum(0).flip(0), zero])
        left = s <= 0
        wanted = torch.where(left, normal_cdf(s), normal_cdf(-s)) * panels.total
        index = torch.where(
            left,
            torch.searchsorted(below, wanted, right=True) - 1,
            len(edges) - 1 - torch.searchsorted(above.flip(0), wanted, right=True),
        )
        low, high = edges[index], edges[index + 1]
        base = torch.where(left, below[index], above[index + 1])

        half = 0.5 * (high - low)
        series = self._series[index]

        def excess(t: Tensor, rows: Tensor) -> Tensor:
            # increasing in t: the mass below t minus the wanted one, or the wanted one minus the mass above t
            z = ((t - low[rows]) / half[rows] - 1).clamp(-1, 1)
            inside = half[rows] * antiderivative(series[rows], z)[0]
            return torch.where(
                left[rows],
                base[rows] + inside - wanted[rows],
                wanted[rows] - base[rows] - (panels.masses[index[rows]] - inside),
            )

        return solve_increasing(excess, low, high).clamp(low, high)  # a rounding outside may have no density

    def optimal_map(self) -> NoiseMap:
        """The increasing transport `T = F*^-1 o Phi`."""

        def f(x: Tensor) -> Tensor:
            with torch.no_grad():
                T = self._transport(x.detach().flatten()).reshape(x.shape)
            return monotone_transport(x, T, self._log_density, self._score) - x

        return f

    # The L2 optimum.

    def _psi(self, u: Tensor) -> Tensor:
        return 0.5 * u.square() - self._rho(u)

    @cached_property
    def _branches(self) -> list[tuple[Tensor, float, float]]:
        """Smooth pieces of the L2 optimum: hull vertices of `psi` on the grid, exact ends of the piece."""
        psi = self._psi(self._grid).numpy()
        hull = _lower_hull(self._grid.numpy(), psi)
        points = self._grid[torch.tensor(hull)]
        gaps = [int(i) for i in ((points[1:] - points[:-1]) > 1.5 * _STEP).nonzero()[:, 0]]
        cuts = [self._double_tangent(float(points[i]), float(points[i + 1])) for i in gaps]
        starts, stops = [0, *(i + 1 for i in gaps)], [*(i + 1 for i in gaps), len(points)]
        lows, highs = [-_RANGE, *(right for _, right in cuts)], [*(left for left, _ in cuts), _RANGE]
        return [(points[a:b], lo, hi) for a, b, lo, hi in zip(starts, stops, lows, highs, strict=True)]

    def _double_tangent(self, left: float, right: float) -> tuple[float, float]:
        """The two points at which one line supports `psi`: Newton's method from the two grid points."""
        pair = torch.tensor([left, right], dtype=torch.float64)
        for _ in range(30):
            value, slope, bend = derivatives(self._psi, pair, 2)
            common = (value[1] - value[0]) / (pair[1] - pair[0])
            step = (common - slope) / bend
            pair = pair + step.clamp(-_STEP, _STEP)
            if float(step.abs().max()) < 1e-14 * _RANGE:
                break
        return float(pair[0]), float(pair[1])

    def _proximal(self, x: Tensor) -> Tensor:
        """`argmin_u psi(u) - x u`, `(n,)`."""
        branches = self._branches
        ends = torch.tensor([high for _, _, high in branches[:-1]], dtype=torch.float64)
        jumps = derivatives(self._psi, ends, 1)[1] if len(ends) else ends
        which = torch.searchsorted(jumps, x)
        low, high = torch.empty_like(x), torch.empty_like(x)
        for k, (points, least, most) in enumerate(branches):
            rows = which == k
            values = self._psi(points)
            slopes = (values[1:] - values[:-1]) / (points[1:] - points[:-1])
            vertex = points[torch.searchsorted(slopes.contiguous(), x[rows])]
            low[rows] = (vertex - _STEP).clamp(min=least)
            high[rows] = (vertex + _STEP).clamp(max=most)
        if bool((low <= -_RANGE).any() | (high >= _RANGE).any()):
            raise InputError(f"the L2 optimum of {self.name!r} leaves |u| < 40: raise alpha")

        def excess(u: Tensor, rows: Tensor) -> Tensor:
            return derivatives(self._psi, u, 1)[1] - x[rows]

        return solve_increasing(excess, low, high)

    def l2_map(self) -> NoiseMap:
        """`x + f(x) = argmin_u psi(u) - x u`, with derivative `1/psi''(u)` between the jumps."""
        self._require_smooth("l2_map")

        def f(x: Tensor) -> Tensor:
            with torch.no_grad():
                u = self._proximal(x.detach().flatten()).reshape(x.shape)
                _, _, bend, twist = derivatives(self._psi, u, 3)
            return with_derivatives(x, u, 1 / bend, -twist / bend**3) - x

        return f

    def _require_smooth(self, member: str) -> None:
        if self.breakpoints:
            raise self._missing(member, "its reward has break points")

    def kl_optimal(self) -> float:
        """`E*[rho] - log Z*`."""
        return self._expect(self._rho) - self.log_z()

    @cached_property
    def _l2_gap(self) -> float:
        ends = self._proximal(torch.tensor([-_REACH, _REACH], dtype=torch.float64)).tolist()

        def integrand(u: Tensor) -> Tensor:
            # the law of the L2 optimum has density p0(psi'(u)) psi''(u) on its branches
            _, x, bend = derivatives(self._psi, u, 2)
            log_density = -0.5 * x.square() - _HALF_LOG_2PI + torch.log(bend.clamp(min=1e-300))
            return torch.exp(log_density) * (log_density - self._log_density(u))

        total = 0.0
        for _, least, most in self._branches:
            low, high = max(least, ends[0]), min(most, ends[1])
            if low < high:
                total += integrate(integrand, self._edges(low, high), scale=1.0).total
        return total

    def l2_gap(self) -> float:
        """Divergence of the law of the L2 optimum from the tilted law, by adaptive quadrature over its branches."""
        self._require_smooth("l2_gap")
        return self._l2_gap


def _lower_hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points sorted by `x` (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def one_dimensional(alpha: float = 0.4) -> OneDimensional:
    """The default: a tilted law with three modes behind `y = asinh(x)`."""
    return OneDimensional(
        reward_function=lambda y: 0.5 * torch.cos(4 * y - 1),
        generator_function=torch.asinh,
        inverse_function=torch.sinh,
        alpha=alpha,
        formula="y = asinh(x) on the line, r = cos(4y - 1)/2",
    )


__all__ = ["OneDimensional", "one_dimensional"]
