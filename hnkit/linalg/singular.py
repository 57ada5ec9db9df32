"""Leading singular triples of the Jacobian at every row, by Golub-Kahan bidiagonalisation with restarts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hnkit.jacobian import RowJacobian

BASIS = 48
"""Krylov vectors kept per side and row before a restart."""

CYCLES = 12
"""Restarts after which a row is left as it is."""

FEWEST_STEPS = 8
"""Steps before the first convergence test: a residual alone does not say which singular value it is."""

_CHECK_EVERY = 4  # steps between convergence tests
_PATIENCE = 3  # cycles in which a residual that does not fall to this share of itself is what the products resolve
_PROGRESS = 0.7


@dataclass(frozen=True)
class LocalNorms:
    """Spectral norms of the Jacobian at each row, with the singular vectors and the residuals they leave.

    `value = |J v|` for the unit vector `v = right`, so that it never exceeds `|J|_2` beyond rounding, and some singular
    value lies within `value * residual` of it.

    Attributes:
        value: `(n,)` float64.
        residual: `(n,)` relative residual `|J' u - value v| / value`, 0 where `J v = 0`.
        left: `(n, d)` unit vectors `u = J v / |J v|`.
        right: `(n, d)` unit vectors `v`.
        products: matrix-vector products spent, over all rows and both sides.
        tolerance: the relative residual aimed at. A row above it is still `|J v|` for a unit v, a lower bound of
            `|J|_2` to the accuracy of the products: either the products resolve no more, or the cycles were used up.
    """

    value: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor
    products: int
    tolerance: float = 0.0

    @property
    def converged(self) -> Tensor:
        """`(n,)`: whether the residual reached the tolerance."""
        return self.residual <= self.tolerance


def unit_rows(vectors: Tensor, floor: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Norms and unit vectors of rows; rows of norm at most `floor` become 0. Scaled, so that nothing underflows."""
    scale = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(scale > 0, scale, torch.ones_like(scale))
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    length = (norm * scale).squeeze(-1)
    keep = (length > floor).unsqueeze(-1)
    unit = torch.where(keep, scaled / torch.where(norm > 0, norm, torch.ones_like(norm)), torch.zeros_like(scaled))
    return torch.where(keep.squeeze(-1), length, torch.zeros_like(length)), unit


