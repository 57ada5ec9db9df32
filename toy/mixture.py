"""A tilt that makes the noise a Gaussian mixture, behind an invertible nonlinear generator.

The reward, read at the noise `x = g^-1(y)`, is `alpha log sum_k w_k exp(-x'H_k x/2 + b_k'x)`, so each term tilts
`p0` to a Gaussian: with `S_k = (I + H_k)^-1` the tilted noise law is the mixture of `N(S_k b_k, S_k)` with weights
`w_k Z_k / Z*`, `log Z_k = (log det S_k + b_k'S_k b_k)/2`, `Z* = sum_k w_k Z_k`. The optimal map is the
Knothe-Rosenblatt transport: entry by entry, the increasing map to the mixture's conditional law given earlier entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.special import ndtri

from hnkit.errors import InputError
from hnkit.maps import NoiseMap
from hnkit.tilt import log_standard_normal
from hnkit.toy.numerics import normal_cdf, solve_increasing
from hnkit.toy.problem import Toy, float64, require_alpha, standard_normal

_LOG_2PI = math.log(2 * math.pi)
_REACH = 8.5  # standard deviations, beyond which a normal law has mass 2e-17
_AGREEMENT = 1e-8  # of two rules for the same integral


@dataclass(frozen=True, eq=False)
class Mixture(Toy):
    """`y = R shear(sinh(tail asinh(x) + skew))`, a reward whose tilted noise law is a Gaussian mixture.

    The shear is `v_j + bend tanh(v_{j-1})`, of determinant 1, from the first entry on.

    Args:
        weights: `w`, `(k,)`, positive.
        curvatures: `H`, `(k, d, d)`, symmetric, each `I + H_k` positive definite.
        slopes: `b`, `(k, d)`.
        rotation: `R`, `(d, d)`, invertible.
        tail: exponent of the generator's tails, positive.
        skew: asymmetry of the generator.
        bend: strength of the shear.
        alpha: temperature; the reward scales with it, because `exp(r/alpha)` is a mixture at one temperature alone.
    """

    injective = True
    discontinuous = frozenset({"l2_map"})

    weights: Tensor
    curvatures: Tensor
    slopes: Tensor
    rotation: Tensor
    tail: float = 0.8
    skew: float = 0.3
    bend: float = 0.5
    alpha: float = 1.0
    name: str = field(default="mixture", kw_only=True)

    def __post_init__(self) -> None:
        require_alpha(self.alpha)
        for attribute in ("weights", "curvatures", "slopes", "rotation"):
            object.__setattr__(self, attribute, float64(getattr(self, attribute)))
        k, d = self.slopes.shape
        if self.weights.shape != (k,) or self.curvatures.shape != (k, d, d) or self.rotation.shape != (d, d):
            raise InputError(f"give weights ({k},), curvatures ({k}, {d}, {d}) and a rotation ({d}, {d})")
        if not bool((self.weights > 0).all()) or not self.tail > 0:
            raise InputError("a weight or the tail exponent is not positive: give positive ones")
        identity = torch.eye(d, dtype=torch.float64)
        if bool(torch.linalg.cholesky_ex(identity + self.curvatures).info.any()):
            raise InputError("some I + H_k is not positive definite, so Z* is infinite: give larger curvatures")

    @property
    def statement(self) -> str:
        """One line: generator, reward, dimension."""
        return f"nonlinear invertible generator in {self.dim} dimensions, a tilt to {len(self.weights)} Gaussians"

    @property
    def dim(self) -> int:
        """Dimension `d` of the noise."""
        return int(self.slopes.shape[1])

    @property
    def unavailable(self) -> frozenset[str]:  # type: ignore[override]
        """The quadrature of `l2_gap` is for the plane, at most two Gaussians, and one jump along a line at most."""
        simple = self.dim == 2 and len(self.weights) <= 2
        known = simple and not math.isnan(self._checked_l2_gap)
        return Toy.unavailable | (frozenset() if known else frozenset({"l2_gap"}))

    def with_alpha(self, alpha: float) -> Mixture:
        """This problem, if it is at that temperature already."""
        if alpha != self.alpha:
            raise InputError(f"alpha = {alpha:g} for {self.name!r}: its tilt is known at alpha = {self.alpha:g} alone")
        return self

    def generate(self, x: Tensor) -> Tensor:
        """`R shear(sinh(tail asinh(x) + skew))`, `(n, d)`."""
        entries = torch.sinh(self.tail * torch.asinh(x) + self.skew).unbind(1)
        sheared = [entries[0]]
        for entry in entries[1:]:
            sheared.append(entry + self.bend * torch.tanh(sheared[-1]))
        return torch.stack(sheared, 1) @ self.rotation.to(x).mT

    def _inverse(self, y: Tensor) -> Tensor:
        sheared = torch.linalg.solve(self.rotation.to(y), y.mT).mT
        entries = torch.cat([sheared[:, :1], sheared[:, 1:] - self.bend * torch.tanh(sheared[:, :-1])], 1)
        return torch.sinh((torch.asinh(entries) - self.skew) / self.tail)

    def _log_volume(self, x: Tensor) -> Tensor:
        """`log|det Dg(x)|`."""
        slope = self.tail * torch.cosh(self.tail * torch.asinh(x) + self.skew) / torch.sqrt(1 + x.square())
        return torch.log(slope).sum(1) + float(torch.linalg.slogdet(self.rotation).logabsdet)

    def reward(self, y: Tensor) -> Tensor:
        """`alpha log sum_k w_k exp(-x'H_k x/2 + b_k'x)` at `x = g^-1(y)`, `(n,)`."""
        return self.alpha * self._rho(self._inverse(y))

    # The tilt in noise coordinates, and the mixture it makes.

    def _exponents(self, x: Tensor) -> Tensor:
        """`log w_k - x'H_k x/2 + b_k'x`, `(n, k)`."""
        quadratic = torch.einsum("ni,kij,nj->nk", x, self.curvatures, x)
        return torch.log(self.weights) - 0.5 * quadratic + x @ self.slopes.mT

    def _rho(self, x: Tensor) -> Tensor:
        return torch.logsumexp(self._exponents(x), 1)

    @cached_property
    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        """`log(w_k Z_k)` (k,), means (k, d), Cholesky factors of the covariances (k, d, d)."""
        covariance = torch.linalg.inv(torch.eye(self.dim, dtype=torch.float64) + self.curvatures)
        mean = torch.einsum("kij,kj->ki", covariance, self.slopes)
        log_z = 0.5 * (torch.logdet(covariance) + (mean * self.slopes).sum(1))
        return torch.log(self.weights) + log_z, mean, torch.linalg.cholesky(covariance)

    def log_z(self) -> float:
        """`log sum_k w_k Z_k`."""
        return float(torch.logsumexp(self._components[0], 0))

    def log_z_check(self) -> tuple[float, float]:
        """Trapezoidal rule on a grid through the generator and the reward (two or three dimensions)."""

        def value(step: float) -> float:
            z, weight = self._normal_grid(step)
            return float(torch.logsumexp(weight + self.log_tilt(z), 0))

        coarse, fine = value(0.3), value(0.15)
        return fine, abs(fine - coarse) + 1e-12

    def _normal_grid(self, step: float) -> tuple[Tensor, Tensor]:
        """Points of a grid and the logarithms of the trapezoidal weights of `N(0, I)` at them.

        For integrands that are analytic and decay like a Gaussian the rule converges faster than any power of `step`.
        """
        if self.dim > 3:
            raise InputError(f"quadrature on a grid in {self.dim} dimensions: at most 3")
        line = torch.arange(-12.0, 12.0 + 0.5 * step, step, dtype=torch.float64)
        points = torch.cartesian_prod(*[line] * self.dim).reshape(-1, self.dim)
        return points, log_standard_normal(points) + self.dim * math.log(step)

    def log_p0_star(self, x: Tensor) -> Tensor:
        """Log density of the mixture."""
        log_weight, mean, factor = self._components
        white = torch.linalg.solve_triangular(factor, (x[:, None] - mean).permute(1, 2, 0), upper=False)
        volume = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        terms = log_weight - self.log_z() - volume - 0.5 * self.dim * _LOG_2PI - 0.5 * white.square().sum(1).mT
        return torch.logsumexp(terms, 1)

    def sample_p0_star(self, n: int, generator: torch.Generator) -> Tensor:
        """A component first, then its Gaussian."""
        log_weight, mean, factor = self._components
        z = standard_normal(n, self.dim, generator)
        which = torch.multinomial(torch.softmax(log_weight, 0), n, replacement=True, generator=generator)
        return mean[which] + torch.einsum("nij,nj->ni", factor[which], z)

    def log_p_base(self, y: Tensor) -> Tensor:
        """`log p0(x) - log|det Dg(x)|` at `x = g^-1(y)`."""
        x = self._inverse(y)
        return log_standard_normal(x) - self._log_volume(x)

    def log_p_star(self, y: Tensor) -> Tensor:
        """`log p0*(x) - log|det Dg(x)|` at `x = g^-1(y)`."""
        x = self._inverse(y)
        return self.log_p0_star(x) - self._log_volume(x)

    # The Knothe-Rosenblatt map. `_condition` walks through the entries of T; each component carries the whitened
    # entries z so far, which fix its conditional mean, and its log weight given them.

    def _to_normal(self, T: Tensor) -> Tensor:
        """The inverse map: entry j is `Phi^-1` of the mixture's conditional distribution function at `T_j`."""
        _, _, factor = self._components
        log_weight, whitened = self._start(T.shape[0])
        entries = []
        for j in range(self.dim):
            centre = self._centre(whitened, j)
            z = (T[:, j : j + 1] - centre) / factor[:, j, j]
            entries.append(_quantile_of(torch.softmax(log_weight, 1), z))
            log_weight = log_weight - 0.5 * z.square() - factor[:, j, j].log()
            whitened = [*whitened, z]
        return torch.stack(entries, 1)

    def _start(self, n: int) -> tuple[Tensor, list[Tensor]]:
        return self._components[0].expand(n, -1), []

    def _centre(self, whitened: list[Tensor], j: int) -> Tensor:
        """Conditional means `(n, k)` (or `(k,)`) of entry j in each component."""
        _, mean, factor = self._components
        centre = mean[:, j]
        for i, z in enumerate(whitened):
            centre = centre + factor[:, j, i] * z
        return centre

    def _transport(self, s: Tensor) -> Tensor:
        """`T(s)` by bracketed root finding: a mixture's quantile lies between those of its components."""
        _, _, factor = self._components
        log_weight, whitened = self._start(s.shape[0])
        result = []
        for j in range(self.dim):
            centre, scale = self._centre(whitened, j).expand_as(log_weight), factor[:, j, j]
            weights = torch.softmax(log_weight, 1)
            target = s[:, j]
            ends = centre + scale * target[:, None]

            def excess(
                t: Tensor,
                rows: Tensor,
                centre: Tensor = centre,
                scale: Tensor = scale,
                weights: Tensor = weights,
                target: Tensor = target,
            ) -> Tensor:
                return _quantile_of(weights[rows], (t[:, None] - centre[rows]) / scale) - target[rows]

            margin = 1e-12 * (1 + ends.abs().amax(1))
            t = solve_increasing(excess, ends.amin(1) - margin, ends.amax(1) + margin)
            z = (t[:, None] - centre) / scale
            log_weight = log_weight - 0.5 * z.square() - torch.log(scale)
            whitened = [*whitened, z]
            result.append(t)
        return torch.stack(result, 1)

    def optimal_map(self) -> NoiseMap:
        """The Knothe-Rosenblatt transport from `p0` to the mixture."""

        def f(x: Tensor) -> Tensor:
            with torch.no_grad():
                T = self._transport(x.detach())
            return _implicit(x, T, lambda T, x: x - self._to_normal(T)) - x

        return f

    # The L2 optimum.

    def _gradient_and_bend(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient `(n, d)` of `rho` and `I - Hessian of rho`, `(n, d, d)`."""
        share = torch.softmax(self._exponents(u), 1)
        pulls = self.slopes - torch.einsum("kij,nj->nki", self.curvatures, u)
        gradient = torch.einsum("nk,nki->ni", share, pulls)
        spread = pulls - gradient[:, None]
        covariance = torch.einsum("nk,nki,nkj->nij", share, spread, spread)
        identity = torch.eye(self.dim, dtype=u.dtype)
        return gradient, identity + torch.einsum("nk,kij->nij", share, self.curvatures) - covariance

    def _proximal(self, x: Tensor) -> Tensor:
        """The best of the local maxima that are reached from each component's own proximal point."""
        covariance = torch.linalg.inv(torch.eye(self.dim, dtype=torch.float64) + self.curvatures)
        best, value = x, torch.full(x.shape[:1], -math.inf, dtype=torch.float64)
        for k in range(len(self.weights)):
            u = self._climb(x, (x + self.slopes[k]) @ covariance[k])
            reached = self._proximal_objective(u, x)
            best = torch.where((reached > value)[:, None], u, best)
            value = torch.maximum(reached, value)
        return best

    def _proximal_objective(self, u: Tensor, x: Tensor) -> Tensor:
        return self._rho(u) - 0.5 * (u - x).square().sum(1)

    def _climb(self, x: Tensor, u: Tensor) -> Tensor:
        """Newton's method where the objective is concave and rises, else the step of the majorising mixture (EM)."""
        identity = torch.eye(self.dim, dtype=torch.float64)
        u, rows = u.clone(), torch.arange(x.shape[0])
        for _ in range(200):
            here, target = u[rows], x[rows]
            gradient, bend = self._gradient_and_bend(here)
            slope = gradient + target - here
            factor, info = torch.linalg.cholesky_ex(bend)
            factor = torch.where((info == 0)[:, None, None], factor, identity)
            newton = here + torch.cholesky_solve(slope[:, :, None], factor)[:, :, 0]
            share = torch.softmax(self._exponents(here), 1)
            curvature = identity + torch.einsum("nk,kij->nij", share, self.curvatures)
            majorised = torch.linalg.solve(curvature, target + share @ self.slopes)
            rises = self._proximal_objective(newton, target) >= self._proximal_objective(majorised, target) - 1e-14
            u[rows] = torch.where(((info == 0) & rises)[:, None], newton, majorised)
            rows = rows[(u[rows] - here).abs().amax(1) > 1e-12 * (1 + here.abs().amax(1))]
            if rows.numel() == 0:
                break
        return u

    def l2_map(self) -> NoiseMap:
        """`x + f(x) = argmax_u rho(u) - |u - x|^2/2`; it jumps where two maxima are equally high."""

        def f(x: Tensor) -> Tensor:
            with torch.no_grad():
                u = self._proximal(x.detach())
            return _implicit(x, u, lambda u, x: x + self._gradient_and_bend(u)[0] - u) - x

        return f

    def kl_optimal(self) -> float:
        """`E*[rho] - log Z*`, the mean over each component by the trapezoidal rule in its whitened coordinates."""
        return self._kl_optimal

    @cached_property
    def _kl_optimal(self) -> float:
        z, weight = self._normal_grid(0.15)
        log_share, mean, factor = self._components
        share = torch.softmax(log_share, 0)
        means = [weight.exp() @ self._rho(mean[k] + z @ factor[k].mT) for k in range(len(share))]
        return float(share @ torch.stack(means)) - self.log_z()

    def l2_gap(self) -> float:
        """Divergence of the law of the L2 optimum from the mixture, by quadrature on lines cut where the map jumps."""
        if "l2_gap" in self.unavailable:
            raise self._missing("l2_gap", "its quadrature needs d = 2 and at most two Gaussians of like curvatures")
        return self._checked_l2_gap

    @cached_property
    def _checked_l2_gap(self) -> float:
        """NaN where a finer rule gives another value: curvatures differ so much that a line meets a second jump."""
        value = self._l2_gap(0.25, 48)
        return value if abs(value - self._l2_gap(0.2, 60)) < _AGREEMENT else math.nan

    def _l2_gap(self, step: float, count: int) -> float:
        # Lines run in the direction in which the two components pull apart: there the map is increasing along a line
        # and, for equal curvatures, jumps at most once; for others the set where it jumps is curved, and a line can
        # meet it twice. Across the lines the integral is smooth, so the trapezoidal rule is accurate.
        direction = self.slopes[-1] - self.slopes[0]
        along = direction / direction.norm() if bool(direction.any()) else torch.tensor([1.0, 0.0]).double()
        across = torch.stack([-along[1], along[0]])
        offsets = torch.arange(-_REACH, _REACH + 0.5 * step, step, dtype=torch.float64)

        def points(t: Tensor) -> Tensor:
            return (t[..., None] * along + offsets[:, None, None] * across).reshape(-1, 2)

        cut = self._jumps(points, along, len(offsets))
        nodes, weights = (torch.from_numpy(part) for part in _legendre(count))
        total = 0.0
        for low, high in ((torch.full_like(cut, -_REACH), cut), (cut, torch.full_like(cut, _REACH))):
            half = 0.5 * (high - low)[:, None]
            t = 0.5 * (high + low)[:, None] + half * nodes
            x = points(t)
            u = self._proximal(x)
            log_volume = -torch.linalg.slogdet(self._gradient_and_bend(u)[1]).logabsdet
            log_base = log_standard_normal(x)
            integrand = log_base.exp() * (log_base - log_volume - self.log_p0_star(u))
            total += step * float((integrand.reshape(t.shape) * half * weights).sum())
        return total

    def _jumps(self, points: Callable[[Tensor], Tensor], along: Tensor, lines: int) -> Tensor:
        """Where along each line the L2 optimum moves fastest, bisected: the position of its jump if it has one."""
        t = torch.linspace(-_REACH, _REACH, 60, dtype=torch.float64).expand(lines, -1)
        height = (self._proximal(points(t)) @ along).reshape(t.shape)
        index = (height[:, 1:] - height[:, :-1]).argmax(1, keepdim=True)
        low, high = t.gather(1, index), t.gather(1, index + 1)
        below, above = height.gather(1, index), height.gather(1, index + 1)
        for _ in range(32):
            middle = 0.5 * (low + high)
            value = (self._proximal(points(middle)) @ along)[:, None]
            left = value < 0.5 * (below + above)
            low, below = torch.where(left, middle, low), torch.where(left, value, below)
            high, above = torch.where(left, high, middle), torch.where(left, above, value)
        return (0.5 * (low + high))[:, 0]


def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return nodes, weights


def _quantile_of(weights: Tensor, z: Tensor) -> Tensor:
    """`Phi^-1(sum_k weights_k Phi(z_k))`, `(n, k), (n, k) -> (n,)`, from the smaller tail."""
    lower, upper = (weights * normal_cdf(z)).sum(1), (weights * normal_cdf(-z)).sum(1)
    below = lower < upper  # not torch.minimum: where the tails tie, its gradient is the mean of both, which is 0
    small = torch.where(below, lower, upper).clamp(min=1e-300)
    return torch.where(below, ndtri(small), -ndtri(small))


def _implicit(x: Tensor, root: Tensor, residual: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The solution `T(x)` of `residual(T, x) = 0`, differentiable twice, given its value.

    With `M = -d residual/dT` at the root, two chord steps `T + M^-1 residual(T, x)` from the value, the first linear
    in `x`, have the right first and second derivatives.
    """
    with torch.enable_grad():
        T = root.detach().clone().requires_grad_()
        value = residual(T, x.detach())
        rows = [torch.autograd.grad(value[:, i].sum(), T, retain_graph=True)[0] for i in range(T.shape[1])]
    inverse = torch.linalg.inv(-torch.stack(rows, 1))
    step = x - x.detach()
    moved = root.detach() + torch.einsum("nij,nj->ni", inverse, step)
    return moved + torch.einsum("nij,nj->ni", inverse, residual(moved, x))


def mixture() -> Mixture:
    """The default: two unequal Gaussians in the plane, far enough apart for the L2 optimum to jump."""
    curvatures = torch.tensor([[[1.0, 0.4], [0.4, 0.5]], [[2.0, -0.5], [-0.5, 1.0]]])
    slopes = torch.tensor([[-2.2, 0.6], [3.0, 0.9]])
    angle = 0.6
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return Mixture(torch.tensor([0.9, 0.6]), curvatures, slopes, rotation)


__all__ = ["Mixture", "mixture"]
