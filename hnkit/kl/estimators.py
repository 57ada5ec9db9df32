"""Estimators of `E(J) = tr phi(J)`, `phi(z) = z - log(1 + z)`: one function each of an operator and a probe.

A probe `v` with `E[v v^T] = I` turns the trace into quadratic forms, `E[v^T phi(J) v] = tr phi(J)`. Trace and
log-determinant always share the probe, so that their first-order parts cancel exactly, and every estimator returns
exactly zero at `J = 0`. Each row of the batch is a quadratic form of its own; the transposed Jacobian is used, because
`v^T phi(J) v = v^T phi(J^T) v` and vector-Jacobian products are what networks are good at.

Bounds are of the truncation error of the quadratic form itself, `|value - v^T phi(J) v|`, given the probe; their mean
bounds the bias of the mean. They need a proved `L >= |J|_2`, `L < 1`, and are NaN without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hnkit.bounds import log_gap, second_order_remainder_bound
from hnkit.errors import ExpansiveMapError, InputError
from hnkit.internal.stats import rounded_down
from hnkit.linalg.krylov import ArnoldiProcess, LanczosProcess, Operator, phi_column, phi_corner, spectral_norm

Probe = Literal["rademacher", "gaussian", "spherical"]
PROBES: tuple[Probe, ...] = ("rademacher", "gaussian", "spherical")

MAX_STEPS = 64
"""Length at which adaptive spaces and series end."""
# An estimated error is within a factor of a few of the error: adaptive steps go on until four times it is small enough.
_SAFETY = 4.0
# The roulette's chance of one more term: about 500 terms.
_MOST_LIKELY = 0.998
# The largest proved L that gives Lanczos a bracket: (1 - L)^2 = 1e-12 stands above the rounding of its matrices.
_MAX_BRACKET = 1 - 1e-6


@dataclass(frozen=True)
class QuadraticForm:
    """What one probe per row tells about J; every field has shape `(rows,)`, float64.

    Attributes:
        value: estimate of `v^T phi(J) v`.
        trace: `v^T J v`, exact.
        square: `v^T J^2 v`, exact.
        frobenius: `|J^T v|^2`, whose mean over probes is `|J|_F^2`.
        norm: a lower bound of the local norm `|J|_2`, from the products made.
        truncation: estimate of `|value - v^T phi(J) v|` (0 where it is exact or unbiased).
        bound: proved bound of the same; NaN where none is known.
        products: products with J and its transpose that the row needed.
        steps: length of the series or Krylov space; one number for all rows.
        sign: sign of `det(I + J)` where the method knows it.
    """

    value: Tensor
    trace: Tensor
    square: Tensor
    frobenius: Tensor
    norm: Tensor
    truncation: Tensor
    bound: Tensor
    products: Tensor
    steps: int
    sign: Tensor | None = None


def draw_probes(
    rows: int, dim: int, kind: Probe, generator: torch.Generator | None, device: torch.device | str = "cpu"
) -> Tensor:
    """Random vectors with `E[v v^T] = I`, shape `(rows, dim)`, float64.

    Rademacher entries are +-1; Gaussian ones standard normal; spherical probes are uniform on the sphere of radius
    `sqrt(dim)`, for noise whose coordinates have no preferred axes. Drawn on the generator's device, then moved.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator {generator!r} is no torch.Generator: give torch.Generator().manual_seed(seed)")
    source = generator.device if generator is not None else torch.device(device)
    if kind == "rademacher":
        bits = torch.randint(0, 2, (rows, dim), generator=generator, device=source)
        signs: Tensor = (2 * bits - 1).double().to(device)
        return signs
    if kind not in PROBES:
        raise InputError(f"unknown probe {kind!r}: accepted are {', '.join(PROBES)}")
    gaussian: Tensor = torch.randn(rows, dim, generator=generator, device=source, dtype=torch.float64).to(device)
    if kind == "gaussian":
        return gaussian
    sphere: Tensor = torch.nn.functional.normalize(gaussian) * dim**0.5
    return sphere


