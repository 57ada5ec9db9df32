"""Estimators of `E(J) = tr phi(J)`, `phi(z) = z - log(1 + z)`: one function each of an operator and a probe.

A probe `v` with `E[v v^T] = I` turns the trace into quadratic forms, `E[v^T phi(J) v] = tr phi(J)`. Trace and
log-determinant always share the probe, so that their first-order parts cancel exactly, and every estimator returns
exactly zero at `J = 0`. Each row of the batch is a quadratic form of its own; the transposed Jacobian is used, because
`v^T phi(J) v = v^T phi(J^T) v` and vector-Jacobian products are what networks are good at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hnkit._errors import InputError
from hnkit.logdet import gauss_nodes

Probe = Literal["rademacher", "gaussian", "spherical"]
PROBES: tuple[Probe, ...] = ("rademacher", "gaussian", "spherical")


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
class QuadraticForm:
    """What one probe per row tells about J; every field has shape `(rows,)`, float64.

    Attributes:
        value: estimate of `v^T phi(J) v`.
        trace: `v^T J v`, exact.
        square: `v^T J^2 v`, exact (NaN where the method does not see it).
        frobenius: `|J^T v|^2`, whose mean over probes is `|J|_F^2`.
        norm: a lower bound of the local norm `|J|_2`, from the products made.
        truncation: estimate of the error of `value` as a quadratic form (0 once it is exact).
        products: transposed and plain products spent, per row.
    """

    value: Tensor
    trace: Tensor
    square: Tensor
    frobenius: Tensor
    norm: Tensor
    truncation: Tensor
    products: Tensor


def draw_probes(
    rows: int, dim: int, kind: Probe, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Tensor:
    """Random vectors with `E[v v^T] = I`, shape `(rows, dim)`, float64.

    Rademacher entries are +-1; Gaussian ones standard normal; spherical probes are uniform on the sphere of radius
    `sqrt(dim)`, for noise whose coordinates have no preferred axes. Drawn on the generator's device, then moved.
    """
    source = generator.device if generator is not None else torch.device(device)
    if kind == "rademacher":
        bits = torch.randint(0, 2, (rows, dim), generator=generator, device=source)
        return (2 * bits - 1).double().to(device)
    if kind not in PROBES:
        raise InputError(f"unknown probe {kind!r}: accepted are {', '.join(PROBES)}")
    gaussian = torch.randn(rows, dim, generator=generator, device=source, dtype=torch.float64).to(device)
    if kind == "gaussian":
        return gaussian
    return gaussian * (dim**0.5 / gaussian.norm(dim=1, keepdim=True))


def second_order(operator: Operator, probe: Tensor) -> QuadraticForm:
    """`v^T J^2 v / 2`, the leading term of `v^T phi(J) v`, by two transposed products.

    `E(J) = tr(J^2)/2 + R`, `|R| <= (|J|_F^2 / L^2)(h(L) - L^2/2)` for `|J|_2 <= L < 1`.

    Source: THEORY item c; `proofs/second_order`.
    """
    first = operator.vjp(probe)
    second = operator.vjp(first)
    square = dot(probe, second)
    norms = torch.stack([dot(probe, probe), dot(first, first), dot(second, second)]).sqrt()
    norm = torch.maximum(ratio(norms[1], norms[0]), ratio(norms[2], norms[1]))
    return QuadraticForm(
        value=square / 2,
        trace=dot(probe, first),
        square=square,
        frobenius=norms[1].square(),
        norm=norm,
        # The first term left out is v^T J^3 v / 3.
        truncation=norms[0] * norms[2] * norm / 3,
        products=torch.full_like(square, 2.0),
    )


@dataclass(frozen=True)
class KrylovSpace:
    """Arnoldi's relation `J^T Q_m = Q_{m+1} H` of every row.

    Attributes:
        basis: `(m + 1, rows, d)`, orthonormal along the first axis (zero vectors after a breakdown).
        hessenberg: `(rows, m + 1, m)`.
        scale: `(rows,)`, the length of the probe.
    """

    basis: Tensor
    hessenberg: Tensor
    scale: Tensor


class ArnoldiProcess:
    """Grows the Krylov space of `J^T` from a probe, one transposed product per step and row.

    Full orthogonalisation, applied twice. A row whose space is exhausted (the residual is rounding) continues with
    zero vectors, which leaves its Hessenberg matrix, and every function of it, unchanged: a zero operator gives H = 0.
    """

    def __init__(self, operator: Operator, probe: Tensor) -> None:
        self._operator = operator
        self.scale = probe.norm(dim=1)
        self._basis = probe.new_zeros(9, *probe.shape)
        self._basis[0] = probe / self.scale[:, None]
        self._columns = probe.new_zeros(probe.shape[0], 9, 8)
        self.steps = 0
        self.alive = torch.ones_like(self.scale, dtype=torch.bool)
        self.work = torch.zeros_like(self.scale)

    def advance(self) -> None:
        """One more transposed product."""
        m = self.steps
        if m + 1 == self._basis.shape[0]:
            capacity = 2 * m
            basis = self._basis.new_zeros(capacity + 1, *self._basis.shape[1:])
            basis[: m + 1] = self._basis[: m + 1]
            columns = self._columns.new_zeros(self._columns.shape[0], capacity + 1, capacity)
            columns[:, : m + 1, :m] = self._columns[:, : m + 1, :m]
            self._basis, self._columns = basis, columns
        self.work += self.alive
        vector = self._operator.vjp(self._basis[m]) * self.alive[:, None]
        length = vector.norm(dim=1)
        known = self._basis[: m + 1]
        for _ in range(2):
            overlap = torch.einsum("krd,rd->rk", known, vector)
            vector = vector - torch.einsum("krd,rk->rd", known, overlap)
            self._columns[:, : m + 1, m] += overlap
        rest = vector.norm(dim=1)
        self.alive = self.alive & (rest > 1e-14 * length)
        rest = torch.where(self.alive, rest, torch.zeros_like(rest))
        self._columns[:, m + 1, m] = rest
        self._basis[m + 1] = torch.where(self.alive[:, None], vector / rest[:, None], torch.zeros_like(vector))
        self.steps = m + 1

    @property
    def space(self) -> KrylovSpace:
        """The space so far."""
        m = self.steps
        return KrylovSpace(self._basis[: m + 1], self._columns[:, : m + 1, :m], self.scale)


def arnoldi(
    operator: Operator, probe: Tensor, *, steps: int | None = None, tolerance: float = 1e-3, max_steps: int = 64
) -> QuadraticForm:
    """`|v|^2 e_1^T phi(H_m) e_1` with the Hessenberg matrix of Arnoldi's process on `J^T`, by m transposed products.

    Exact for polynomials of degree m, and whenever the Krylov space is exhausted. For `|J|_2 <= L < 1` the quadratic
    form is off by at most `2 |v|^2 L^(m+1) / ((m+1)(1-L))`.

    Args:
        operator: J.
        probe: `(rows, d)`.
        steps: m; `None`: as many as bring the estimated error, summed over the rows, below `tolerance`.
        tolerance: of the adaptive choice, relative to the size of the forms, `|J^T v|^2 / 2` summed over the rows.
        max_steps: limit of the adaptive choice.

    Raises:
        InputError: a local norm of at least 1 shows up: the series behind phi need not converge.

    Source: `proofs/arnoldi_bias`.
    """
    process = ArnoldiProcess(operator, probe)
    limit = min(operator.dim, max_steps) if steps is None else min(operator.dim, steps)
    values: list[Tensor] = []
    truncation = torch.full_like(process.scale, torch.inf)
    norm = torch.zeros_like(process.scale)
    while process.steps < limit:
        process.advance()
        space = process.space
        if steps is not None and process.steps < limit - 2 and bool(process.alive.any()):
            continue
        norm = refuse_expansive(space.hessenberg, "arnoldi")
        values.append(space.scale**2 * phi_corner(space.hessenberg[:, :-1]))
        truncation = _extrapolated_error(values, process.alive)
        if not bool(process.alive.any()):
            break
        size = (space.scale * space.hessenberg[:, :2, 0].norm(dim=1)) ** 2 / 2
        if steps is None and process.steps >= 3 and float(truncation.sum()) <= tolerance * float(size.sum()):
            break
    space = process.space
    H = space.hessenberg
    scale = space.scale**2
    return QuadraticForm(
        value=values[-1],
        trace=scale * H[:, 0, 0],
        square=scale * (H[:, 0, :2] * H[:, :2, 0][:, : H.shape[2]]).sum(1) if H.shape[2] > 1 else scale * torch.nan,
        frobenius=scale * H[:, :2, 0].square().sum(1),
        norm=norm,
        truncation=truncation,
        products=process.work,
    )


def _extrapolated_error(values: list[Tensor], alive: Tensor) -> Tensor:
    """Error of the last value, from the last two changes continued as a geometric series; 0 for exhausted rows.

    The larger of the two last changes is taken, so that one accidental coincidence of two values stops nothing.
    """
    if len(values) < 2:
        return torch.where(alive, values[-1].abs(), torch.zeros_like(values[-1]))
    last = (values[-1] - values[-2]).abs()
    previous = (values[-2] - values[-3]).abs() if len(values) > 2 else values[-2].abs()
    decay = ratio(last, previous).clamp(max=0.95)
    estimate = torch.maximum(last, decay * previous) * decay / (1 - decay)
    # A decay of exactly zero is an accident or exhaustion; the latter shows in `alive`.
    return torch.where(alive, torch.maximum(estimate, 0.1 * last), torch.zeros_like(estimate))


def phi_corner(H: Tensor) -> Tensor:
    """`e_1^T phi(H) e_1` of `(rows, m, m)` matrices of norm below 1, accurate for tiny H.

    `phi(H) = int_0^1 t H^2 (I + tH)^-1 dt` by Gauss-Legendre quadrature; nothing of first order is formed, and no
    eigenvectors are needed, which a nilpotent or nearly defective H does not have.
    """
    norm = float(torch.linalg.matrix_norm(H, ord=2).max()) if H.numel() else 0.0
    if norm == 0.0:
        return H.new_zeros(H.shape[0])
    nodes, weights = gauss_nodes(norm)
    t = torch.as_tensor(nodes, dtype=H.dtype, device=H.device)
    w = torch.as_tensor(weights, dtype=H.dtype, device=H.device)
    shifted = t[:, None, None, None] * H
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    solved = torch.linalg.solve(shifted, H[:, :, 0].expand(t.numel(), -1, -1))
    return torch.einsum("t,rk,trk->r", w * t, H[:, 0, :], solved)


def refuse_expansive(H: Tensor, method: str) -> Tensor:
    """The norms of `(rows, m + 1, m)` Hessenberg matrices, lower bounds of `|J|_2`; raises where one reaches 1."""
    norm: Tensor = torch.linalg.matrix_norm(H, ord=2)
    refuse_norm(norm, method)
    return norm


def refuse_norm(norm: Tensor, method: str) -> None:
    """Raise `InputError` if a local norm of at least 1 was found: the series of log(1 + z) need not converge."""
    largest = float(norm.max())
    if largest >= 1:
        raise InputError(
            f"method {method} needs a local norm |J(x)|_2 below 1 and found at least {largest:.4g}: use exact or lanczos"
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product."""
    return (a * b).sum(1)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))
