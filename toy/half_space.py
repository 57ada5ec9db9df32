"""A reward that is constant on a half-space and zero off it: smooth laws, a non-smooth reward, a singular L2 optimum.

With `s = n.x` the coordinate across the boundary and `u = c/alpha` the tilted noise law has density
`p0(x) exp(u 1[s >= t]) / Z*`, `Z* = Phi(t) + e^u Phi(-t)`. The optimal map moves `s` alone, by the increasing map
between two piecewise Gaussian laws. The L2 optimum projects the strip `t - sqrt(2u) < s < t` onto the boundary, which
then has positive mass: its law has no density, and its divergence from the tilted law is infinite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from scipy.integrate import quad
from torch import Tensor
from torch.special import ndtri

from hnkit.errors import InputError
from hnkit.maps import NoiseMap
from hnkit.tilt import log_standard_normal
from hnkit.toy.numerics import monotone_transport, normal_cdf
from hnkit.toy.problem import Toy, float64, require_alpha, standard_normal

_MOST_NATS = 700.0  # exp(709.8) overflows
_INSIDE = 1e-12


@dataclass(frozen=True, eq=False)
class HalfSpace(Toy):
    """`y = M x + m`, `r(y) = height` where `normal . y >= threshold`, else 0.

    Args:
        matrix: `M`, `(d, d)`, invertible.
        offset: `m`, `(d,)`.
        normal: `(d,)`, not zero.
        threshold: position of the boundary.
        height: the reward inside, positive (reverse `normal` and `threshold` for a penalty).
        alpha: temperature.
    """

    discontinuous = frozenset({"l2_map"})
    injective = True

    matrix: Tensor
    offset: Tensor
    normal: Tensor
    threshold: float
    height: float
    alpha: float = 1.0
    name: str = field(default="half-space", kw_only=True)

    def __post_init__(self) -> None:
        require_alpha(self.alpha)
        for attribute in ("matrix", "offset", "normal"):
            object.__setattr__(self, attribute, float64(getattr(self, attribute)))
        d = self.dim
        if self.matrix.shape != (d, d) or self.offset.shape != (d,) or int(torch.linalg.matrix_rank(self.matrix)) < d:
            raise InputError(f"the generator M x + m needs an invertible ({d}, {d}) matrix and an offset ({d},)")
        if not bool(self.normal.any()):
            raise InputError("the normal of the half-space is 0: give a direction")
        if not (math.isfinite(self.height) and self.height > 0):
            raise InputError(f"height is {self.height}: give a positive one, and reverse the normal for a penalty")
        if self.height / self.alpha > _MOST_NATS:
            raise InputError(
                f"alpha = {self.alpha:g} at height {self.height:g}: exp(height/alpha) overflows: give alpha of "
                f"{self.height / _MOST_NATS:.3g} or more"
            )

    @property
    def statement(self) -> str:
        """One line: generator, reward, dimension."""
        return f"y = M x + m in {self.dim} dimensions, reward {self.height:g} on a half-space, alpha = {self.alpha:g}"

    @property
    def dim(self) -> int:
        """Dimension `d` of the noise."""
        return int(self.normal.numel())

    @cached_property
    def _direction(self) -> tuple[Tensor, float]:
        """Unit normal and threshold of the half-space in noise coordinates."""
        pulled = self.matrix.mT @ self.normal
        length = float(pulled.norm())
        return pulled / length, (self.threshold - float(self.normal @ self.offset)) / length

    @cached_property
    def _masses(self) -> tuple[float, float, float]:
        """`Phi(t)`, `Phi(-t)` and `Z*`."""
        t = torch.tensor(self._direction[1], dtype=torch.float64)
        below, above = float(normal_cdf(t)), float(normal_cdf(-t))
        return below, above, below + math.exp(self.height / self.alpha) * above

    def generate(self, x: Tensor) -> Tensor:
        """`M x + m`, `(n, d)`."""
        return x @ self.matrix.to(x).mT + self.offset.to(x)

    def reward(self, y: Tensor) -> Tensor:
        """`height` inside, 0 outside, `(n,)`; its gradient vanishes wherever it exists."""
        side = y @ self.normal.to(y)
        return self.height * (side >= self.threshold).to(y) + 0 * side  # the zero gradient, as part of the graph

    def log_z(self) -> float:
        """`log(Phi(t) + e^(c/alpha) Phi(-t))`."""
        return math.log(self._masses[2])

    def log_z_check(self) -> tuple[float, float]:
        """Adaptive quadrature along the line across the boundary, through the generator and the reward."""
        direction, t = self._direction

        def integrand(s: float) -> float:
            tilt = self.log_tilt((s * direction)[None])
            return math.exp(float(tilt) - 0.5 * s * s) / math.sqrt(2 * math.pi)

        edge = max(t, -12.0)  # the tilted mass below -12 is under 1e-32 of the whole
        sides = ((-12.0, min(edge, 12.0)), (edge, max(edge, 0.0) + 12.0))
        parts = [quad(integrand, low, high, epsabs=0, epsrel=1e-11) for low, high in sides]
        total = float(sum(part[0] for part in parts))
        return math.log(total), float(sum(part[1] for part in parts)) / total + 1e-13

    def log_p0_star(self, x: Tensor) -> Tensor:
        """`log p0(x) + (c/alpha) 1[s >= t] - log Z*`."""
        direction, t = self._direction
        inside = (x @ direction.to(x) >= t).to(x)
        return log_standard_normal(x) + self.height / self.alpha * inside - self.log_z()

    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """A side of the boundary first, then a truncated normal across it; standard normal along it."""
        direction, _ = self._direction
        below, above, z = self._masses
        x = standard_normal(n, self.dim, generator)
        side, u = torch.rand(2, n, dtype=torch.float64, generator=generator).clamp(min=1e-16)
        s = torch.where(side < below / z, ndtri(u * below), -ndtri(u * above))
        return x + (s - x @ direction)[:, None] * direction

    def log_p_base(self, y: Tensor) -> Tensor:
        """Log density of `N(m, MM')`."""
        x = torch.linalg.solve(self.matrix.to(y), (y - self.offset.to(y)).mT).mT
        return log_standard_normal(x) - float(torch.linalg.slogdet(self.matrix).logabsdet)

    def log_p_star(self, y: Tensor) -> Tensor:
        """Log density of `p*`, from the tilted noise law at `g^-1(y)`."""
        x = torch.linalg.solve(self.matrix.to(y), (y - self.offset.to(y)).mT).mT
        return self.log_p0_star(x) - float(torch.linalg.slogdet(self.matrix).logabsdet)

    def optimal_map(self) -> NoiseMap:
        """`T` moves `s` by `F*^-1 o Phi`; it is continuous, with a kink where it reaches the boundary."""
        direction, t = self._direction
        below, above, z = self._masses
        weight, extra = math.exp(self.height / self.alpha), math.expm1(self.height / self.alpha)

        def log_density(s: Tensor) -> Tensor:
            return -0.5 * s.square() - 0.5 * math.log(2 * math.pi) + (s >= t) * math.log(weight) - math.log(z)

        def f(x: Tensor) -> Tensor:
            normal = direction.to(x)
            s = x @ normal
            with torch.no_grad():
                lower, upper = normal_cdf(s), normal_cdf(-s)
                short = torch.where(s < 0, z * lower < below, z * upper > weight * above)  # T is below the boundary
                down = torch.where(short, z * lower, (z * lower + extra * below) / weight)  # Phi(T)
                up = torch.where(short, (z * upper - extra * above).clamp(min=above), z / weight * upper)  # Phi(-T)
                T = torch.where(down < up, ndtri(down), -ndtri(up))  # from the smaller, which is exact in its tail
            return (monotone_transport(s, T, log_density, torch.neg) - s)[:, None] * normal

        return f

    def l2_map(self) -> NoiseMap:
        """Project the points within `sqrt(2c/alpha)` below the boundary onto it, leave all others.

        The map jumps at the far side of the strip and is a projection inside it, so `det(I + J) = 0` there. Projected
        points land `1e-12` inside, so that rounding does not take the reward from them.
        """
        direction, t = self._direction
        reach = math.sqrt(2 * self.height / self.alpha)

        def f(x: Tensor) -> Tensor:
            normal = direction.to(x)
            short = t - x @ normal
            move = torch.where((short > 0) & (short <= reach), short + _INSIDE * (1 + abs(t)), torch.zeros_like(short))
            return move[:, None] * normal

        return f

    def kl_optimal(self) -> float:
        """`(c/alpha) P*(s >= t) - log Z*`."""
        _, above, z = self._masses
        u = self.height / self.alpha
        return u * math.exp(u) * above / z - math.log(z)

    def l2_gap(self) -> float:
        """Infinite: the L2 optimum puts mass on the boundary, a null set of the tilted law."""
        return math.inf


def half_space(alpha: float = 0.8) -> HalfSpace:
    """The default: three dimensions, a boundary 0.8 standard deviations from the origin."""
    matrix = torch.tensor([[1.0, 0.3, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.4, 1.2]])
    return HalfSpace(matrix, torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1.0, 2.0, -1.0]), 1.0, 1.2, alpha)
