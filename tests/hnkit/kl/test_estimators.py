"""Each estimator of E(J) on matrices of known structure, probe by probe, against dense twins."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor

from hnkit import InputError
from hnkit.errors import ExpansiveMapError
from hnkit.kl.estimators import (
    PROBES,
    QuadraticForm,
    arnoldi,
    draw_probes,
    lanczos,
    power_series,
    ratio,
    refuse_norm,
    roulette,
    second_order,
)
from hnkit.kl.xtrace import xtrace
from hnkit.linalg.krylov import ArnoldiProcess, LanczosProcess, gauss_nodes, phi_column, spectral_norm
from tests.hnkit.operator_zoo import KINDS, NORMS, MatrixOperator, exact_error, form, matrix, phi_matrix

DIM = 12


ROWS = 24


def probes(rows: int = ROWS, dim: int = DIM, seed: int = 1) -> Tensor:
    return draw_probes(rows, dim, "rademacher", torch.Generator().manual_seed(seed))


def size(A: Tensor) -> float:
    """The scale of the forms: rounding and tolerances are relative to it."""
    return float(A.square().sum()) / 2


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_arnoldi_run_to_the_end_is_exact(kind: str, norm: float) -> None:
    A, v = matrix(kind, norm), probes()
    result = arnoldi(MatrixOperator(A, ROWS), v, steps=DIM, lipschitz=norm)
    assert float((result.value - form(phi_matrix(A), v)).abs().max()) <= 1e-11 * size(A)
    assert float(result.truncation.max()) == 0.0
    assert float(result.bound.max()) == 0.0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_lanczos_run_to_the_end_is_exact(kind: str, norm: float) -> None:
    A, v = matrix(kind, norm), probes()
    result = lanczos(MatrixOperator(A, ROWS), v, steps=DIM)
    M = A + A.T + A.T @ A
    values, vectors = torch.linalg.eigh(M)
    # tr A - log det(B'B)/2 as v'(phi(M)/2 - A'A/2) v, the logarithm by its series where M is tiny
    gap = values.square() / 2 - values**3 / 3 if norm < 1e-3 else values - torch.log1p(values)
    expected = form((vectors * gap) @ vectors.T / 2 - A.T @ A / 2, v)
    assert float((result.value - expected).abs().max()) <= 1e-9 * size(A)


@pytest.mark.parametrize("norm", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_bounds_hold_and_the_bracket_encloses(kind: str, norm: float, steps: int) -> None:
    A, v = matrix(kind, norm), probes()
    slack = 1e-12 * size(A)
    truth = form(phi_matrix(A), v)
    for result in (
        arnoldi(MatrixOperator(A, ROWS), v, steps=steps, lipschitz=norm),
        power_series(MatrixOperator(A, ROWS), v, steps=steps, lipschitz=norm),
        second_order(MatrixOperator(A, ROWS), v, lipschitz=norm),
    ):
        assert bool(((result.value - truth).abs() <= result.bound + slack).all())
    full = lanczos(MatrixOperator(A, ROWS), v, steps=DIM).value
    bracket = lanczos(MatrixOperator(A, ROWS), v, steps=steps, lipschitz=norm)
    assert bool(((bracket.value - full).abs() <= bracket.bound + slack).all())
    gauss = lanczos(MatrixOperator(A, ROWS), v, steps=steps)
    assert bool((gauss.value <= full + slack).all())  # Gauss quadrature: from below, whatever the norm


def test_bounds_are_not_vacuous() -> None:
    # A = -L I is the extremal case of the power series: the bound is attained up to the geometric tail.
    A, v = matrix("negative", 0.5), probes()
    result = power_series(MatrixOperator(A, ROWS), v, steps=6, lipschitz=0.5)
    error = (result.value - form(phi_matrix(A), v)).abs()
    assert bool((error > 0.5 * result.bound).all())
    bracket = lanczos(MatrixOperator(matrix("symmetric", 0.5), ROWS), v, steps=5, lipschitz=0.5)
    assert float(bracket.bound.max()) < 0.02 * size(matrix("symmetric", 0.5))


@pytest.mark.parametrize("estimator", [arnoldi, lanczos, power_series, second_order, roulette])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_are_exact(kind: str, estimator) -> None:
    A, v = matrix(kind, 0.4), probes()
    result = estimator(MatrixOperator(A, ROWS), v)
    torch.testing.assert_close(result.trace, form(A, v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.square, form(A @ A, v), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.frobenius, (v @ A).square().sum(1), rtol=1e-10, atol=1e-12)
    assert float(result.norm.max()) <= 0.4 * (1 + 1e-12)


@pytest.mark.parametrize("estimator", [arnoldi, lanczos, power_series])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [0.3, 0.9])
def test_adaptive_steps_meet_their_tolerance(kind: str, norm: float, estimator) -> None:
    A, v = matrix(kind, norm), probes()
    operator = MatrixOperator(A, ROWS)
    result = estimator(operator, v, tolerance=1e-3)
    truth = lanczos(MatrixOperator(A, ROWS), v, steps=DIM).value if estimator is lanczos else form(phi_matrix(A), v)
    scale = float(result.frobenius.sum()) / 2
    assert float((result.value - truth).sum().abs()) <= 1e-3 * scale
    assert float(result.truncation.sum()) <= 1e-3 * scale
    # The estimate of the error is within an order of magnitude of it, or far below the tolerance.
    assert float((result.value - truth).abs().sum()) <= 10 * float(result.truncation.sum()) + 1e-6 * scale
    assert operator.num_vjp + operator.num_jvp >= float(result.products.sum())


@pytest.mark.parametrize("estimator", [arnoldi, lanczos, power_series, second_order, roulette])
def test_zero_is_exact_and_silent(estimator) -> None:
    zero = torch.zeros(DIM, DIM, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = estimator(MatrixOperator(zero, ROWS), probes(), lipschitz=0.0)
        leave_one_out = xtrace(MatrixOperator(zero, ROWS), probes(), group=4)
    for value in (result.value, result.truncation, result.bound, result.norm, result.frobenius, leave_one_out.value):
        assert torch.equal(value, torch.zeros(ROWS, dtype=torch.float64))


def test_arnoldi_integrates_polynomials_of_degree_m_exactly() -> None:
    # The defining property, one degree at a time: |v|^2 e1' H^k e1 = v' A'^k v for k <= m, and not for m + 1.
    A, v = matrix("gaussian", 0.8), probes()
    m = 4
    process = ArnoldiProcess(MatrixOperator(A, ROWS), v)
    for _ in range(m):
        process.advance()
    H = process.space.hessenberg[:, :-1]
    for k in range(1, m + 2):
        found = DIM * torch.linalg.matrix_power(H, k)[:, 0, 0]
        expected = form(torch.linalg.matrix_power(A, k), v)
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-13) == (k <= m)


def test_arnoldi_basis_is_orthonormal_where_it_is_hard() -> None:
    # Eigenvalues in tight clusters: classical Gram-Schmidt without a second pass loses orthogonality here.
    values = torch.cat([torch.linspace(0.5, 0.5 + 1e-7, 20), torch.tensor([0.1, 0.9])]).double()
    Q = torch.linalg.qr(torch.randn(22, 22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    process = ArnoldiProcess(MatrixOperator((Q * values) @ Q.T, 3), probes(3, 22))
    for _ in range(10):
        process.advance()
    basis = process.space.basis
    gram = basis @ basis.mT
    alive = gram.diagonal(dim1=1, dim2=2) > 0.5
    assert float((gram - torch.diag_embed(alive.double())).abs().max()) < 1e-12


def test_exhausted_rows_do_not_disturb_the_others() -> None:
    low_rank, full = matrix("low-rank", 0.9), matrix("gaussian", 0.9)
    A = torch.stack([low_rank, full, torch.zeros_like(full), matrix("negative", 0.9)])
    v = probes(4)
    together = arnoldi(MatrixOperator(A, 4), v, steps=8)
    for i in range(4):
        alone = arnoldi(MatrixOperator(A[i], 1), v[i : i + 1], steps=8)
        assert float(together.value[i]) == pytest.approx(float(alone.value[0]), rel=1e-12, abs=1e-15)
    assert together.products.tolist() == [3.0, 8.0, 1.0, 1.0]


def test_power_series_against_its_naive_twin() -> None:
    A, v = matrix("jordan", 0.7), probes()
    expected = sum((-1) ** k / k * form(torch.linalg.matrix_power(A, k), v) for k in range(2, 8))
    torch.testing.assert_close(power_series(MatrixOperator(A, ROWS), v, steps=7).value, expected)


@pytest.mark.parametrize("lipschitz", [None, 0.7])
def test_roulette_reweights_its_terms_by_their_chance(monkeypatch: pytest.MonkeyPatch, lipschitz: float | None) -> None:
    # The draws are replaced by a fixed list; the naive twin applies the definition to the same draws.
    A, v = matrix("normal", 0.7), probes(3)
    draws = [torch.tensor(u, dtype=torch.float64) for u in ([0.1, 0.1, 0.9], [0.2, 0.9, 0.0], [0.9, 0.0, 0.0])]
    stream = iter(draws)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: next(stream))
    result = roulette(MatrixOperator(A, 3), v, lipschitz=lipschitz)
    powers = [torch.linalg.matrix_power(A, k) for k in range(8)]
    for row, last in enumerate((6, 5, 4)):
        vectors = [(v[row] @ p).norm() for p in powers]
        q = 0.7 if lipschitz else max(float(vectors[k] / vectors[k - 1]) for k in range(1, 5)) ** 0.5
        expected = sum(
            (-1) ** k / k * float(form(powers[k], v[row : row + 1])) / q ** max(0, k - 4) for k in range(2, last + 1)
        )
        assert float(result.value[row]) == pytest.approx(expected, rel=1e-12)
    assert result.products.tolist() == [6.0, 5.0, 4.0]


@pytest.mark.parametrize("method", ["arnoldi", "power", "roulette", "xtrace"])
def test_expansive_maps_are_refused_by_the_series(method: str) -> None:
    A, v = matrix("gaussian", 1.3), probes()
    run = {
        "arnoldi": lambda: arnoldi(MatrixOperator(A, ROWS), v),
        "power": lambda: power_series(MatrixOperator(A, ROWS), v),
        "roulette": lambda: roulette(MatrixOperator(A, ROWS), v),
        "xtrace": lambda: xtrace(MatrixOperator(A, ROWS), v, group=4),
    }[method]
    with pytest.raises(InputError, match=r"local norm .* at least 1\.\d+.*exact or lanczos"):
        run()


def test_lanczos_goes_on_where_the_norm_exceeds_one() -> None:
    A, v = matrix("gaussian", 2.5), probes(4000)
    value = lanczos(MatrixOperator(A, 4000), v, steps=DIM).value
    assert float(value.mean()) == pytest.approx(exact_error(A), abs=4 * float(value.std()) / math.sqrt(4000))


@pytest.mark.parametrize("gap", [1.2e-4, 3e-5, 4e-5, 7e-5, 1e-5, 1.1e-6])
def test_lanczos_keeps_its_bracket_where_the_norm_nears_one(gap: float) -> None:
    # J = -L I: the node of the bracket is the eigenvalue of T_1, but for rounding.
    constant = 1 - gap
    A = -constant * torch.eye(4, dtype=torch.float64)
    result = lanczos(MatrixOperator(A, 1), torch.ones(1, 4, dtype=torch.float64), lipschitz=constant)
    rounding = 1e-15 / gap**2
    assert float(result.value) == pytest.approx(4 * (-constant - math.log(gap)), rel=1e-9, abs=4 * rounding)
    assert 0 <= float(result.bound) < 4 * rounding


@pytest.mark.parametrize("gap", [9e-7, 1e-8, 1e-16])
@pytest.mark.parametrize("steps", [2, 5, DIM, None])
def test_lanczos_has_no_bracket_where_rounding_hides_its_node(gap: float, steps: int | None) -> None:
    A, v = matrix("gaussian", 0.5), probes()
    result = lanczos(MatrixOperator(A, ROWS), v, steps=steps, lipschitz=1 - gap)
    assert torch.equal(result.value, lanczos(MatrixOperator(A, ROWS), v, steps=steps).value)
    assert bool(result.bound.isnan().all())


def test_lanczos_at_a_singular_point_is_infinite() -> None:
    # I + A = 0 in one direction: log det is minus infinity.
    A = torch.diag(torch.tensor([-1.0, 0.2, 0.3], dtype=torch.float64))
    assert float(lanczos(MatrixOperator(A, 1), torch.ones(1, 3, dtype=torch.float64), steps=3).value) == math.inf


@pytest.mark.parametrize("kind", PROBES)
def test_probes_are_isotropic(kind) -> None:
    n, dim = 20_000, 5
    v = draw_probes(n, dim, kind, torch.Generator().manual_seed(0))
    # Entries of the second-moment matrix have variance at most 2 / n: five standard errors, 15 distinct entries.
    deviation = (v.T @ v / n - torch.eye(dim, dtype=torch.float64)).abs().max()
    assert float(deviation) < 5 * math.sqrt(2 / n)
    if kind == "gaussian":
        assert float(v.norm(dim=1).std()) > 0.1
    else:
        torch.testing.assert_close(v.norm(dim=1), torch.full((n,), math.sqrt(dim), dtype=torch.float64))
    if kind == "rademacher":
        assert set(v.unique().tolist()) == {-1.0, 1.0}


def test_probes_follow_their_generator() -> None:
    first = draw_probes(3, 4, "gaussian", torch.Generator().manual_seed(7))
    assert torch.equal(first, draw_probes(3, 4, "gaussian", torch.Generator().manual_seed(7)))
    with pytest.raises(InputError, match="unknown probe 'uniform'"):
        draw_probes(1, 1, "uniform", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.5, 0.95, 0.999])
def test_phi_of_small_matrices(kind: str, norm: float) -> None:
    H = matrix(kind, norm, 6)
    found = phi_column(H[None], norm)[0]
    assert float((found - phi_matrix(H)[:, 0]).abs().max()) <= 1e-12 * size(H)


@pytest.mark.parametrize("norm", [0.1, 0.5, 0.9, 0.99, 1 - 1e-4, 1 - 1e-6, 1 - 1e-7, 1 - 1e-9, 1 - 1e-12])
def test_quadrature_reaches_its_tolerance(norm: float) -> None:
    # Scalar case, all arguments of modulus `norm`: z - log(1 + z) = int t z^2 / (1 + t z) dt.
    for tolerance in (1e-4, 1e-8, 1e-14):
        nodes, weights = gauss_nodes(norm, tolerance)
        for angle in (0.0, 1.0, 2.5, math.pi):
            z = norm * complex(math.cos(angle), math.sin(angle))
            value = sum(w * t * z * z / (1 + t * z) for t, w in zip(nodes, weights, strict=True))
            import cmath

            exact = z - cmath.log(1 + z)
            assert abs(value - exact) <= 20 * tolerance * abs(exact) + 1e-15 / (1 - norm)


@pytest.mark.parametrize("gap", [1e-4, 1e-6, 1e-7, 1e-9, 1e-12])
def test_arnoldi_close_to_a_norm_of_one(gap: float) -> None:
    # J = -(1 - gap) I, exhausted at once: the bound is 0 and the value must be exact, up to the rounding of 1 - gap.
    A = (gap - 1) * torch.eye(3, dtype=torch.float64)
    v = torch.tensor([[1.0, 2.0, -2.0]], dtype=torch.float64)
    result = arnoldi(MatrixOperator(A, 1), v, lipschitz=1 - gap)
    assert float(result.bound) == 0.0
    assert float(result.value) == pytest.approx(9 * (-1 + gap - math.log(gap)), rel=1e-13 + 1e-15 / gap)


def test_spectral_norm_of_small_matrices() -> None:
    H = torch.randn(7, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(spectral_norm(H), torch.linalg.matrix_norm(H, ord=2))
    torch.testing.assert_close(spectral_norm(1e-200 * H), torch.linalg.matrix_norm(1e-200 * H, ord=2))
    assert spectral_norm(torch.zeros(2, 3, 3)).tolist() == [0.0, 0.0]


def test_lanczos_is_golub_kahan_in_other_coordinates() -> None:
    # T_m = R'R - I with the bidiagonal R of Golub and Kahan's process on B = I + A from the same start.
    A, v = matrix("gaussian", 0.8), probes(1)
    process = LanczosProcess(MatrixOperator(A, 1), v)
    for _ in range(4):
        process.advance()
    B = torch.eye(DIM, dtype=torch.float64) + A
    q = v[0] / v[0].norm()
    alpha, beta, p = [], [], torch.zeros(DIM, dtype=torch.float64)
    for _ in range(4):
        p = B @ q - (beta[-1] if beta else 0.0) * p
        alpha.append(float(p.norm()))
        p = p / alpha[-1]
        q = B.T @ p - alpha[-1] * q
        beta.append(float(q.norm()))
        q = q / beta[-1]
    R = torch.diag(torch.tensor(alpha, dtype=torch.float64)) + torch.diag(
        torch.tensor(beta[:-1], dtype=torch.float64), 1
    )
    torch.testing.assert_close(process.matrix()[0], R.T @ R - torch.eye(4, dtype=torch.float64))


ADAPTIVE = {
    "arnoldi": arnoldi,
    "power": power_series,
    "lanczos": lanczos,
    "lanczos with a proved norm": partial(lanczos, lipschitz=0.9),
}


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def minus_identity(constant: float, rows: int = ROWS) -> MatrixOperator:
    """J = -L I: the extremal case, `v' phi(J) v = d h(L)`, every term of the series of one sign."""
    return MatrixOperator(-constant * torch.eye(DIM, dtype=torch.float64), rows)


def series_rest(constant: float, steps: int) -> float:
    """`sum_(k > n) L^k / k`, by the sum itself."""
    return math.fsum(constant**k / k for k in range(steps + 1, steps + 10_000))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_adaptive_choice_stops_once_the_estimated_error_meets_the_tolerance(name: str) -> None:
    A, v, run = matrix("gaussian", 0.9), probes(), ADAPTIVE[name]
    scale = float((v @ A).square().sum()) / 2
    kinds = {"arnoldi": ArnoldiProcess, "lanczos": LanczosProcess}
    if name in kinds:
        process = kinds[name](MatrixOperator(A, ROWS), v)
        for _ in range(4):
            process.advance()
        reached = 4 * float(process.latest_truncation().sum()) / scale  # four times the estimate, to be safe
    else:
        reached = float(run(MatrixOperator(A, ROWS), v, steps=4).truncation.sum()) / scale
    assert run(MatrixOperator(A, ROWS), v, tolerance=reached * (1 + 1e-6)).steps == 4
    assert run(MatrixOperator(A, ROWS), v, tolerance=reached * (1 - 1e-6)).steps == 5


@pytest.mark.parametrize("name", [*ADAPTIVE, "xtrace"])
def test_the_default_tolerance_is_a_thousandth(name: str) -> None:
    A, v, run = matrix("gaussian", 0.9), probes(), (ADAPTIVE | {"xtrace": partial(xtrace, group=4)})[name]
    result = run(MatrixOperator(A, ROWS), v)
    assert float(result.truncation.sum()) <= 1e-3 * float((v @ A).square().sum()) / 2
    assert result.steps == run(MatrixOperator(A, ROWS), v, tolerance=1e-3).steps > 3


@pytest.mark.parametrize("name", ["arnoldi", "lanczos"])
def test_three_steps_are_the_least_and_enough_for_a_tiny_map(name: str) -> None:
    assert ADAPTIVE[name](MatrixOperator(matrix("gaussian", 1e-6), ROWS), probes()).steps == 3


def test_a_series_has_64_terms_at_most() -> None:
    assert power_series(minus_identity(0.9), probes(), tolerance=0.0).steps == 64


@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_given_steps_are_the_steps_taken(name: str, steps: int) -> None:
    operator = MatrixOperator(matrix("gaussian", 0.01), ROWS)
    result = ADAPTIVE[name](operator, probes(), steps=steps)
    assert result.steps == steps
    each = 2 * steps + 1 if name.startswith("lanczos") else steps
    assert result.products.tolist() == [float(each)] * ROWS
    assert operator.num_vjp + operator.num_jvp == each * ROWS


@pytest.mark.parametrize("estimator", [second_order, power_series, arnoldi, lanczos])
@pytest.mark.parametrize("lipschitz", [None, 1.0, 1.5])
def test_there_is_no_bound_without_a_constant_below_one(
    estimator: Callable[..., QuadraticForm], lipschitz: float | None
) -> None:
    operator = MatrixOperator(matrix("gaussian", 0.5), ROWS)
    result = estimator(operator, probes(), lipschitz=lipschitz)
    assert bool(result.bound.isnan().all())
    assert torch.equal(result.value, estimator(operator, probes()).value)


@pytest.mark.parametrize("constant", [0.1, 0.5, 0.9])
def test_the_bound_of_second_order_is_attained(constant: float) -> None:
    result = second_order(minus_identity(constant), probes(), lipschitz=constant)
    rest = DIM * (-math.log1p(-constant) - constant - constant**2 / 2)
    torch.testing.assert_close(result.bound, torch.full_like(result.bound, rest))


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_the_bound_of_the_series_is_attained_to_first_order(steps: int) -> None:
    constant = 0.01
    result = power_series(minus_identity(constant), probes(), steps=steps, lipschitz=constant)
    assert result.steps == max(2, steps)
    rest = DIM * series_rest(constant, result.steps)
    assert bool(((result.bound >= rest) & (result.bound <= rest * (1 + 2 * constant))).all())


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_the_bound_of_arnoldi_from_dense_powers(steps: int) -> None:
    A, v, constant = matrix("gaussian", 0.8), probes(3), 0.85
    result = arnoldi(MatrixOperator(A, 3), v, steps=steps, lipschitz=constant)
    for row in range(3):
        krylov = torch.stack([torch.linalg.matrix_power(A.T, k) @ v[row] for k in range(steps + 1)], 1)
        Q = torch.linalg.qr(krylov[:, :-1]).Q
        inside = torch.linalg.matrix_power(Q.T @ A.T @ Q, steps)[:, 0]
        length = math.sqrt(DIM)
        bound = length * (krylov[:, -1].norm() + length * inside.norm()) * constant / ((steps + 1) * (1 - constant))
        assert float(result.bound[row]) == pytest.approx(float(bound), rel=1e-9)


@pytest.mark.parametrize("constant", [1e-9, 1e-6, 1e-3, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.993, 0.995, 0.997, 0.999])
@pytest.mark.parametrize("other", [0.9, 0.3, -0.5])
def test_the_upper_end_of_the_bracket_is_the_truth_where_the_norm_is_attained(constant: float, other: float) -> None:
    """Two eigenvalues, one at -L, and one step: Radau's two nodes are the spectrum, but for a shift outwards."""
    eigenvalues = -constant, other * constant
    operator = MatrixOperator(torch.diag(tensor(*eigenvalues)), 1)
    result = lanczos(operator, torch.ones(1, 2, dtype=torch.float64), steps=1, lipschitz=constant)
    with mpmath.workdps(50):
        truth = mpmath.fsum(mpmath.mpf(z) - mpmath.log(1 + mpmath.mpf(z)) for z in eigenvalues)
        excess = float((mpmath.mpf(float(result.value)) + mpmath.mpf(float(result.bound)) - truth) / truth)
    assert -2e-15 <= excess <= 1.5e-8 * min(1.0, 4 * constant)
    if constant >= 1e-3:
        assert excess > 0  # a proved bound, in spite of rounding


