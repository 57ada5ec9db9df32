"""What the estimators say of their own truncation, and when they stop, where convergence is easily misjudged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hnkit.kl.estimators import QuadraticForm, arnoldi, draw_probes, lanczos, power_series, second_order
from hnkit.linalg.krylov import ArnoldiProcess, LanczosProcess
from tests.hnkit.operator_zoo import KINDS, MatrixOperator, exact_error, form, hard_spectra, matrix, phi_matrix

DIM, ROWS = 60, 8
HARD = hard_spectra(DIM)
ZOO = HARD | {f"{kind} of norm {norm}": matrix(kind, norm, DIM) for kind in KINDS for norm in (0.3, 0.9, 0.99)}
ESTIMATORS = {"arnoldi": arnoldi, "lanczos": lanczos, "power": power_series}


def probes(rows: int = ROWS, dim: int = DIM, seed: int = 1) -> Tensor:
    return draw_probes(rows, dim, "rademacher", torch.Generator().manual_seed(seed))


def truth_of(method: str, A: Tensor, v: Tensor) -> Tensor:
    """`v' phi(A) v`, or what Golub-Kahan's process estimates: `v' (phi(M) - A'A) v / 2`, from the eigenvalues."""
    if method != "lanczos":
        return form(phi_matrix(A), v)
    values, vectors = torch.linalg.eigh(A + A.T + A.T @ A)
    return form((vectors * (values - torch.log1p(values))) @ vectors.T / 2 - A.T @ A / 2, v)


def relative(result: QuadraticForm, truth: Tensor) -> tuple[float, float]:
    """Error and estimated error, summed over the rows, in units of the size of the forms."""
    size = float(result.frobenius.sum()) / 2
    return float((result.value - truth).abs().sum()) / size, float(result.truncation.sum()) / size


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("method", ESTIMATORS)
def test_adaptive_steps_meet_their_tolerance_and_know_their_error(method: str, name: str) -> None:
    A, v = ZOO[name], probes()
    truth = truth_of(method, A, v)
    for tolerance in (1e-2, 1e-3, 1e-4):
        result = ESTIMATORS[method](MatrixOperator(A, ROWS), v, tolerance=tolerance)
        error, estimate = relative(result, truth)
        assert error <= tolerance or result.steps in (64, DIM)
        assert error <= 10 * estimate + 1e-9
        # From above too, wherever there is anything to see; the series takes every term for one of the same sign.
        if error > 3e-4 and method != "power":
            assert estimate <= 10 * error


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("method", ["arnoldi", "lanczos"])
def test_no_number_of_steps_hides_the_error(method: str, name: str) -> None:
    """Every length of the process, the odd ones that change nothing included."""
    A, v = HARD[name], probes()
    truth = truth_of(method, A, v)
    process = (ArnoldiProcess if method == "arnoldi" else LanczosProcess)(MatrixOperator(A, ROWS), v)
    for steps in range(1, 13):
        process.advance()
        result = ESTIMATORS[method](MatrixOperator(A, ROWS), v, steps=steps)
        torch.testing.assert_close(result.truncation, process.truncation(), rtol=1e-9, atol=1e-12)
        assert bool((process.latest_truncation() >= result.truncation * (1 - 1e-12)).all())
        error, estimate = relative(result, truth)
        # The first steps of a process cannot know what they have not met: an outlier of weight 1/60, a small cluster.
        if steps >= 3:
            assert error <= (40 if name in ("an outlier", "a small cluster", "period 3") else 10) * estimate + 1e-9


@pytest.mark.parametrize("name", ZOO)
def test_second_order_knows_what_it_leaves_out(name: str) -> None:
    A, v = ZOO[name], probes()
    error, estimate = relative(second_order(MatrixOperator(A, ROWS), v), form(phi_matrix(A), v))
    assert error <= 10 * estimate
    assert estimate <= 10 * error


@pytest.mark.parametrize(("method", "tolerance"), [("arnoldi", 1e-3), ("arnoldi", 1e-6), ("lanczos", 1e-2)])
def test_a_spectrum_symmetric_about_zero_does_not_look_converged(method, tolerance: float) -> None:
    """+-[0.97, 0.999] at d = 200, where odd steps change nothing, which is no convergence: E(J) = 371.2."""
    A = hard_spectra(200)["gap at 0.97"]
    exact = exact_error_of_spectrum(A)
    assert exact == pytest.approx(371.2, abs=0.1)
    v = probes(32, 200)
    result = ESTIMATORS[method](MatrixOperator(A, 32), v, tolerance=tolerance)
    error = float((result.value - truth_of(method, A, v)).abs().mean())
    assert error < tolerance * 100
    assert 0.1 * error <= float(result.truncation.mean()) <= 10 * error + 1e-9
    # 4.5 standard errors of a mean over probes: false-alarm rate below 1e-5.
    spread = float(result.value.std()) / 32**0.5
    assert abs(float(result.value.mean()) - exact) < 4.5 * spread + error


def exact_error_of_spectrum(A: Tensor) -> float:
    values = torch.linalg.eigvalsh(A)
    return float((values - torch.log1p(values)).sum())


def test_the_zoo_is_what_it_says() -> None:
    for name, A in HARD.items():
        assert float(torch.linalg.matrix_norm(A, ord=2)) < 1, name
    assert exact_error_of_spectrum(HARD["an outlier"]) == pytest.approx(exact_error(HARD["an outlier"]), rel=1e-9)
    turned = torch.linalg.eigvals(HARD["period 3"])
    angles = turned.angle()[turned.abs() > 0.5] * 3 / (2 * torch.pi)
    assert float((angles - angles.round()).abs().max()) < 1e-6
