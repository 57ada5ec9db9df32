"""The numbers of matrices that bounds on E(A) are formulas in, each computed once when it is asked for."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from hnkit.bounds import (
    BOUNDS,
    Bound,
    field_of_values_bounds,
    frobenius_bound,
    log_gap,
    second_order_remainder_bound,
    solver_margin,
)
from hnkit.logdet import log_det_error


class MatrixNumbers:
    """Numbers of `(n, d, d)` matrices, each of shape `(n,)` in float64; nats where they are terms of E.

    What a bound of `hnkit.bounds.BOUNDS` may use, in tensors here and in balls in `hnkit.linalg.enclosures`: `dim`,
    `error`, `trace_square`, `frobenius_square`, `norm` and its `h`, `ratio` and `excess`, `singular_sum`,
    `symmetric_error`, `skew_square`, `least`.

    Args:
        matrices: real and finite.
    """

    def __init__(self, matrices: Tensor) -> None:
        self.matrices = matrices.double()

    @property
    def dim(self) -> int:
        """The dimension d."""
        return self.matrices.shape[-1]

    @cached_property
    def error(self) -> Tensor:
        """`E(A) = tr A - log|det(I + A)|`."""
        return log_det_error(self.matrices)

    @cached_property
    def trace_square(self) -> Tensor:
        """`tr(A^2)`."""
        return (self.matrices * self.matrices.mT).sum((-2, -1))

    @cached_property
    def frobenius(self) -> Tensor:
        """`|A|_F`."""
        scale = self.matrices.abs().amax((-2, -1))  # the squares of what is tiny or huge are no numbers
        scale = torch.where((scale > 0) & (scale < torch.inf), scale, torch.ones_like(scale))
        result: Tensor = scale * torch.linalg.vector_norm(self.matrices / scale[..., None, None], dim=(-2, -1))
        return result

    @property
    def frobenius_square(self) -> Tensor:
        """`|A|_F^2`."""
        return self.frobenius.square()

    @cached_property
    def singular_values(self) -> Tensor:
        """`(n, d)`, descending, as the solver gives them."""
        result: Tensor = torch.linalg.svdvals(self.matrices)
        return result

    @cached_property
    def eigenvalues(self) -> Tensor:
        """`(n, d)` of the symmetric part, ascending, as the solver gives them."""
        result: Tensor = torch.linalg.eigvalsh(self.matrices / 2 + self.matrices.mT / 2)
        return result

    @property
    def norm(self) -> Tensor:
        """An upper bound of `|A|_2`: the largest singular value, moved outward by the error of the solver."""
        return self.singular_values[..., 0] * (1 + solver_margin(self.dim))

    @property
    def least(self) -> Tensor:
        """A lower bound of `lambda_min` of the symmetric part, by the error of the solver."""
        return self.eigenvalues[..., 0] - solver_margin(self.dim) * self.eigenvalues.abs().amax(-1)

    @cached_property
    def skew_square(self) -> Tensor:
        """`|K|_F^2` of the skew part K."""
        return (self.matrices / 2 - self.matrices.mT / 2).square().sum((-2, -1))

    @property
    def h(self) -> Tensor:
        """`h(L)` of the norm L, `h(s) = -log(1 - s) - s`."""
        return log_gap(self.norm)

    @property
    def ratio(self) -> Tensor:
        """`h(L)/L^2`."""
        return frobenius_bound(torch.ones_like(self.norm), self.norm)

    @property
    def excess(self) -> Tensor:
        """`h(L)/L^2 - 1/2`."""
        return second_order_remainder_bound(torch.ones_like(self.norm), self.norm)

    @property
    def singular_sum(self) -> Tensor:
        """`sum_i h(sigma_i)`."""
        return log_gap(self.singular_values).sum(-1)

    @property
    def symmetric_error(self) -> Tensor:
        """`E(S)` of the symmetric part S."""
        return log_gap(-self.eigenvalues).sum(-1)

    @cached_property
    def field_of_values(self) -> tuple[Tensor, Tensor]:
        """`field_of_values_bounds`."""
        return field_of_values_bounds(self.matrices)

    def meets(self, bound: Bound) -> Tensor:
        """`(n,)`: where the hypothesis of a bound is met; also at NaN, which no bound survives."""
        return ~(self.norm >= 1) if bound.hypothesis == "norm" else ~(self.least <= -1)

    def scaled(self, factor: float) -> MatrixNumbers:
        """The numbers of the matrices times a positive number, without another decomposition."""
        result = MatrixNumbers(factor * self.matrices)
        result.singular_values = factor * self.singular_values
        result.eigenvalues = factor * self.eigenvalues
        return result


def bound_sides(numbers: MatrixNumbers) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Left and right sides `(n,)` of every bound of `BOUNDS`, NaN where its hypothesis is not met."""
    left: dict[str, Tensor] = {}
    right: dict[str, Tensor] = {}
    kept: dict[str, MatrixNumbers] = {}
    for name, bound in BOUNDS.items():
        where = numbers.meets(bound)
        left[name], right[name] = (torch.full_like(numbers.norm, torch.nan) for _ in range(2))
        if bool(where.any()):
            if bound.hypothesis not in kept:
                kept[bound.hypothesis] = numbers if bool(where.all()) else MatrixNumbers(numbers.matrices[where])
            part = kept[bound.hypothesis]
            left[name][where], right[name][where] = bound.left(part), bound.bound(part)
    return left, right