def test_the_truncation_of_second_order_is_the_third_term_of_a_random_rotation() -> None:
    """`v' J^3 v / 3` with J = c Q, Q uniform on O(d): root mean square |v|^2 c^3 / (3 sqrt(d)), up to 1 / d."""
    dim, rows, c = 20, 1000, 0.3
    G = torch.randn(rows, dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q, R = torch.linalg.qr(G)
    J = c * Q * R.diagonal(dim1=1, dim2=2).sign()[:, None]
    v = probes(rows, dim)
    third = torch.einsum("ri,rij,rjk,rkl,rl->r", v, J, J, J, v) / 3
    # standard error of the root mean square: 1 / sqrt(2 rows) = 2.2 %; five of them
    root_mean_square = float(third.square().mean().sqrt())
    result = second_order(MatrixOperator(J, rows), v)
    assert float(result.truncation.mean()) == pytest.approx(root_mean_square, rel=0.11 + 1 / dim)


@pytest.mark.parametrize("constant", [0.1, 0.5, 0.9, 0.995])
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_the_truncation_of_the_series_is_not_below_a_one_signed_rest_nor_far_above(constant: float, steps: int) -> None:
    result = power_series(minus_identity(constant), probes(), steps=steps)
    rest = DIM * series_rest(constant, steps)
    assert bool((result.truncation >= rest * (1 - 1e-12)).all())
    assert bool((result.truncation <= rest * (10 if constant > 0.1 else 1.2)).all())


@pytest.mark.parametrize("estimator", [second_order, power_series, arnoldi, lanczos])
def test_the_norm_is_the_largest_growth_met(estimator: Callable[..., QuadraticForm]) -> None:
    """J = c e_2 e_1', nilpotent: a product with J or its transpose is c e_2 or c e_1 once, then zero."""
    J = tensor([0.0, 0.0], [0.4, 0.0])
    for probe in ([[0.0, 1.0]], [[0.0, 3.0]]):
        assert float(estimator(MatrixOperator(J, 1), tensor(*probe)).norm) == pytest.approx(0.4)


def test_the_norm_of_lanczos_looks_both_ways() -> None:
    J = tensor([0.0, 0.0], [0.4, 0.0])
    assert float(lanczos(MatrixOperator(J, 1), tensor([1.0, 0.0]), steps=1).norm) == pytest.approx(0.4)
    assert float(lanczos(MatrixOperator(J, 1), tensor([0.0, 1.0]), steps=1).norm) == pytest.approx(0.4)


def test_second_order_makes_two_products() -> None:
    operator = MatrixOperator(matrix("gaussian", 0.5), ROWS)
    result = second_order(operator, probes())
    assert result.steps == 2
    assert result.products.tolist() == [2.0] * ROWS
    assert operator.num_vjp == 2 * ROWS


def test_the_square_moment_of_arnoldi_needs_two_steps() -> None:
    A = torch.stack([matrix("gaussian", 0.5), matrix("negative", 0.5)])
    v = probes(2)
    one, two = (arnoldi(MatrixOperator(A, 2), v, steps=m).square for m in (1, 2))
    assert math.isnan(one[0])
    assert float(one[1]) == pytest.approx(0.25 * DIM)  # the space of -L I is exhausted by one step
    torch.testing.assert_close(two, torch.cat([form(A[i] @ A[i], v[i : i + 1]) for i in range(2)]))


def test_a_norm_of_exactly_one_is_refused() -> None:
    with pytest.raises(ExpansiveMapError):
        refuse_norm(tensor(0.5, 1.0), "power")
    with pytest.raises(ExpansiveMapError):
        power_series(minus_identity(1.0), probes(), steps=3)
    refuse_norm(tensor(0.5, 1 - 1e-15), "power")


def test_ratios_and_those_over_zero() -> None:
    assert ratio(tensor(3.0, 3.0, 3.0, 0.0), tensor(1.0, 2.0, 0.0, 0.0)).tolist() == [3.0, 1.5, 0.0, 0.0]


def fix_draws(monkeypatch: pytest.MonkeyPatch, *draws: list[float]) -> None:
    stream = iter(draws)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: tensor(*next(stream)))