def _against(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    """Remove the components along an orthonormal basis, twice: once leaves rounding errors of the size removed."""
    stacked = torch.stack(basis, 1)
    for _ in range(2):
        vectors = vectors - torch.einsum("rk,rkd->rd", torch.einsum("rkd,rd->rk", stacked, vectors), stacked)
    return vectors


def leading_singular(
    operator: RowJacobian,
    start: Tensor,
    *,
    tolerance: float,
    basis: int = BASIS,
    cycles: int = CYCLES,
) -> LocalNorms:
    """Largest singular value of J at every row by Golub-Kahan bidiagonalisation with full reorthogonalisation.

    A cycle builds `J V = U B`, `J' U = V B' + beta v e'` and takes the leading singular pair of the bidiagonal B; the
    next cycle starts from it, so that its first two products measure `|J v|` and the residual `|J' u - sigma v|`
    afresh. A row counts as converged only by such a measured residual, never by the recurrence's own estimate.

    The residual places *some* singular value within `tolerance * sigma`. That it is the largest one rests on the
    start having a component along its singular vector, true with probability one for a random start.

    Products of a network in half precision resolve no more than its rounding: a row whose residual stops falling is
    left at what it reached.

    Args:
        operator: products of J at each row.
        start: `(rows, d)` start vectors, not zero.
        tolerance: relative residual to reach.
        basis: Krylov vectors per side before a restart.
        cycles: cycles after which it stops, converged or not: the caller reads `residual`.

    Returns:
        The norms; not every row need be converged.

    Source:
        G. Golub and W. Kahan, SIAM J. Numer. Anal. 2 (1965), DOI 10.1137/0702016.
    """
    steps = min(basis, operator.dim)
    products = operator.num_jvp + operator.num_vjp
    right = unit_rows(start.double())[1]
    best: LocalNorms | None = None
    least: list[Tensor] = []
    for cycle in range(cycles + 1):
        sigma, left = unit_rows(operator.jvp(right))
        pulled = operator.vjp(left)
        rest = pulled - sigma.unsqueeze(-1) * right
        residual = torch.where(sigma > 0, unit_rows(rest)[0] / sigma, torch.zeros_like(sigma))
        if cycle > 0 or cycles == 0:
            spent = operator.num_jvp + operator.num_vjp - products
            best = _better(best, LocalNorms(sigma, residual, left, right, spent, tolerance))
            least.append(torch.minimum(least[-1], residual) if least else residual)
            if cycle == cycles or bool((best.converged | _stalled(least)).all()):
                break
        right = _bidiagonal_cycle(operator, sigma, left, rest, right, steps, tolerance)
    assert best is not None
    return best


def _stalled(least: list[Tensor]) -> Tensor:
    """Rows whose least residual so far, after each cycle, has hardly fallen in the last few."""
    if len(least) <= _PATIENCE:
        return torch.zeros_like(least[-1], dtype=torch.bool)
    return least[-1] > _PROGRESS * least[-1 - _PATIENCE]


def _better(best: LocalNorms | None, new: LocalNorms) -> LocalNorms:
    """Row by row the larger value, with its own vectors and residual."""
    if best is None:
        return new
    take = new.value >= best.value
    rows = take.unsqueeze(-1)
    return LocalNorms(
        torch.where(take, new.value, best.value),
        torch.where(take, new.residual, best.residual),
        torch.where(rows, new.left, best.left),
        torch.where(rows, new.right, best.right),
        new.products,
        new.tolerance,
    )


def _bidiagonal_cycle(
    operator: RowJacobian, sigma: Tensor, left: Tensor, rest: Tensor, right: Tensor, steps: int, tolerance: float
) -> Tensor:
    """Right Ritz vectors of one cycle that starts at the pair `(left, right)` with `J right = sigma left`.

    A vector that vanishes (an invariant subspace is complete) is replaced by zero, and so is all that follows in its
    row: the padded bidiagonal matrix keeps its singular values.
    """
    eps = torch.finfo(torch.float64).eps
    V, U = [right], [left]
    diagonal: list[Tensor] = [sigma]
    above: list[Tensor] = []
    size = sigma
    for k in range(1, steps + 1):
        beta, v = unit_rows(_against(rest, V), 8 * eps * size)
        if k == steps or not bool(beta.any()):
            break
        if k >= FEWEST_STEPS and k % _CHECK_EVERY == 0:
            outer, value, _ = _small_svd(diagonal, above)
            estimate = beta * outer[:, -1].abs()
            if bool((estimate <= 0.25 * tolerance * value).all()):
                break
        alpha, u = unit_rows(_against(operator.jvp(v) - beta.unsqueeze(-1) * U[-1], U), 8 * eps * size)
        rest = operator.vjp(u) - alpha.unsqueeze(-1) * v
        V.append(v)
        U.append(u)
        above.append(beta)
        diagonal.append(alpha)
        size = torch.maximum(size, torch.maximum(alpha, beta))
    ritz = torch.einsum("rk,rkd->rd", _small_svd(diagonal, above)[2], torch.stack(V, 1))
    length, unit = unit_rows(ritz)
    return torch.where((length > 0).unsqueeze(-1), unit, right)


def _small_svd(diagonal: list[Tensor], above: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Leading left vector, value and right vector of the bidiagonal matrix of every row."""
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if above:
        matrix = matrix + torch.diag_embed(torch.stack(above, -1), offset=1)
    u, s, vh = torch.linalg.svd(matrix)
    return u[..., 0], s[..., 0], vh[..., 0, :]