def second_order(operator: Operator, probe: Tensor, *, lipschitz: float | None = None) -> QuadraticForm:
    """`v^T J^2 v / 2`, the leading term of `v^T phi(J) v`, by two transposed products.

    The rest is at most `|v| |J^T J^T v| (h(L) - L^2/2) / L^2`; in the mean, `E(J) = tr(J^2)/2 + R` with
    `|R| <= (|J|_F^2 / L^2)(h(L) - L^2/2)`.

    Source: `proofs/second_order`.
    """
    length = probe.norm(dim=1)
    process = ArnoldiProcess(operator, probe)
    process.advance()
    process.advance()
    H, scale = process.space.hessenberg, length.square()
    first = H[:, :2, 0]
    # J^T J^T v = |v| Q_3 H (H e_1) and v' J^T J^T v = |v|^2 e_1' H (H e_1).
    second = torch.einsum("rij,rj->ri", H, first)
    square = scale * second[:, 0]
    sizes = length * first.norm(dim=1), length * second.norm(dim=1)
    norm = torch.maximum(ratio(sizes[0], length), ratio(sizes[1], sizes[0]))
    # The same two products give Arnoldi's value, and with it what the second order leaves out.
    truncation = (scale * phi_corner(H[:, :2], spectral_norm(H)) - square / 2).abs() + process.truncation()
    bound = torch.full_like(square, torch.nan)
    if lipschitz is not None and lipschitz < 1:
        factor = second_order_remainder_bound(1.0, lipschitz) if lipschitz > 0 else 0.0
        bound = length * sizes[1] * factor
    products = torch.full_like(square, 2.0)
    return QuadraticForm(
        square / 2, scale * H[:, 0, 0], square, sizes[0].square(), norm, truncation, bound, products, steps=2
    )


def power_series(
    operator: Operator,
    probe: Tensor,
    *,
    steps: int | None = None,
    tolerance: float = 1e-3,
    max_steps: int = MAX_STEPS,
    lipschitz: float | None = None,
) -> QuadraticForm:
    """`sum_(k=2..n) (-1)^k / k v^T (J^T)^k v` by n transposed products.

    Off by at most `|v| |(J^T)^n v| L / ((n + 1)(1 - L))`; in the mean, by `|J|_F^2 L^(n-1) / ((n + 1)(1 - L))`.

    Args:
        operator: J.
        probe: `(rows, d)`.
        steps: n >= 2; `None`: until the estimated rest, summed over the rows, is below `tolerance` of the forms' size.
        tolerance: the tolerance of the adaptive choice, relative to `|J^T v|^2 / 2` summed over the rows.
        max_steps: the most adaptive steps.
        lipschitz: proved bound of `|J|_2`, for `bound`.

    Raises:
        InputError: a local norm of at least 1 shows up: the series need not converge.

    Source: `proofs/power_series_bias`.
    """
    length = probe.norm(dim=1)
    vector, previous = probe, length
    value, norm = torch.zeros_like(length), torch.zeros_like(length)
    trace = square = frobenius = rest = seen = torch.zeros_like(length)
    limit = max(2, max_steps if steps is None else steps)
    count = 0
    for k in range(1, limit + 1):
        vector = operator.vjp(vector)
        count = k
        size = vector.norm(dim=1)
        growth = ratio(size, previous)
        norm = torch.maximum(norm, growth)
        previous = size
        moment = dot(probe, vector)
        if k == 1:
            trace, frobenius = moment, size.square()
            continue
        value = value + (-1) ** k / k * moment
        if k == 2:
            square = moment
        # Later moments are smaller than |v| |w_k| by the chance of two directions to agree; the last two show by how
        # much (where the spectrum is symmetric about 0 every second one vanishes). The growth of the vectors continues:
        # sum_(j > 0) g^j / (k + j) is at most g / ((k + 1)(1 - g)) and at most -log(1 - g).
        decay = growth.clamp(max=1 - 1e-12)
        largest = torch.maximum(moment.abs(), seen * growth)
        seen = moment.abs()
        later = torch.minimum(decay / ((k + 1) * (1 - decay)), -torch.log1p(-decay))
        rest = torch.maximum(largest, length * size / probe.shape[1] ** 0.5) * later
        if steps is None and float(rest.sum()) <= tolerance * float(frobenius.sum()) / 2:
            break
    refuse_norm(norm, "power")
    bound = torch.full_like(value, torch.nan)
    if lipschitz is not None and lipschitz < 1:
        bound = length * previous * lipschitz / ((count + 1) * (1 - lipschitz))
    products = torch.full_like(value, float(count))
    return QuadraticForm(value, trace, square, frobenius, norm, rest, bound, products, steps=count)


