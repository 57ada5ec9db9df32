"""Derivatives of maps that are found by solving equations, and quadrature on adaptive panels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import elementwise
from torch import Tensor

from hnkit.errors import InputError

_NODES, _WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(20))

_LEGENDRE = torch.from_numpy(np.polynomial.legendre.legvander(_NODES.numpy(), 19))

_NO_CONVERGENCE = "the quadrature does not converge: list the break points of the reward in `breakpoints`"

SCALAR_FUNCTION = Callable[[Tensor], Tensor]


def with_derivatives(x: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The tensor `value` whose first and second derivatives with respect to `x`, entry by entry, are those given.

    `value + first e + second e^2 / 2` with `e = x - detach(x) = 0`, so any mode of differentiation sees them.
    """
    step = x - x.detach()
    return value.detach() + step * (first.detach() + 0.5 * step * second.detach())


def monotone_transport(s: Tensor, value: Tensor, log_density: SCALAR_FUNCTION, score: SCALAR_FUNCTION) -> Tensor:
    """The increasing map `T = F*^-1 o Phi` at `s`, differentiable: `T' = p0(s)/p*(T)`, `T'' = -T' (s + score*(T) T')`.

    Args:
        s: points, any shape.
        value: `T(s)`, of the same shape; found in any way.
        log_density: log density of the target, entry by entry.
        score: derivative of `log_density`.
    """
    with torch.no_grad():
        points, T = s.detach(), value.detach()
        log_normal = -0.5 * points.square() - 0.5 * float(np.log(2 * np.pi))
        first = torch.exp(log_normal - log_density(T))
        second = -first * (points + score(T) * first)
    return with_derivatives(s, T, first, second)


def derivatives(function: SCALAR_FUNCTION, points: Tensor, order: int) -> list[Tensor]:
    """`[function, function', ..., function^(order)]` at `points`, entry by entry, by repeated reverse mode."""
    with torch.enable_grad():
        u = points.detach().clone().requires_grad_()
        found = [function(u)]
        for _ in range(order):
            last = found[-1]
            if last.requires_grad:
                (derivative,) = torch.autograd.grad(last.sum(), u, create_graph=True, allow_unused=True)
            else:
                derivative = None
            found.append(torch.zeros_like(u) if derivative is None else derivative)
    return [entry.detach() for entry in found]


@dataclass(frozen=True)
class Panels:
    """An integral as a sum over panels on each of which the 20-point Gauss rule has converged.

    Attributes:
        edges: `(k + 1,)`, increasing.
        masses: `(k,)`, the integral over each panel.
        error: estimate of the absolute error of the sum.
    """

    edges: Tensor
    masses: Tensor
    error: float

    @property
    def total(self) -> float:
        """The integral over all panels."""
        return float(self.masses.sum())

    def coefficients(self, integrand: SCALAR_FUNCTION) -> Tensor:
        """Legendre coefficients `(k, 20)` of the integrand on each panel, from the nodes of the Gauss rule."""
        half = 0.5 * (self.edges[1:] - self.edges[:-1])
        points = (self.edges[:-1] + half)[:, None] + half[:, None] * _NODES
        return (integrand(points) * _WEIGHTS) @ _LEGENDRE * (torch.arange(20) + 0.5)


