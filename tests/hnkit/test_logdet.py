"""E(A) against 250-digit arithmetic, its gradient, its in-place twin, its refusals."""

import math

import pytest
import torch

from hnkit import InputError, NonFiniteError, log_det_error
from hnkit.logdet import log_det_error_, log_det_errors_
from tests.hnkit.operator_zoo import KINDS, exact_error, matrix

SIZES = (1e-100, 1e-12, 1e-9, 1e-5, 1e-2, 0.2, 0.49, 0.51, 0.99)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_full_relative_accuracy(kind: str, size: float) -> None:
    # |A|_F^2 is the scale of E(A): where traces of even powers cancel, E is smaller than its own terms.
    A = matrix(kind, size)
    scale = float(A.square().sum()) / 2
    assert abs(float(log_det_error(A)) - exact_error(A)) <= 1e-13 * scale


@pytest.mark.parametrize("size", [1e-100, 1e-9, 1e-3, 0.4])
def test_relative_accuracy_of_the_value_itself_for_symmetric_matrices(size: float) -> None:
    A = matrix("symmetric", size)
    assert float(log_det_error(A)) == pytest.approx(exact_error(A), rel=1e-13)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("size", [1e-9, 0.3, 3.0, 1e3])
def test_any_dimension_and_large_matrices(dim: int, size: float) -> None:
    A = matrix("gaussian", size, dim)
    assert float(log_det_error(A)) == pytest.approx(exact_error(A), rel=1e-12)


def test_a_rotation_costs_less_than_nothing() -> None:
    assert float(log_det_error(matrix("skew", 0.5))) < 0


def test_zero_and_nilpotent_are_exact() -> None:
    assert log_det_error(torch.zeros(3, 4, 4)).tolist() == [0.0] * 3
    strictly_upper = torch.ones(5, 5, dtype=torch.float64).triu(1) * 0.1
    assert float(log_det_error(strictly_upper)) == 0.0


def test_batches_mix_sizes() -> None:
    A = torch.stack([matrix("gaussian", s, 6) for s in (1e-9, 0.3, 0.0, 5.0)]).reshape(2, 2, 6, 6)
    expected = torch.stack([log_det_error(a) for a in A.reshape(4, 6, 6)]).reshape(2, 2)
    torch.testing.assert_close(log_det_error(A), expected, rtol=1e-13, atol=0)


def test_a_negative_determinant_has_a_logarithm_of_its_modulus() -> None:
    A = torch.diag(torch.tensor([-3.0, 0.5], dtype=torch.float64))
    assert float(log_det_error(A)) == pytest.approx(-2.5 - math.log(3.0))


def test_singular_is_infinite() -> None:
    assert float(log_det_error(-torch.eye(2, dtype=torch.float64))) == math.inf


@pytest.mark.parametrize("size", [1e-9, 1e-4, 0.3, 2.0])
def test_gradient_is_the_resolvent_formula(size: float) -> None:
    A = matrix("gaussian", size, 6).requires_grad_()
    log_det_error(A).backward()
    eye = torch.eye(6, dtype=torch.float64)
    expected = (A.detach() @ torch.linalg.inv(eye + A.detach())).T
    assert A.grad is not None
    assert float((A.grad - expected).abs().max()) <= 1e-14 * max(1.0, size) * size


def test_gradient_against_finite_differences_with_different_weights() -> None:
    A = torch.stack([matrix("gaussian", s, 5) for s in (0.1, 0.45, 3.0)]).requires_grad_()
    assert torch.autograd.gradcheck(log_det_error, (A,))
    assert torch.autograd.gradgradcheck(log_det_error, (A,))