def roulette(
    operator: Operator,
    probe: Tensor,
    *,
    generator: torch.Generator | None = None,
    lipschitz: float | None = None,
    sure: int = 4,
) -> QuadraticForm:
    """The power series, cut at a random length and reweighted: unbiased.

    `sum_k (-1)^k / k v^T (J^T)^k v / P(N >= k)` over `k <= N`: the first `sure` terms always, each later one with
    probability q given the one before. The variance is finite if `|J|_2^2 < q`: q is `lipschitz`, where a constant
    below 1 is proved, and else the square root of the growth of the sure vectors, which leaves the estimate unbiased
    because N is drawn after them. A growth is no norm: a row whose later growth shows that `|J|_2^2 >= q` is refused,
    not averaged in, and without a proof the variance is not known to be finite.

    Raises:
        InputError: a local norm of at least 1; or one that asks for hundreds of terms, or makes the variance infinite.

    Source: arXiv 1906.02735, section 3.1; `proofs/roulette_variance`.
    """
    length = probe.norm(dim=1)
    vector, previous = probe, length
    value, norm = torch.zeros_like(length), torch.zeros_like(length)
    trace = square = frobenius = torch.zeros_like(length)
    keep = torch.zeros_like(length)
    weight, active = torch.ones_like(length), torch.ones_like(length, dtype=torch.bool)
    products = torch.zeros_like(length)
    k = 0
    while bool(active.any()):
        k += 1
        if k > max(sure, 2):
            draw = torch.rand(length.shape, generator=generator, dtype=torch.float64, device=_device(generator, probe))
            active = active & (draw.to(probe.device) < keep)
            weight = weight / keep.clamp(min=1e-300)
            if not bool(active.any()):
                break
        vector = operator.vjp(vector) * active[:, None]
        products = products + active
        size = vector.norm(dim=1)
        norm = torch.maximum(norm, ratio(size, previous))
        previous = size
        moment = dot(probe, vector)
        if k == 1:
            trace, frobenius = moment, size.square()
            continue
        if k == 2:
            square = moment
        value = value + (-1) ** k / k * weight * moment
        if k == max(sure, 2):
            refuse_norm(norm, "roulette")
            keep = keep_probability(norm, lipschitz)
            keep = torch.where(size > 0, keep, torch.zeros_like(keep))
    refuse_norm(norm, "roulette")
    endless = (norm.square() >= keep) & (keep > 0)
    if bool(endless.any()):
        raise ExpansiveMapError(
            f"method roulette continues its series with probability {float(keep[endless][0]):.3g}, and found a local "
            f"norm of {float(norm[endless][0]):.4g}: the variance is not finite; use arnoldi or lanczos"
        )
    zero = torch.zeros_like(value)
    return QuadraticForm(value, trace, square, frobenius, norm, zero, zero, products, steps=k)


def keep_probability(growth: Tensor, lipschitz: float | None) -> Tensor:
    """The chance with which the roulette takes one more term, from the growth of its vectors or a proved constant.

    Raises:
        InputError: more than 0.998, which would mean more than 500 terms.
    """
    keep = growth.sqrt()
    if lipschitz is not None and lipschitz < 1:
        keep = torch.full_like(growth, lipschitz)
    if float(keep.max()) > _MOST_LIKELY:
        raise ExpansiveMapError(
            f"method roulette would continue its series with probability {float(keep.max()):.4g} at a local norm of "
            f"{float(growth.max()):.4g} or more, for a finite variance: use arnoldi or lanczos"
        )
    return keep.clamp(min=0.1)


def arnoldi(
    operator: Operator,
    probe: Tensor,
    *,
    steps: int | None = None,
    tolerance: float = 1e-3,
    max_steps: int = MAX_STEPS,
    lipschitz: float | None = None,
) -> QuadraticForm:
    """`|v|^2 e_1^T phi(H_m) e_1` with the Hessenberg matrix of Arnoldi's process on `J^T`, by m transposed products.

    Exact for polynomials of degree m, and whenever the Krylov space is exhausted. For `|J|_2 <= L < 1` it is off by at
    most `|v| (|(J^T)^m v| + |v| |H_m^m e_1|) L / ((m + 1)(1 - L))`, at most `2 |v|^2 L^(m+1) / ((m + 1)(1 - L))`.

    Args:
        operator: J.
        probe: `(rows, d)`.
        steps: m; `None`: as many as bring the estimated error, summed over the rows, below `tolerance`.
        tolerance: the tolerance of the adaptive choice, relative to the size of the forms, `|J^T v|^2 / 2` summed over
            the rows.
        max_steps: the most adaptive steps.
        lipschitz: proved bound of `|J|_2`, for `bound`.

    Raises:
        InputError: a local norm of at least 1 shows up: the series behind phi need not converge.

    Source: `proofs/arnoldi_bias`.
    """
    process = arnoldi_process(operator, probe, steps=steps, tolerance=tolerance, max_steps=max_steps)
    return arnoldi_form(process, lipschitz)


