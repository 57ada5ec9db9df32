"""Small errors in `hnkit/estimators.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor

from hnkit.errors import ExpansiveMapError
from hnkit.kl.estimators import (
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
from hnkit.linalg.krylov import ArnoldiProcess, LanczosProcess
from tests.hnkit.operator_zoo import MatrixOperator, form, matrix, phi_matrix

DIM = 12
ROWS = 24
ADAPTIVE = {
    "arnoldi": arnoldi,
    "power": power_series,
    "lanczos": lanczos,
    "lanczos with a proved norm": partial(lanczos, lipschitz=0.9),
}


def probes(rows: int = ROWS, dim: int = DIM) -> Tensor:
    return draw_probes(rows, dim, "rademacher", torch.Generator().manual_seed(1))


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def minus_identity(constant: float, rows: int = ROWS) -> MatrixOperator:
    """J = -L I: the extremal case, `v' phi(J) v = d h(L)`, every term of the series of one sign."""
    return MatrixOperator(-constant * torch.eye(DIM, dtype=torch.float64), rows)


def series_rest(constant: float, steps: int) -> float:
    """`sum_(k > n) L^k / k`, by the sum itself."""
    return math.fsum(constant**k / k for k in range(steps + 1, steps + 10_000))


# Adaptive choice of the number of steps


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


# Bounds


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


# Estimates of the truncation error


def test_the_truncation_of_second_order_is_the_third_term_of_a_random_rotation() -> None:
    """`v' J^3 v / 3` with J = c Q, Q uniform on O(d): root mean square |v|^2 c^3 / (3 sqrt(d)), up to 1 / d."""
    dim, rows, c = 20, 1000, 0.3
    G = torch.randn(rows, dim, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q, R = torch.linalg.qr(G)
    J = c * Q * R.diagonal(dim1=1, dim2=2).sign()[:, None]
    v = probes(rows, dim)
    third = torch.einsum("ri,rij,rjk,rkl,rl->r", v, J, J, J, v) / 3
    # standard error of the root mean square: 1 / sqrt(2 rows) = 2.2%; five of them
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


# Moments and norms


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


# Roulette


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


# XTrace


def test_xtrace_of_two_probes_against_its_naive_twin() -> None:
    A, v = matrix("gaussian", 0.7), probes(2)
    M = phi_matrix(A).T
    expected = []
    for mine, other in ((v[0], v[1]), (v[1], v[0])):
        q = M @ other / (M @ other).norm()
        u = mine - q * (q @ mine)
        expected.append(float(q @ M @ q + u @ M @ u))
    assert xtrace(MatrixOperator(A, 2), v, group=2, steps=DIM).value.tolist() == pytest.approx(expected, rel=1e-9)


def test_xtrace_counts_the_products_of_both_spaces() -> None:
    operator = MatrixOperator(matrix("gaussian", 0.7), 8)
    result = xtrace(operator, probes(8), group=4, steps=3)
    assert result.steps == 3
    assert result.products.tolist() == [6.0] * 8
    assert operator.num_vjp == 48


def test_xtrace_tells_the_length_of_the_longer_space() -> None:
    """The shift of six coordinates: phi(J') is a multiple of J'^2, so the second spaces are two dimensions smaller."""
    dim = 6
    operator = MatrixOperator(0.5 * torch.diag(torch.ones(dim - 1, dtype=torch.float64), 1), 2)
    result = xtrace(operator, probes(2, dim), group=2, steps=dim)
    assert result.steps == dim
    assert operator.num_vjp == 2 * (dim + dim - 2)


def test_points_of_xtrace_do_not_disturb_one_another() -> None:
    """One point has J = 0, the other a norm of 0.9: each is what it is alone."""
    A = torch.cat([matrix("gaussian", norm).expand(4, DIM, DIM) for norm in (0.0, 0.9)])
    v = probes(8)
    together = xtrace(MatrixOperator(A, 8), v, group=4, steps=DIM).value
    assert together[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(together[4:], xtrace(MatrixOperator(A[4:], 4), v[4:], group=4, steps=DIM).value)
