"""Bounds against mpmath, brute force over matrices of every class, and the cases that attain them."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from hnkit import InputError
from hnkit.bounds import (
    field_of_values_bounds,
    frobenius_bound,
    leading_singular_value_bound,
    local_theorem7_bound,
    log_gap,
    second_order_remainder_bound,
    singular_value_bound,
    solver_margin,
    theorem7_bound,
)
from tests.hnkit.functions import f64

mpmath.mp.dps = 60
SIZES = [1e-300, 1e-150, 1e-20, 1e-9, 1e-4, 0.01, 0.1, 0.3, 0.49, 0.5, 0.51, 0.7, 0.9, 0.99, 1 - 1e-9]


def h(s) -> mpmath.mpf:
    s = mpmath.mpf(s)
    with mpmath.workdps(400):
        return -mpmath.log(1 - s) - s


def exact_error(A: torch.Tensor) -> float:
    """E(A) from the determinant in 50 digits, sharing nothing with hnkit."""
    M = mpmath.matrix(A.double().tolist())
    d = M.rows
    return float(mpmath.fsum(M[i, i] for i in range(d)) - mpmath.log(abs(mpmath.det(mpmath.eye(d) + M))))


def random_matrix(kind: str, d: int, norm: float, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    G = torch.randn(d, d, generator=g, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    A = {
        "general": lambda: G,
        "symmetric": lambda: G + G.T,
        "skew": lambda: G - G.T,
        "negative": lambda: -(G @ G.T),
        "nilpotent": lambda: Q @ G.triu(1) @ Q.T,
        "low rank": lambda: G[:, :2] @ Q[:2],
        "orthogonal": lambda: Q,
        "jordan": lambda: -torch.eye(d, dtype=torch.float64) + torch.diag(torch.ones(d - 1, dtype=torch.float64), 1),
    }[kind]()
    return A * (norm / torch.linalg.matrix_norm(A, 2))


KINDS = ["general", "symmetric", "skew", "negative", "nilpotent", "low rank", "orthogonal", "jordan"]
ZOO = [(kind, d, norm) for kind in KINDS for d in (2, 3, 7) for norm in (1e-6, 0.1, 0.6, 0.97)]


@pytest.mark.parametrize("s", SIZES)
def test_log_gap_keeps_full_relative_accuracy(s):
    if s > 1e-150:
        assert abs(log_gap(s) / h(s) - 1) < 2e-15
    else:
        assert log_gap(s) == 0.5 * s * s
    if 1e-150 < s < 0.9:
        assert abs(log_gap(-s) - h(-s)) <= 2e-15 * h(-s)


@pytest.mark.parametrize("z", [0.5, 0.7, 3.0, 1e3, 1e12])
def test_log_gap_at_negative_arguments(z):
    expected = mpmath.mpf(z) - mpmath.log(1 + mpmath.mpf(z))
    assert abs(log_gap(-z) / expected - 1) < 2e-15


@pytest.mark.parametrize("s", [s for s in SIZES if s >= 1e-20])
def test_every_bound_of_norms_keeps_full_relative_accuracy(s):
    assert abs(theorem7_bound(32768, s) / (32768 * h(s)) - 1) < 2e-15
    assert abs(frobenius_bound(3.0, s) / (9 * h(s) / mpmath.mpf(s) ** 2) - 1) < 2e-15
    with mpmath.workdps(200):
        remainder = 9 * (h(s) - mpmath.mpf(s) ** 2 / 2) / mpmath.mpf(s) ** 2
    assert abs(second_order_remainder_bound(3.0, s) / remainder - 1) < 4e-15


def test_the_limits_at_zero():
    assert theorem7_bound(5, 0.0) == 0.0
    assert frobenius_bound(0.0, 0.0) == 0.0
    assert frobenius_bound(2.0, 0.0) == 2.0
    assert second_order_remainder_bound(2.0, 0.0) == 0.0
    assert singular_value_bound(torch.zeros(3, 3)) == 0.0
    assert leading_singular_value_bound(torch.zeros(1), 0.0) == 0.0
    assert field_of_values_bounds(torch.zeros(3, 3)) == (0.0, 0.0)
    assert frobenius_bound(1.0, 1e-12) == pytest.approx(0.5, rel=1e-11)


@pytest.mark.parametrize(("kind", "d", "norm"), ZOO)
def test_bounds_hold_and_are_ordered(kind, d, norm):
    A = random_matrix(kind, d, norm, seed=d)
    error = exact_error(A)
    values = torch.linalg.svdvals(A)
    values = values + solver_margin(d) * values[0]  # as the bound by singular values takes them
    L, frobenius = float(values[0]), float(torch.linalg.vector_norm(values))
    weyl = float(singular_value_bound(A))
    leading = [float(leading_singular_value_bound(values[: r + 1], frobenius)) for r in range(d)]
    theorem7, fro = theorem7_bound(d, L), frobenius_bound(frobenius, L)
    lower, upper = (float(side) for side in field_of_values_bounds(A))
    tiny = 1e-14 * weyl
    assert abs(error) <= weyl
    assert weyl <= leading[-1] + tiny
    assert all(later <= earlier + tiny for earlier, later in itertools.pairwise(leading))
    assert leading[0] <= fro * (1 + 1e-14)
    assert fro <= theorem7 * (1 + 1e-14)
    assert lower <= error <= upper
    second = error - float(torch.trace(A @ A)) / 2
    assert abs(second) <= second_order_remainder_bound(frobenius, L) + tiny


def test_frobenius_weyl_and_theorem7_are_attained():
    L, k, d = 0.7, 3, 8
    A = torch.zeros(d, d, dtype=torch.float64)
    A[:k, :k] = -L * torch.eye(k, dtype=torch.float64)
    error = k * float(h(L))
    assert exact_error(A) == pytest.approx(error, rel=1e-15)
    assert frobenius_bound(L * math.sqrt(k), L) == pytest.approx(error, rel=4e-15)
    assert theorem7_bound(k, L) == pytest.approx(error, rel=4e-15)
    assert float(singular_value_bound(A)) == pytest.approx(error, rel=4 * solver_margin(d))
    assert tuple(map(float, field_of_values_bounds(A))) == pytest.approx((error, error), rel=4 * solver_margin(d))


def test_the_second_order_remainder_is_attained():
    L, k = 0.4, 3
    A = -L * torch.eye(k, dtype=torch.float64)
    remainder = exact_error(A) - float(torch.trace(A @ A)) / 2
    assert second_order_remainder_bound(L * math.sqrt(k), L) == pytest.approx(remainder, rel=1e-13)


def test_field_of_values_needs_no_contraction_and_both_sides_are_sharp():
    K = torch.tensor([[0.0, 3.0], [-3.0, 0.0]])
    lower, upper = field_of_values_bounds(K)
    assert float(upper) == 0.0
    assert float(lower) == pytest.approx(-9.0)
    assert float(lower) <= exact_error(K) == pytest.approx(-math.log(10))
    small = 1e-4 * K
    assert float(field_of_values_bounds(small)[0]) == pytest.approx(exact_error(small), rel=1e-6)
    S = torch.tensor([[4.0, 1.0], [1.0, -0.5]])
    lower, upper = field_of_values_bounds(S)
    assert float(lower) <= exact_error(S) <= float(upper)
    assert float(upper) - float(lower) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_field_of_values_holds_beyond_norm_one(seed):
    A = random_matrix("general", 6, 1.0, seed)
    S, K = (A + A.T) / 2, (A - A.T) / 2
    A = S * (0.9 / torch.linalg.matrix_norm(S, 2)) + 5 * K
    lower, upper = field_of_values_bounds(A)
    assert float(lower) <= exact_error(A) <= float(upper)


NEAR = [1e-6, 1e-9, 1e-11, 1e-12, 3e-13]


@pytest.mark.parametrize("gap", NEAR)
@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("seed", range(4))
def test_no_bound_falls_below_the_error_by_conditioning(gap, d, seed):
    """A symmetric matrix whose least eigenvalue is `gap` above -1, taken as the floats it is stored in.

    There `E` is attained by every bound but for the positive eigenvalues, and `log(gap)` magnifies an error of the
    solver by `1 / gap`. The oracle takes the determinant in 60 digits.
    """
    Q = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    values = torch.full((d,), -0.5, dtype=torch.float64)
    values[0] = gap - 1
    A = Q @ torch.diag(values) @ Q.T
    A = (A + A.T) / 2
    M = mpmath.matrix(A.tolist())
    error = sum(A.diagonal().tolist(), mpmath.mpf(0)) - mpmath.log(mpmath.det(mpmath.eye(d) + M))
    assert error > 0
    weyl, (lower, upper) = float(singular_value_bound(A)), field_of_values_bounds(A)
    assert error <= weyl
    assert float(lower) <= error <= float(upper)
    if gap > 1e-11:  # and not by giving up
        assert weyl <= error * (1 + 0.01)
        assert float(lower) >= error * (1 - 0.01)
        assert float(upper) <= error * (1 + 0.01)


def test_bounds_of_a_matrix_that_the_solver_cannot_tell_from_one_of_norm_1_are_infinite():
    A = -torch.diag(torch.tensor([1 - 1e-16, 0.5], dtype=torch.float64))
    assert float(singular_value_bound(A)) == math.inf
    assert [float(side) for side in field_of_values_bounds(A)] == [-math.inf, math.inf]


@pytest.mark.parametrize("s", [k / 64 for k in range(1, 64)] + [1 - 2.0**-k for k in range(7, 54)] + SIZES[3:])
def test_bounds_of_norms_are_rounded_outward(s):
    with mpmath.workdps(200):
        ratio = h(s) / mpmath.mpf(s) ** 2
        assert theorem7_bound(3, s) >= 3 * h(s)
        assert frobenius_bound(0.3, s) >= mpmath.mpf(0.3) ** 2 * ratio
        assert second_order_remainder_bound(0.3, s) >= mpmath.mpf(0.3) ** 2 * (ratio - 0.5)
        assert float(local_theorem7_bound(3, torch.tensor([s], dtype=torch.float64))) >= 3 * h(s)
        one = torch.tensor([s, s], dtype=torch.float64)
        assert float(leading_singular_value_bound(one, 2 * s)) >= 4 * h(s)


def test_the_worked_example_of_a_gaussian_matrix():
    """The order of the bounds for a 60-dimensional Gaussian matrix of norm 0.9: each far below the one before."""
    A = random_matrix("general", 60, 0.9, seed=0)
    values, frobenius = torch.linalg.svdvals(A), float(torch.linalg.matrix_norm(A))
    chain = [
        theorem7_bound(60, 0.9),
        frobenius_bound(frobenius, 0.9),
        float(leading_singular_value_bound(values[:8], frobenius)),
        float(singular_value_bound(A)),
        float(field_of_values_bounds(A)[1]),
        exact_error(A),
    ]
    assert all(large > 1.1 * small for large, small in itertools.pairwise(chain))
    assert chain[0] == pytest.approx(84.155, abs=1e-3)


def test_leading_bound_accepts_upper_bounds_of_the_singular_values():
    A = random_matrix("general", 9, 0.8, seed=3)
    values, frobenius = torch.linalg.svdvals(A), float(torch.linalg.matrix_norm(A))
    g = torch.Generator().manual_seed(0)
    best = float(leading_singular_value_bound(values[:4], frobenius))
    for _ in range(50):
        above = values[:4] + (0.95 - values[:4]) * torch.rand(4, generator=g, dtype=torch.float64) * 0.3
        above = above.sort(descending=True).values
        assert float(leading_singular_value_bound(above, frobenius * 1.01)) >= best


def test_local_bound_is_per_sample():
    norms = torch.tensor([0.0, 0.1, 0.9])
    expected = [4 * float(h(float(s))) for s in norms]
    assert local_theorem7_bound(4, norms).tolist() == pytest.approx(expected, rel=1e-14)


def test_batches_broadcast_and_floats_stay_floats():
    A = torch.stack([random_matrix(kind, 4, 0.5, 1) for kind in KINDS]).reshape(2, 4, 4, 4)
    assert singular_value_bound(A).shape == (2, 4)
    lower, upper = field_of_values_bounds(A)
    assert lower.shape == upper.shape == (2, 4)
    assert float(upper[1, 2]) == float(field_of_values_bounds(A[1, 2])[1])
    grid = frobenius_bound(torch.ones(3, 1), torch.tensor([0.0, 0.5]))
    assert grid.shape == (3, 2)
    assert grid.dtype == torch.float64
    assert isinstance(frobenius_bound(1.0, 0.5), float)
    assert isinstance(theorem7_bound(3, 0.5), float)
    assert leading_singular_value_bound(torch.rand(5, 1) * 0.5, torch.ones(5)).shape == (5,)


@pytest.mark.parametrize("s", [0.0, 1e-8, 0.3, 0.499999, 0.500001, 0.8])
def test_the_derivative_of_h_is_finite_and_right(s):
    x = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_gap(x), x)
    assert float(gradient) == pytest.approx(s / (1 - s), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theorem7_bound(3, 1.0), r"lipschitz = 1: the bound needs 0 <= L < 1"),
        (lambda: theorem7_bound(3, -0.1), r"lipschitz = -0.1"),
        (lambda: theorem7_bound(3, math.nan), r"lipschitz is nan"),
        (lambda: theorem7_bound(3, math.inf), r"lipschitz = inf"),
        (lambda: theorem7_bound(0, 0.5), r"dim = 0"),
        (lambda: theorem7_bound(2.5, 0.5), r"dim = 2.5"),
        (lambda: theorem7_bound(True, 0.5), r"dim = True"),
        (lambda: frobenius_bound(-1.0, 0.5), r"frobenius_norm = -1"),
        (lambda: frobenius_bound(math.inf, 0.5), r"frobenius_norm = inf"),
        (lambda: frobenius_bound(1.0, 2.0), r"lipschitz = 2"),
        (lambda: second_order_remainder_bound(1.0, 1.0), r"lipschitz = 1"),
        (lambda: local_theorem7_bound(3, torch.tensor([0.1, 1.5])), r"local norm = 1.5 \(entry 1\)"),
        (lambda: log_gap(1.0), r"s = 1"),
        (lambda: singular_value_bound(torch.eye(2)), r"spectral norm = 1"),
        (lambda: singular_value_bound(torch.diag(torch.tensor([0.1, 1.25]))), r"spectral norm = 1.25"),
        (lambda: singular_value_bound(torch.ones(2, 3)), r"shape \(2, 3\)"),
        (lambda: singular_value_bound(torch.full((2, 2), math.nan)), r"not finite"),
        (lambda: singular_value_bound(torch.zeros(2, 2, dtype=torch.complex64)), r"complex"),
        (lambda: field_of_values_bounds(-torch.eye(2)), r"lambda_min of the symmetric part = -1"),
        (lambda: leading_singular_value_bound(torch.tensor([0.1, 0.2]), 1.0), r"descending"),
        (lambda: leading_singular_value_bound(torch.zeros(0), 1.0), r"empty"),
        (lambda: theorem7_bound(3, torch.tensor(True)), r"bool"),
        (lambda: theorem7_bound(3, "a"), r"lipschitz = 'a': give a real number"),
        (lambda: frobenius_bound(None, 0.5), r"frobenius_norm = None: give a real number"),
        (lambda: theorem7_bound(3, torch.ones(2, device="meta")), r"lipschitz is a tensor on device meta"),
        (lambda: singular_value_bound(torch.ones(2, 2, device="meta")), r"A is on device meta"),
        (lambda: singular_value_bound([[0.5]]), r"A is a list"),
        (lambda: field_of_values_bounds(torch.eye(2).to_sparse()), r"A is .*sparse"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_bounds_see_one_nan_among_many():
    with pytest.raises(InputError, match="nan"):
        theorem7_bound(3, f64(0.1, math.nan))


def test_bounds_see_one_entry_that_is_not_finite():
    A = torch.zeros(2, 3, 3)
    A[1, 0, 2] = math.inf
    with pytest.raises(InputError, match="not finite"):
        singular_value_bound(A)


def test_bounds_name_the_place_of_a_nan_among_many_batches():
    A = torch.zeros(2, 5, 3, 3)
    A[1, 4, 2, 0] = math.nan
    with pytest.raises(InputError, match=r"A \(entry \(1, 4\)\)"):
        singular_value_bound(A)


def test_bounds_of_one_dimension_are_the_scalar_function():
    h = -math.log(0.6) - 0.4
    assert theorem7_bound(1, 0.4) == pytest.approx(h, rel=1e-14)
    assert local_theorem7_bound(1, f64(0.4)).tolist() == pytest.approx([h], rel=1e-14)
    assert singular_value_bound(f64([-0.4])).item() == pytest.approx(h, rel=1e-13)
    assert [side.item() for side in field_of_values_bounds(f64([-0.4]))] == pytest.approx([h, h], rel=1e-13)


VANISHING = [5e-324, 1e-310, 2.0**-1022, 1e-200, 1e-161, 1e-155, 1e-100]


@pytest.mark.parametrize("s", VANISHING)
def test_bounds_are_above_what_underflows(s):
    """Where a square is no float64, 0 is no bound: the truth is the leading terms of the series, with 800 digits."""
    with mpmath.workdps(800):
        m = mpmath.mpf(s)
        ratio, remainder = mpmath.mpf(1) / 2 + m / 3, m / 3 + m**2 / 4
        assert theorem7_bound(5, s) >= 5 * m**2 * ratio
        assert float(local_theorem7_bound(5, f64(s))) >= 5 * m**2 * ratio
        for norm in [s, 1e-200, 1e-160, 1.0, 1e154]:
            assert frobenius_bound(norm, s) >= mpmath.mpf(norm) ** 2 * ratio
            assert second_order_remainder_bound(norm, s) >= mpmath.mpf(norm) ** 2 * remainder
            assert float(leading_singular_value_bound(f64(s, s / 2), norm)) >= mpmath.mpf(norm) ** 2 * ratio
        # A = diag(s, -s): E is s^2 to fourth order; [[0, s], [-s, 0]]: -log(1 + s^2)
        A = torch.tensor([[s, 0.0], [0.0, -s]], dtype=torch.float64)
        assert float(singular_value_bound(A)) >= m**2
        lower, upper = field_of_values_bounds(A)
        assert float(lower) <= m**2 <= float(upper)
        turn = torch.tensor([[0.0, s], [-s, 0.0]], dtype=torch.float64)
        assert float(field_of_values_bounds(turn)[0]) <= -mpmath.log(1 + m**2)
    assert theorem7_bound(5, s) <= 5 * s**2 * 0.51 + 1e-321  # and not by giving up


def test_a_norm_whose_square_overflows_has_no_bound():
    assert second_order_remainder_bound(1e160, 5e-324) == math.inf


@pytest.mark.parametrize("bound", [frobenius_bound, second_order_remainder_bound])
def test_a_number_and_a_tensor_give_a_tensor(bound):
    both = bound(2.0, 0.4)
    assert isinstance(both, float)
    for one in (bound(2.0, f64(0.4, 0.4)), bound(f64(2.0, 2.0), 0.4)):
        assert isinstance(one, torch.Tensor)
        assert one.tolist() == pytest.approx([both, both], rel=1e-15)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (0, 4, 1, 1)])
def test_bounds_of_no_matrices_are_no_numbers(shape):
    A = torch.zeros(shape, dtype=torch.float64)
    assert singular_value_bound(A).shape == shape[:-2]
    assert [bound.shape for bound in field_of_values_bounds(A)] == [shape[:-2]] * 2


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 4, 3), (2, 3, 3, 1), (3, 0, 0), (3,)])
def test_matrices_that_are_not_square_are_refused(shape):
    with pytest.raises(InputError, match="square"):
        singular_value_bound(torch.zeros(shape))


def test_batches_of_any_depth_give_the_bounds_of_each_matrix():
    """Of `S + K`, `S = diag(s, s / 2, 0)`, `K` a skew block of size k: all known in closed form."""
    s, k = torch.linspace(0.1, 0.9, 10, dtype=torch.float64), torch.linspace(0.9, 0.2, 10, dtype=torch.float64)
    A = torch.zeros(10, 3, 3, dtype=torch.float64)
    A[:, 0, 0], A[:, 1, 1], A[:, 0, 2], A[:, 2, 0] = -s, s / 2, k, -k
    lower, upper = field_of_values_bounds(A.reshape(2, 5, 3, 3))
    expected = (-s - torch.log1p(-s)) + (s / 2 - torch.log1p(s / 2))
    torch.testing.assert_close(upper.flatten(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close((upper - lower).flatten(), k.square() / (1 - s).square(), rtol=1e-12, atol=1e-12)
    diagonal = torch.diag_embed(torch.stack([-s, s / 2], -1))
    values = singular_value_bound(diagonal.reshape(2, 5, 2, 2))
    expected = -torch.log1p(-s) - s - torch.log1p(-s / 2) - s / 2
    torch.testing.assert_close(values.flatten(), expected, rtol=1e-12, atol=0)


def test_singular_values_must_descend_all_the_way():
    with pytest.raises(InputError, match=r"singular value = 0.4 \(entry 1\)"):
        leading_singular_value_bound(f64(0.5, 0.2, 0.4), 1.0)
    assert leading_singular_value_bound(f64(0.5, 0.4, 0.4), 1.0).ndim == 0