def arnoldi_process(
    operator: Operator,
    probe: Tensor,
    *,
    steps: int | None,
    tolerance: float,
    max_steps: int = MAX_STEPS,
    rest: Callable[[ArnoldiProcess], Tensor] = ArnoldiProcess.latest_truncation,
    size: float | None = None,
) -> ArnoldiProcess:
    """Arnoldi's process run for `steps`, or adaptively as `arnoldi` describes; a norm of at least 1 raises.

    Args:
        operator: J.
        probe: `(rows, d)`.
        steps: m; `None`: until `rest`, summed over the rows, is safely below `tolerance` times `size`.
        tolerance: the tolerance of the adaptive choice.
        max_steps: the most adaptive steps.
        rest: the estimated error of each row.
        size: what `tolerance` is relative to; `None`: the size of the forms.
    """
    process = ArnoldiProcess(operator, probe)
    limit = min(operator.dim, max_steps if steps is None else steps)
    while process.steps < limit and bool(process.alive.any()):
        process.advance()
        if steps is None and process.steps >= 3:
            refuse_norm(spectral_norm(process.space.hessenberg), "arnoldi")
            aim = tolerance * (form_size(process) if size is None else size)
            if _SAFETY * float(rest(process).sum()) <= aim:
                break
    return process


def form_size(process: ArnoldiProcess) -> float:
    """`|J^T v|^2 / 2` summed over the rows."""
    first = process.space.hessenberg[:, :2, 0]
    return float((process.scale.square() * first.square().sum(1)).sum()) / 2


def arnoldi_form(process: ArnoldiProcess, lipschitz: float | None) -> QuadraticForm:
    """The form of `arnoldi` from a finished process."""
    space, m = process.space, process.steps
    H, scale = space.hessenberg, space.scale.square()
    norm = spectral_norm(H)
    refuse_norm(norm, "arnoldi")
    corner = phi_column(H[:, :-1], float(norm.max()))[:, 0]
    first = H[:, :2, 0]
    bound = torch.full_like(corner, torch.nan)
    if lipschitz is not None and lipschitz < 1:
        # (J^T)^m v = |v| Q_(m+1) H H_m^(m-1) e_1: its length, and that of its part in the space, H_m^m e_1.
        power = H[:, :-1, :1].new_zeros(H.shape[0], m, 1)
        power[:, 0] = 1
        for _ in range(m - 1):
            power = torch.bmm(H[:, :-1], power)
        power = torch.bmm(H, power)[:, :, 0]
        reach = scale * (power.norm(dim=1) + power[:, :-1].norm(dim=1)) * process.alive
        bound = reach * lipschitz / ((m + 1) * (1 - lipschitz))
    # J^T v lies in the first two basis vectors, so v' J^T J^T v needs two entries of the first row.
    square = scale * (H[:, 0, :2] * first[:, : min(2, m)]).sum(1)
    if m == 1:
        square = torch.where(process.alive, torch.nan, square)
    return QuadraticForm(
        value=scale * corner,
        trace=scale * H[:, 0, 0],
        square=square,
        frobenius=scale * first.square().sum(1),
        norm=norm,
        truncation=process.truncation(),
        bound=bound,
        products=process.work,
        steps=process.steps,
    )


