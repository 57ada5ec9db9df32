"""Krylov spaces of J and functions of the small matrices that they leave."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import scipy.linalg
import torch
from scipy.special import roots_legendre
from torch import Tensor

from hnkit.maps import slices

# Relative length of a residual that counts as rounding: the Krylov space is exhausted.
_EXHAUSTED = 1e-14
# Entries of the shifted matrices that the quadrature of phi solves together.
_QUADRATURE_ENTRIES = 2**21


class Operator(Protocol):
    """J at `rows` points, acting on `(rows, dim)` float64 vectors; `hnkit.RowJacobian` is one."""

    rows: int
    dim: int

    def vjp(self, u: Tensor) -> Tensor:
        """`J^T u`."""
        ...

    def jvp(self, v: Tensor) -> Tensor:
        """`J v`."""
        ...


@dataclass(frozen=True)
class KrylovSpace:
    """Arnoldi's relation `J^T Q_m = Q_{m+1} H` of every row.

    Attributes:
        basis: `(rows, m + 1, d)`, orthonormal rows (zero vectors after a breakdown).
        hessenberg: `(rows, m + 1, m)`.
        scale: `(rows,)`, the length of the probe.
    """

    basis: Tensor
    hessenberg: Tensor
    scale: Tensor


class ArnoldiProcess:
    """Grows the Krylov space of `J^T` from a probe, one transposed product per step and row.

    Every vector is orthogonalised against all before it, a second time where the first left little of it. A row whose
    space is exhausted (the residual is rounding) continues with zero vectors, which leaves its Hessenberg matrix, and
    every function of it, unchanged: a zero operator gives H = 0.

    Attributes:
        steps: m.
        scale: `(rows,)`, the length of the probe.
        alive: `(rows,)`, whether the space can still grow.
        work: `(rows,)`, products spent until the space was exhausted.
    """

    def __init__(self, operator: Operator, probe: Tensor) -> None:
        self._operator = operator
        self.scale = probe.norm(dim=1)
        rows, dim = probe.shape
        self._basis = probe.new_empty(rows, 9, dim)
        self._basis[:, 0] = probe / self.scale[:, None]
        self._columns = probe.new_zeros(rows, 9, 8)
        self.steps = 0
        self.alive = torch.ones_like(self.scale, dtype=torch.bool)
        self.work = torch.zeros_like(self.scale)
        self._rests: dict[int, Tensor] = {}
        self._vector_rest: Tensor = torch.zeros_like(self.scale)

    def advance(self) -> None:
        """One more transposed product."""
        m = self.steps
        if m + 1 == self._basis.shape[1]:
            self._basis = torch.nn.functional.pad(self._basis, (0, 0, 0, m))
            self._columns = torch.nn.functional.pad(self._columns, (0, m, 0, m))
        self.work += self.alive
        vector = self._operator.vjp(self._basis[:, m])
        length = vector.norm(dim=1)
        known = self._basis[:, : m + 1]
        rest = length
        for _ in range(2):
            overlap = torch.bmm(vector[:, None], known.mT)
            vector = torch.baddbmm(vector[:, None], overlap, known, alpha=-1)[:, 0]
            self._columns[:, : m + 1, m] += overlap[:, 0]
            before, rest = rest, vector.norm(dim=1)
            if bool((rest >= 0.5 * before).all()):
                break
        self.alive = self.alive & (rest > _EXHAUSTED * length) & (m + 1 < self._operator.dim)
        rest = torch.where(self.alive, rest, torch.zeros_like(rest))
        self._columns[:, m + 1, m] = rest
        inverse = torch.where(self.alive, 1 / rest, torch.zeros_like(rest))
        torch.mul(vector, inverse[:, None], out=self._basis[:, m + 1])
        self.steps = m + 1

    @property
    def space(self) -> KrylovSpace:
        """The space so far."""
        m = self.steps
        return KrylovSpace(self._basis[:, : m + 1], self._columns[:, : m + 1, :m], self.scale)

    def truncation(self) -> Tensor:
        """Estimated error of `|v|^2 e_1^T phi(H_m) e_1` as a value of `v^T phi(J) v`, `(rows,)`; no bound.

        The smaller of the estimates of the last two spaces (see `_arnoldi_rest`): that of one space is too large by
        the size of `e_1^T (I + t H)^-1 e_1` where the vector after it misses the slow directions.
        """
        return torch.minimum(self._rest(max(1, self.steps - 1)), self._rest(self.steps))

    def latest_truncation(self) -> Tensor:
        """The estimate of the last space alone, `(rows,)`: what a rule that stops has to go by."""
        return self._rest(self.steps)

    def vector_truncation(self) -> Tensor:
        """Estimated length of the error of `|v| Q_m phi(H_m) e_1` as a value of `phi(J^T) v`, `(rows,)`; no bound."""
        self._rest(self.steps)
        rest: Tensor = self._vector_rest
        return rest

    def _rest(self, m: int) -> Tensor:
        if m not in self._rests:
            form, vector = _arnoldi_rest(self._columns[:, : m + 1, :m])
            self._rests[m] = self.scale.square() * form
            if m == self.steps:
                self._vector_rest = self.scale * vector
        return self._rests[m]


class LanczosProcess:
    """Grows the Krylov space of `M = J + J^T + J^T J` from a probe, one product with J and one with `J^T` per step.

    `I + M = (I + J)^T (I + J)`, so this is Golub and Kahan's bidiagonalisation of `B = I + J` in other coordinates:
    the same spaces, and `T = R^T R - I` of its bidiagonal R. Working with M keeps the digits of a small J, which the
    identity would swallow. Full orthogonalisation, applied twice.

    Attributes:
        steps: m.
        diagonal: `(rows, m)` of the tridiagonal `T_m = Q_m^T M Q_m`.
        beside: `(rows, m)`, its off-diagonal and, last, the length of the residual.
        scale: `(rows,)`, the length of the probe.
        start: `v / |v|`, `(rows, d)`.
        first: `J v / |v|`, `first_transposed`: `J^T v / |v|`, `(rows, d)`.
        norm: `(rows,)`, largest `|J q|` of the unit vectors met, a lower bound of `|J|_2`.
    """

    def __init__(self, operator: Operator, probe: Tensor) -> None:
        self._operator = operator
        self.scale = probe.norm(dim=1)
        self.start = probe / self.scale[:, None]
        self._basis = [self.start]
        self._diagonal: list[Tensor] = []
        self._beside: list[Tensor] = []
        self.first = self.first_transposed = torch.zeros_like(probe)
        self.norm = torch.zeros_like(self.scale)
        self._rests: dict[int, tuple[Tensor, Tensor]] = {}
        self.alive = torch.ones_like(self.scale, dtype=torch.bool)
        self.work = torch.zeros_like(self.scale)

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return len(self._diagonal)

    @property
    def diagonal(self) -> Tensor:
        """See the class."""
        return torch.stack(self._diagonal, 1)

    @property
    def beside(self) -> Tensor:
        """See the class."""
        return torch.stack(self._beside, 1)

    def advance(self) -> None:
        """One more product with J and one with its transpose; the first step takes one more, for `first_transposed`."""
        unit = self._basis[-1]
        pushed = self._operator.jvp(unit)
        if self.steps == 0:
            self.first, self.first_transposed = pushed, self._operator.vjp(unit)
            pulled = self.first_transposed + self._operator.vjp(pushed)
            self.work += 1
        else:
            pulled = self._operator.vjp(unit + pushed)
        self.work += 2 * self.alive
        self.norm = torch.maximum(self.norm, pushed.norm(dim=1))
        vector = pushed + pulled
        length = vector.norm(dim=1)
        # q' M q = 2 q' J q + |J q|^2
        self._diagonal.append(2 * (unit * pushed).sum(1) + pushed.square().sum(1))
        basis = torch.stack(self._basis)
        for _ in range(2):
            vector = vector - torch.einsum("krd,rk->rd", basis, torch.einsum("krd,rd->rk", basis, vector))
        rest = vector.norm(dim=1)
        self.alive = self.alive & (rest > _EXHAUSTED * length) & (self.steps < self._operator.dim)
        rest = torch.where(self.alive, rest, torch.zeros_like(rest))
        self._beside.append(rest)
        self._basis.append(torch.where(self.alive[:, None], vector / rest[:, None], torch.zeros_like(vector)))

    def truncation(self) -> Tensor:
        """Estimated error of `|v|^2 e_1^T phi(T_m) e_1 / 2`, `(rows,)`; no bound.

        The smallest of the estimates of the last three spaces (see `_lanczos_rest`). Gauss quadrature of phi only
        rises, so its error only falls: an earlier estimate stays one.
        """
        last = [self._rest(m)[0] for m in range(max(1, self.steps - 2), self.steps + 1)]
        return torch.stack(last).amin(0)

    def latest_truncation(self) -> Tensor:
        """The cautious estimate of the last space alone, `(rows,)`: what a rule that stops has to go by."""
        return self._rest(self.steps)[1]

    def _rest(self, m: int) -> tuple[Tensor, Tensor]:
        if m not in self._rests:
            T = self.matrix()[:, :m, :m]
            likely, cautious = _lanczos_rest(T, self._beside[m - 1])
            factor = self.scale.square() / 2
            self._rests[m] = factor * likely, factor * cautious
        return self._rests[m]

    def matrix(self) -> Tensor:
        """`T_m`, `(rows, m, m)`."""
        matrix = torch.diag_embed(self.diagonal)
        above = torch.diag_embed(self.beside[:, :-1], offset=1)
        return matrix + above + above.mT

    def radau_matrix(self, node: float) -> Tensor:
        """`T_m` with one more row and column, chosen so that `node` is an eigenvalue, `(rows, m + 1, m + 1)`.

        Source: G. Golub and G. Meurant, Matrices, Moments and Quadrature, section 6.2; a row whose space is exhausted
        keeps its matrix, with the node decoupled.
        """
        T = self.matrix()
        last = self.beside[:, -1]
        shifted = T - node * torch.eye(self.steps, dtype=T.dtype, device=T.device)
        right = torch.zeros_like(self.diagonal)
        right[:, -1] = last.square()
        delta = torch.linalg.solve(shifted, right)[:, -1]
        extended = torch.nn.functional.pad(T, (0, 1, 0, 1))
        extended[:, -1, -1] = node + delta
        extended[:, -1, -2] = extended[:, -2, -1] = last
        return extended


def phi_column(H: Tensor, norm: float, tolerance: float = 1e-15) -> Tensor:
    """`phi(H) e_1`, `phi(z) = z - log(1 + z)`, of matrices of norm below 1, accurate for tiny H.

    `phi(H) = int_0^1 t (I + tH)^-1 H^2 dt` by Gauss-Legendre quadrature; nothing of first order is formed, and no
    eigenvectors are needed, which a nilpotent or nearly defective H does not have.

    Args:
        H: `(rows, m, m)`.
        norm: the largest `|H|_2` of the rows, or more; below 1.
        tolerance: relative error of the quadrature.

    Returns:
        `(rows, m)`.

    Source: `proofs/resolvent`.
    """
    if norm == 0.0:
        return H.new_zeros(H.shape[:2])
    square = torch.bmm(H, H[:, :, :1])
    result = torch.zeros_like(square[:, :, 0])
    for t, w, solved in _resolvents(H, square, norm, tolerance):
        result += torch.einsum("t,tri->ri", w * t, solved[..., 0])
    return result


def phi_corner(H: Tensor, norm: Tensor) -> Tensor:
    """`e_1^T (H - Re log(I + H)) e_1` of small matrices of any norm with `I + H` invertible.

    Below a norm of 1 by the quadrature of `phi_column`. Above it by the Schur-Parlett logarithm, row by row: the real
    part of the principal logarithm has the trace `log|det(I + H)|` also where eigenvalues of `I + H` are negative.

    Args:
        H: `(rows, m, m)`.
        norm: `(rows,)`, `|H|_2` or more.

    Returns:
        `(rows,)`.
    """
    inside = norm < 1
    corner = torch.empty_like(norm)
    if bool(inside.any()):
        corner[inside] = phi_column(H[inside], float(norm[inside].max()))[:, 0]
    if not bool(inside.all()):
        identity = np.eye(H.shape[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # scipy's guess of an error of about 1e-12
            logarithms = [scipy.linalg.logm(identity + matrix)[0, 0].real for matrix in H[~inside].cpu().numpy()]
        corner[~inside] = H[~inside, 0, 0] - torch.as_tensor(logarithms, dtype=H.dtype, device=H.device)
    return corner


def _resolvents(H: Tensor, right: Tensor, norm: float, tolerance: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Nodes t, weights, and `(I + t H)^-1 right` of shape `(nodes, rows, m, k)`, as many nodes as memory holds."""
    nodes, weights = gauss_nodes(norm, tolerance)
    block = max(1, _QUADRATURE_ENTRIES // H.numel())
    for part in slices(len(nodes), block):
        t = torch.as_tensor(nodes[part], dtype=H.dtype, device=H.device)
        w = torch.as_tensor(weights[part], dtype=H.dtype, device=H.device)
        shifted = t[:, None, None, None] * H
        shifted.diagonal(dim1=-2, dim2=-1).add_(1)
        yield t, w, torch.linalg.solve(shifted, right.expand(t.numel(), H.shape[0], -1, -1))


# Relative error of the quadratures behind estimates of an error.
_ROUGH = 1e-2


def _arnoldi_rest(H: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate of what `e_1^T phi(H_m) e_1` leaves out, from the `(rows, m + 1, m)` matrix of Arnoldi's process.

    With `R = (I + t H_m)^-1` the residual of the Galerkin solution of `(I + t J^T) x = e_1` is
    `-t h_(m+1,m) R_m1 q_(m+1)`, so that what is left out is exactly

        int_0^1 h_(m+1,m) R_m1 (e_1^T (I + t J^T)^-1 q_(m+1)) dt.

    The last factor is the way back from a vector that the space does not hold. It is taken to be the way back from its
    last vector, `|R_1m|`, or from the one before and as much weaker as that one is reached more weakly,
    `|R_1,m-1 R_m1 / R_m-1,1|` (the same where J is symmetric; elsewhere two numbers are not both small by accident),
    times the response of the start, `max(1, |R_11|)`, which says how slowly resolvents converge for these spectra. No
    difference of two values enters: for a spectrum that is symmetric about 0 every second value repeats the one before.
    Without the way back, the integral estimates the length of what the vector `Q_m phi(H_m) e_1` leaves out.

    Returns:
        The estimates for the form and for the vector, each `(rows,)`.
    """
    m = H.shape[2]
    norm = float(spectral_norm(H).max())
    form, vector = H.new_zeros(H.shape[0]), H.new_zeros(H.shape[0])
    if norm == 0.0:
        return form, vector
    ends = H.new_zeros(m, 3)
    ends[0, 0] = ends[-1, 1] = 1
    if m > 2:
        ends[-2, 2] = 1
    for _, w, solved in _resolvents(H[:, :m], ends, min(norm, 1 - 1e-12), _ROUGH):
        there, back = solved[..., 0].abs(), solved[:, :, 0].abs()
        last = there[:, :, -1]
        way = back[:, :, 1]
        if m > 2:
            weaker = torch.where(there[:, :, -2] > last, last / there[:, :, -2], torch.ones_like(last))
            way = torch.maximum(way, back[:, :, 2] * weaker)
        down = last * there[:, :, 0].clamp(min=1)
        vector += torch.einsum("t,tr->r", w, down)
        form += torch.einsum("t,tr->r", w, down * way)
    reached = H[:, m, m - 1].abs()
    return form * reached, vector * reached


def _lanczos_rest(T: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of what `e_1^T phi(T_m) e_1` leaves out, from T_m and the length of the residual.

    For a symmetric operator M what is left out is `int_0^1 t (beta_m R_m1)^2 (q_(m+1)^T (I + t M)^-1 q_(m+1)) dt`, with
    `R = (I + t T_m)^-1`: never negative. The last factor lies between the responses of the fastest and the slowest
    directions. It is taken to be the geometric mean of that of the first vector, `R_11`, and of the slowest vector met,
    `R_kk`: the slowest of the last three for a likely value, of all for a cautious one.

    Returns:
        The likely and the cautious estimate, each `(rows,)`.
    """
    values, vectors = torch.linalg.eigh(T)
    nodes, weights = gauss_nodes(min(max(float(-values.min()), 0.5), 1 - 1e-14), _ROUGH)
    t = torch.as_tensor(nodes, dtype=T.dtype, device=T.device)
    w = torch.as_tensor(weights, dtype=T.dtype, device=T.device)
    inverse = 1 / (1 + t[:, None, None] * values.clamp(min=-1))
    down = (inverse * (vectors[:, -1] * vectors[:, 0])).sum(2)
    response = torch.einsum("trk,rik->tri", inverse, vectors.square())
    base = (w * t)[:, None] * (beside * down).square() * response[:, :, 0].sqrt()
    return tuple((base * part.amax(2).sqrt()).sum(0) for part in (response[:, :, -3:], response))  # type: ignore[return-value]


def spectral_norm(H: Tensor) -> Tensor:
    """Largest singular value of small matrices `(rows, p, m)`, by the symmetric eigenvalues of `H^T H`."""
    if H.numel() == 0:
        return H.new_zeros(H.shape[0])
    size = H.flatten(1).abs().amax(1)
    scaled = H / torch.where(size > 0, size, torch.ones_like(size))[:, None, None]
    largest: Tensor = torch.linalg.eigvalsh(scaled.mT @ scaled)[:, -1]
    return size * largest.clamp(min=0).sqrt()


def gauss_nodes(norm: float, tolerance: float = 1e-15) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Nodes and weights on [0, 1], enough for `int_0^1 t A^2 (I + tA)^-1 dt` at `|A|_2 <= norm < 1`.

    The integrand is analytic in `|t| < 1/norm`. The interval is cut into K panels so that the distances of their ends
    from `1/norm` fall by one factor `g = (1 - norm)^(-1/K)`. The Bernstein ellipse of each through `1/norm` has the
    parameter `rho = (sqrt(g) + 1)/(sqrt(g) - 1)`; n Gauss-Legendre nodes in each leave a relative error of the order
    `rho^(-2n)`. K is about `-log(1 - norm)/2`, which needs the fewest nodes: 1 up to a norm of 0.95.

    Source: Trefethen, Approximation Theory and Approximation Practice, Theorem 19.3; `proofs/resolvent`.
    """
    norm = min(max(norm, 1e-3), 1 - 2**-53)
    panels = max(1, round(-math.log1p(-norm) / 2))
    shrink = (1 - norm) ** (-1 / panels)
    rho = (math.sqrt(shrink) + 1) / (math.sqrt(shrink) - 1)
    nodes, weights = _legendre(max(3, math.ceil(-math.log(tolerance) / (2 * math.log(rho))) + 2))
    ends = (1 - shrink ** -np.arange(panels + 1.0)) / norm
    ends[-1] = 1.0
    widths = np.diff(ends)[:, None]
    return (ends[:-1, None] + widths * nodes).ravel(), (widths * weights).ravel()


@lru_cache(maxsize=64)
def _legendre(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    nodes, weights = roots_legendre(count)
    return (nodes + 1) / 2, weights / 2