def antiderivative(coefficients: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Integral from -1 to `z` of each row's Legendre series, and the series at `z`: `(n, 20), (n,) -> (n,), (n,)`."""
    before, here = torch.ones_like(z), z
    value: Tensor = coefficients[:, 0]
    integral: Tensor = coefficients[:, 0] * (z + 1)
    for k in range(1, coefficients.shape[1]):
        after = ((2 * k + 1) * z * here - k * before) / (k + 1)
        value = value + coefficients[:, k] * here
        integral = integral + coefficients[:, k] * (after - before) / (2 * k + 1)
        before, here = here, after
    return integral, value


def normal_cdf(x: Tensor) -> Tensor:
    """`Phi(x)` with full relative accuracy in the lower tail, where `torch.special.ndtr` (2.13) has none."""
    cdf: Tensor = 0.5 * torch.special.erfc(x * -math.sqrt(0.5))
    return cdf


def gauss(integrand: SCALAR_FUNCTION, low: Tensor, high: Tensor) -> Tensor:
    """20-point Gauss-Legendre integrals over the intervals `[low, high]`, all of shape `(n,)`."""
    half = 0.5 * (high - low)
    points = 0.5 * (high + low)[:, None] + half[:, None] * _NODES
    return half * (integrand(points) @ _WEIGHTS)


def integrate(
    integrand: SCALAR_FUNCTION,
    edges: Tensor,
    *,
    tolerance: float = 1e-12,
    floor: float = 1.0,
    scale: float | None = None,
) -> Panels:
    """Adaptive quadrature: a panel is halved until that changes it by at most `tolerance max(|panel|, floor scale)`.

    Args:
        integrand: acts entry by entry.
        edges: `(k + 1,)`, increasing, the first panels; break points of the integrand must be among them.
        tolerance: relative to the whole, or to each panel above the `floor`.
        floor: 1 for an accurate sum; tiny to make every panel of a positive integrand accurate, tails included.
        scale: size of the whole; `None`: of the first estimate. Give it where the integral may be 0.

    Raises:
        InputError: the integrand is not finite, or 30 halvings or a million panels are not enough, as with a break
            inside a panel.
    """
    low, high = edges[:-1], edges[1:]
    coarse = gauss(integrand, low, high)
    scale = float(coarse.abs().sum()) if scale is None else scale
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    error = 0.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        left, right = gauss(integrand, low, middle), gauss(integrand, middle, high)
        change = (left + right - coarse).abs()
        if not bool(torch.isfinite(change).all()):
            raise InputError("the integrand is not finite: the reward or the generator returns NaN or infinity")
        fine = change <= tolerance * (left + right).abs().clamp(min=floor * scale)
        done.append((low[fine], high[fine], (left + right)[fine]))
        error += float(change[fine].sum())
        if bool(fine.all()):
            break
        if int((~fine).sum()) > 500_000:
            raise InputError(_NO_CONVERGENCE)
        low, high, coarse = (
            torch.cat([low[~fine], middle[~fine]]),
            torch.cat([middle[~fine], high[~fine]]),
            torch.cat([left[~fine], right[~fine]]),
        )
    else:
        raise InputError(_NO_CONVERGENCE)
    starts, stops, masses = (torch.cat(parts) for parts in zip(*done, strict=True))
    order = torch.argsort(starts)
    return Panels(torch.cat([starts[order], stops[order][-1:]]), masses[order], error + 1e-15 * scale)


def solve_increasing(
    function: Callable[[Tensor, Tensor], Tensor], low: Tensor, high: Tensor, tolerance: float = 1e-15
) -> Tensor:
    """Zeros of increasing functions inside brackets, by Chandrupatla's method; no gradient passes through.

    Args:
        function: `(t, rows) -> value`: the functions of the given rows, all tensors `(k,)`.
        low: `(n,)`; a zero left of it is reported as `low`.
        high: `(n,)`; a zero right of it is reported as `high`.
        tolerance: width of the last bracket, absolute and relative.

    Source:
        T. Chandrupatla, Adv. Eng. Software 28 (1997), DOI 10.1016/S0965-9978(96)00051-8, in `scipy.optimize`.
    """

    def values(t: NDArray[np.float64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
        with torch.no_grad():
            found: NDArray[np.float64] = function(torch.from_numpy(t), torch.from_numpy(rows).long()).numpy()
        return found

    left, right = low.detach().numpy(), high.detach().numpy()
    rows = np.arange(low.numel(), dtype=np.float64)
    at_low, at_high = values(left, rows) >= 0, values(right, rows) <= 0
    width = {"xatol": tolerance, "xrtol": tolerance, "fatol": 0.0, "frtol": 0.0}
    inside = elementwise.find_root(values, (left, right), args=(rows,), tolerances=width).x
    return torch.from_numpy(np.where(at_low, left, np.where(at_high, right, inside)))