def lanczos(
    operator: Operator,
    probe: Tensor,
    *,
    steps: int | None = None,
    tolerance: float = 1e-3,
    max_steps: int = MAX_STEPS,
    lipschitz: float | None = None,
) -> QuadraticForm:
    """`v^T J v - v^T log(B^T B) v / 2`, `B = I + J`, by Golub and Kahan's process: two products per step.

    With `M = J + J^T + J^T J = B^T B - I` and its tridiagonal `T_m`, the form is
    `|v|^2 e_1^T phi(T_m) e_1 / 2 - |J v|^2 / 2`, which has no first-order part. Gauss quadrature bounds it from below;
    with `|J|_2 <= L < 1` proved, Gauss-Radau quadrature with the node `(1 - L)^2 - 1` bounds it from above, and the
    value is the middle of the bracket, `bound` its half width. No norm is needed: it goes on where L >= 1. An L within
    1e-6 of 1 gives no bracket, for rounding does not tell its node from -1.

    Args:
        operator: J.
        probe: `(rows, d)`.
        steps: m; `None`: adaptive.
        tolerance: the tolerance of the adaptive choice, relative to `|J^T v|^2 / 2` summed over the rows.
        max_steps: the most adaptive steps.
        lipschitz: proved bound of `|J|_2`.

    Source: G. Golub and G. Meurant, Matrices, Moments and Quadrature, chapters 6 and 7; `proofs/golub_kahan_bracket`.
    """
    process = LanczosProcess(operator, probe)
    limit = min(operator.dim, max_steps if steps is None else steps)
    node = None
    if lipschitz is not None and lipschitz <= _MAX_BRACKET:
        # (1 - L)^2 - 1, moved outwards by more than rounding, so that no eigenvalue of T_m meets it.
        node = lipschitz * (lipschitz - 2) - 1e-8 * min(lipschitz, max((1 - lipschitz) ** 2, 1e-6)) - 1e-300
    gauss = radau = torch.zeros_like(process.scale)
    while process.steps < limit and bool(process.alive.any()):
        process.advance()
        if steps is not None and process.steps < limit and bool(process.alive.any()):
            continue
        if steps is None and process.steps < 3 and bool(process.alive.any()):
            continue
        gauss = _symmetric_corner(process.matrix())
        rest = _SAFETY * process.latest_truncation()
        if node is not None:
            radau = torch.maximum(gauss, _symmetric_corner(process.radau_matrix(node)))
            rest = (radau - gauss) * process.scale.square() / 4
        size = (process.scale.square() * process.first_transposed.square().sum(1)).sum() / 2
        if steps is None and float(rest.sum()) <= tolerance * float(size):
            break
    truncation = process.truncation() if node is None else (radau - gauss) * process.scale.square() / 4
    scale = process.scale.square()
    pushed, pulled = process.first, process.first_transposed
    corner = gauss if node is None else (gauss + radau) / 2
    trace, length = dot(process.start, pushed), pushed.square().sum(1)
    value = (corner - length) / 2
    # phi keeps the digits of a small J; those of a large one drown in z = 2 q'Jq + |Jq|^2, which it has to lose again.
    large = length > 1
    if bool(large.any()):
        value = torch.where(large, trace - _log_corner(process.matrix()) / 2, value)
    return QuadraticForm(
        value=scale * value,
        trace=scale * trace,
        square=scale * dot(pulled, pushed),
        frobenius=scale * pulled.square().sum(1),
        norm=torch.maximum(process.norm, pulled.norm(dim=1)),
        truncation=truncation,
        bound=torch.full_like(scale, torch.nan) if node is None else truncation,
        products=process.work,
        steps=process.steps,
    )


def _symmetric_corner(T: Tensor) -> Tensor:
    """`e_1^T phi(T) e_1` of symmetric matrices with eigenvalues of at least -1; `+inf` where one is -1."""
    values, vectors = torch.linalg.eigh(T)
    weights = vectors[:, 0, :].square()
    singular = values <= -1 + 1e-15
    inner = log_gap(-torch.where(singular, torch.zeros_like(values), values))
    terms: Tensor = weights * torch.where(singular, torch.full_like(inner, math.inf), inner)
    return terms.sum(1)


def _log_corner(T: Tensor) -> Tensor:
    """`e_1^T log(I + T) e_1` of the same; `-inf` where an eigenvalue is -1."""
    values, vectors = torch.linalg.eigh(T)
    terms: Tensor = vectors[:, 0, :].square() * torch.log1p(values.clamp(min=-1))
    return torch.where(vectors[:, 0, :] == 0, torch.zeros_like(terms), terms).sum(1)


def refuse_norm(norm: Tensor, method: str) -> None:
    """Raise `InputError` if a local norm of at least 1 was found: the series of log(1 + z) need not converge."""
    largest = float(norm.max())
    if largest >= 1:
        raise ExpansiveMapError(
            f"method {method} needs a local norm |J(x)|_2 below 1 and found at least {rounded_down(largest)}: "
            "use exact or lanczos"
        )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner product."""
    return (a * b).sum(1)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """`a / b`, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros_like(a), a / torch.where(b == 0, torch.ones_like(b), b))


def _device(generator: torch.Generator | None, like: Tensor) -> torch.device:
    return like.device if generator is None else generator.device