def test_types() -> None:
    A = matrix("gaussian", 0.2, 4)
    assert log_det_error(A.float()).dtype == torch.float32
    assert log_det_error(A.bfloat16()).dtype == torch.float32
    assert float(log_det_error(A.float())) == pytest.approx(exact_error(A.float().double()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("flip", [1.0, -1.0])
def test_in_place_twin(dtype: torch.dtype, flip: float) -> None:
    A = matrix("gaussian", 0.8, 40)
    A[0] = A[0] + (flip - 1.0) * (A[0] + torch.eye(40, dtype=torch.float64)[0])  # flip = -1 mirrors a row of I + A
    expected = torch.linalg.slogdet(torch.eye(40, dtype=torch.float64) + A)
    value, sign = log_det_error_(A.to(dtype).clone())
    assert float(value) == pytest.approx(float(log_det_error(A)), rel=1e-9 if dtype == torch.float64 else 1e-4)
    assert float(sign) == float(expected.sign)


def test_in_place_allocates_no_second_matrix() -> None:
    A = matrix("gaussian", 0.8, 64)
    address = A.data_ptr()
    log_det_error_(A)
    L, U = A.T.tril(-1), A.T.triu()
    assert A.data_ptr() == address
    # The storage now holds the factors: their product is a row permutation of I + A^T.
    rebuilt = (L + torch.eye(64, dtype=torch.float64)) @ U
    original = torch.eye(64, dtype=torch.float64) + matrix("gaussian", 0.8, 64).T
    distances = (rebuilt[:, None] - original[None]).abs().amax(2).amin(1)
    assert float(distances.max()) < 1e-13


@pytest.mark.parametrize(
    ("A", "words"),
    [
        (torch.zeros(3), "shape"),
        (torch.zeros(2, 3), "square"),
        (torch.zeros(0, 0), "square"),
        (torch.zeros(2, 2, dtype=torch.int64), "int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), "complex"),
        ([[0.0]], "list"),
    ],
)
def test_refuses_what_is_no_matrix(A: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        log_det_error(A)  # type: ignore[arg-type]


def test_refuses_nan() -> None:
    with pytest.raises(NonFiniteError):
        log_det_error(torch.full((2, 2), torch.nan))


# --- batches, signs and memory ---------------------------------------------------------------------------------------


def rank_one(scale: float, dim: int) -> torch.Tensor:
    """`scale u v^T` with `u . v = 1`: trace `scale`, determinant of I + A `1 + scale`."""
    u = torch.linspace(1.0, 2.0, dim, dtype=torch.float64)
    v = torch.linspace(-1.0, 3.0, dim, dtype=torch.float64)
    return scale * torch.outer(u, v) / (u @ v)


def test_log_det_error_of_an_empty_batch():
    assert log_det_error(torch.zeros(5, 0, 3, 3)).shape == (5, 0)


@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0]])
def test_the_sign_of_a_factorisation_with_swaps(order):
    """I + A is a permutation matrix: one swap, then two."""
    identity = torch.eye(3, dtype=torch.float64)
    value, sign = log_det_error_((identity[order] - identity).clone())
    assert float(sign) == pytest.approx(float(torch.linalg.det(identity[order])))
    assert float(value) == pytest.approx(float((identity[order] - identity).trace()))


@pytest.mark.parametrize("dim", [5, 64, 70])
def test_matrices_of_any_size_in_a_batch_keep_their_digits_and_signs(dim):
    """One that needs elimination, since its error term is below the rounding of its trace, among large ones."""
    scales = [1e-7, 3.0, -5.0, 2e-8]
    value, sign = log_det_errors_(torch.stack([rank_one(scale, dim) for scale in scales]))
    small = [scale**2 / 2 - scale**3 / 3 for scale in scales]
    large = [scale - math.log(abs(1 + scale)) for scale in scales]
    expected = [small[0], large[1], large[2], small[3]]
    assert value.tolist() == pytest.approx(expected, rel=1e-9)
    assert sign.tolist() == [1.0, 1.0, -1.0, 1.0]


def test_large_matrices_are_factored_in_their_own_memory():
    A = torch.stack([rank_one(3.0, 100), rank_one(-4.0, 100)])
    before = A.clone()
    log_det_errors_(A)
    factor = torch.linalg.lu_factor(before.mT + torch.eye(100, dtype=torch.float64)).LU
    torch.testing.assert_close(A.mT, factor)
