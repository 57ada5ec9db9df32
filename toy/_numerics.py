"""Derivatives of maps that are found by solving equations, and quadrature on adaptive panels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hnkit._errors import InputError

_NODES, _WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(20))

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


def gauss(integrand: SCALAR_FUNCTION, low: Tensor, high: Tensor) -> Tensor:
    """20-point Gauss-Legendre integrals over the intervals `[low, high]`, all of shape `(n,)`."""
    half = 0.5 * (high - low)
    points = 0.5 * (high + low)[:, None] + half[:, None] * _NODES
    return half * (integrand(points) @ _WEIGHTS)


def integrate(integrand: SCALAR_FUNCTION, edges: Tensor, tolerance: float = 1e-13) -> Panels:
    """Adaptive quadrature: panels are halved until halving changes them by less than `tolerance` of the whole.

    Args:
        integrand: acts entry by entry.
        edges: `(k + 1,)`, increasing, the first panels; break points of the integrand must be among them.
        tolerance: relative.

    Raises:
        InputError: 30 halvings are not enough: the integrand has a break inside a panel or is not finite.
    """
    low, high = edges[:-1], edges[1:]
    coarse = gauss(integrand, low, high)
    scale = float(coarse.abs().sum())
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    error = 0.0
    for _ in range(30):
        middle = 0.5 * (low + high)
        left, right = gauss(integrand, low, middle), gauss(integrand, middle, high)
        change = (left + right - coarse).abs()
        if not bool(torch.isfinite(change).all()):
            raise InputError("the integrand is not finite: the reward or the generator returns NaN or infinity")
        fine = change <= tolerance * scale
        done.append((low[fine], high[fine], (left + right)[fine]))
        error += float(change[fine].sum())
        if bool(fine.all()):
            break
        low, high, coarse = (
            torch.cat([low[~fine], middle[~fine]]),
            torch.cat([middle[~fine], high[~fine]]),
            torch.cat([left[~fine], right[~fine]]),
        )
    else:
        raise InputError("the quadrature does not converge: list the break points of the reward in `breakpoints`")
    starts, stops, masses = (torch.cat(parts) for parts in zip(*done, strict=True))
    order = torch.argsort(starts)
    return Panels(torch.cat([starts[order], stops[order][-1:]]), masses[order], error + 1e-15 * scale)