@pytest.mark.parametrize("sure", [1, 2, 3])
def test_roulette_draws_for_the_first_term_after_the_sure_ones(monkeypatch: pytest.MonkeyPatch, sure: int) -> None:
    fix_draws(monkeypatch, [0.4], [0.6])
    A, v, last = matrix("gaussian", 0.5), probes(1), max(sure, 2) + 1
    result = roulette(MatrixOperator(A, 1), v, lipschitz=0.5, sure=sure)
    terms = [(-1) ** k / k * float(form(torch.linalg.matrix_power(A, k), v)) for k in range(2, last + 1)]
    assert float(result.value) == pytest.approx(sum(terms[:-1]) + terms[-1] / 0.5, rel=1e-12)
    assert result.products.tolist() == [float(last)]


@pytest.mark.parametrize("lipschitz", [0.96, 0.99])
def test_roulette_stops_with_the_chance_that_a_proved_constant_gives(
    monkeypatch: pytest.MonkeyPatch, lipschitz: float
) -> None:
    A, v = matrix("gaussian", 0.5), probes(1)
    fix_draws(monkeypatch, [lipschitz + 0.001])
    assert roulette(MatrixOperator(A, 1), v, lipschitz=lipschitz).products.tolist() == [4.0]
    fix_draws(monkeypatch, [lipschitz - 0.001], [lipschitz + 0.001])
    result = roulette(MatrixOperator(A, 1), v, lipschitz=lipschitz)
    terms = [(-1) ** k / k * float(form(torch.linalg.matrix_power(A, k), v)) for k in range(2, 6)]
    assert float(result.value) == pytest.approx(sum(terms[:-1]) + terms[-1] / lipschitz, rel=1e-12)


def test_roulette_does_not_draw_for_a_series_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_draws(monkeypatch, [0.05, 0.05], [0.999, 0.999])
    A = torch.stack([matrix("gaussian", 0.0), matrix("gaussian", 0.5)])
    assert roulette(MatrixOperator(A, 2), probes(2)).products.tolist() == [4.0, 5.0]
