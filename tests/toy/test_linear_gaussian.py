"""Item e on the linear-Gaussian problems: what each loss learns."""

from __future__ import annotations

import math
import sys

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from hnkit import InputError
from hnkit.tilt import affine_coefficients
from hnkit.toy import PROBLEMS, LinearGaussian
from tests.hnkit.functions import f64

NAMES = ["linear-gaussian", "linear-gaussian-low-rank", "linear-reward"]


def expected_loss(problem, K, c, kind):
    """The population loss of `T x = K x + c`, written out: E of quadratic forms of a standard normal."""
    d = problem.dim
    J = K - torch.eye(d, dtype=K.dtype)
    H, b = problem.hessian, problem.gradient
    kl = 0.5 * (J.square().sum() + c.square().sum())
    if kind == "second-order":
        kl = kl + 0.5 * torch.trace(J @ J)
    elif kind == "exact":
        kl = kl + torch.trace(J) - torch.linalg.slogdet(K).logabsdet
    reward = -0.5 * (torch.trace(K.mT @ H @ K) + c @ H @ c) + b @ c
    return kl - reward


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["l2", "second-order", "exact"])
def test_minimising_each_loss_numerically_finds_its_optimum(name, kind):
    problem = PROBLEMS[name]()
    d = problem.dim
    optimum = {"l2": problem.l2_map, "second-order": problem.second_order_map, "exact": problem.optimal_map}[kind]()
    K_star, c_star = affine_coefficients(optimum, d)
    # stationary and, started at the identity, reached: all steps from there stay symmetric
    K = torch.eye(d, dtype=torch.float64, requires_grad=True)
    c = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [K, c], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        solver.zero_grad()
        loss = expected_loss(problem, K, c, kind)
        loss.backward()
        return loss

    solver.step(closure)
    torch.testing.assert_close(c.detach(), c_star, atol=1e-6, rtol=0)
    torch.testing.assert_close(K.detach(), K_star, atol=1e-6, rtol=0)
    torch.testing.assert_close(c_star, problem.mean)
    gap = {"l2": problem.l2_gap, "second-order": problem.second_order_gap, "exact": lambda: 0.0}[kind]()
    assert problem.gap_of_affine(K_star, c_star) == pytest.approx(gap, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_the_learned_covariances(name):
    problem = PROBLEMS[name]()
    S = problem.covariance
    for f, expected in ((problem.optimal_map(), S), (problem.l2_map(), S @ S)):
        K, _ = affine_coefficients(f, problem.dim)
        torch.testing.assert_close(K @ K.mT, expected)


@pytest.mark.parametrize("name", ["linear-gaussian", "linear-gaussian-low-rank"])
def test_second_order_lands_in_between(name):
    problem = PROBLEMS[name]()
    assert 0 < problem.second_order_gap() < problem.l2_gap()
    slopes = {}
    for kind in ("l2_map", "second_order_map", "optimal_map"):
        K, _ = affine_coefficients(getattr(problem, kind)(), problem.dim)
        slopes[kind] = torch.linalg.eigvalsh(K)
    assert bool((slopes["l2_map"] <= slopes["second_order_map"] + 1e-12).all())
    assert bool((slopes["second_order_map"] <= slopes["optimal_map"] + 1e-12).all())


def test_closed_forms_in_one_dimension():
    problem = LinearGaussian(torch.tensor([[2.0]]), torch.tensor([[1.5]]), torch.tensor([1.0]), alpha=2.0)
    h, b = 4 * 1.5 / 2, 2 * 1.0 / 2
    s = 1 / (1 + h)
    assert float(problem.covariance) == pytest.approx(s)
    assert float(problem.mean) == pytest.approx(s * b)
    assert problem.log_z() == pytest.approx(0.5 * math.log(s) + 0.5 * s * b * b)
    assert problem.l2_gap() == pytest.approx((s - 1 - math.log(s)) / 2)
    assert problem.kl_optimal() == pytest.approx((s + (s * b) ** 2 - 1 - math.log(s)) / 2)
    assert float(affine_coefficients(problem.second_order_map(), 1)[0]) == pytest.approx(2 * s / (1 + s))


def test_skew_fields_on_the_kernel_cost_the_second_order_loss_nothing():
    """The second-order optimum is not unique where the reward is flat; the exact loss has no such directions."""
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    K, c = affine_coefficients(problem.second_order_map(), problem.dim)
    kernel = torch.linalg.eigh(problem.hessian).eigenvectors[:, :2]
    turn = kernel @ torch.tensor([[0.0, 0.7], [-0.7, 0.0]], dtype=torch.float64) @ kernel.mT
    loss = expected_loss(problem, K, c, "second-order")
    assert float(expected_loss(problem, K + turn, c, "second-order")) == pytest.approx(float(loss), abs=1e-12)
    assert problem.gap_of_affine(K + turn, c) > problem.second_order_gap() + 0.05


def test_off_the_support_the_output_density_vanishes():
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    y = problem.generate(torch.ones(1, 8, dtype=torch.float64))
    normal = torch.linalg.svd(problem.weight).U[:, 2]
    assert math.isfinite(float(problem.log_p_star(y)))
    assert float(problem.log_p_star(y + 0.1 * normal)) == -math.inf
    assert float(problem.log_p_base(y + 0.1 * normal)) == -math.inf


def test_a_reward_that_grows_too_fast_is_refused():
    eye = torch.eye(2)
    LinearGaussian(eye, -0.9 * eye, torch.zeros(2))
    with pytest.raises(InputError, match="infinite"):
        LinearGaussian(eye, -eye, torch.zeros(2))
    with pytest.raises(InputError, match="infinite"):
        LinearGaussian(eye, -0.9 * eye, torch.zeros(2)).with_alpha(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(2), torch.eye(3), torch.zeros(2)), "shapes"),
        ((torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.zeros(2)), "symmetric"),
        ((torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(3)), "offset"),
        ((torch.eye(2) * math.nan, torch.eye(2), torch.zeros(2)), "finite"),
        ((torch.eye(2), torch.eye(2), torch.zeros(2), None, -1.0), "alpha"),
        ((torch.eye(2), torch.eye(2), torch.zeros(2), None, math.nan), "alpha"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        LinearGaussian(*arguments)


def test_gap_of_affine_checks_its_shapes():
    problem = PROBLEMS["linear-gaussian"]()
    with pytest.raises(InputError, match="shapes"):
        problem.gap_of_affine(torch.eye(5), torch.zeros(6))
    assert problem.gap_of_affine(torch.zeros(6, 6), torch.zeros(6)) == math.inf


def scalar(h, b, constant=0.0):
    """`exp(constant + b x - h x^2/2)` under one-dimensional noise: `r(y) = -h y^2/2 + q y` at `y = x + 1`."""
    # -h (x + 1)^2/2 + q (x + 1) = -h x^2/2 + (q - h) x + q - h/2: the constant is changed by a second, constant output
    weight, offset = f64([1.0], [0.0]), f64(1.0, 1.0)
    q = b + h
    return LinearGaussian(weight, torch.diag(f64(h, 0.0)), f64(q, constant - (q - 0.5 * h)), offset)


def test_the_alternatives_of_a_low_rank_generator():
    """On the kernel p0* is N(0, 1): a shift by 1 costs 1/2, a scale c costs (c^2 - 1)/2 - log c."""
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    costs = [0.5, *((c * c - 1) / 2 - math.log(c) for c in (0.5, 2.0))]
    found = [law.kl - problem.kl_optimal() for law in problem.alternatives()]
    assert found == pytest.approx(costs, rel=1e-9)


# Arguments.


@pytest.mark.parametrize("part", range(4))
def test_one_entry_that_is_not_finite_is_refused(part):
    parts = [torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2)]
    parts[part] = parts[part].clone()
    parts[part].view(-1)[0] = math.nan
    with pytest.raises(InputError, match="finite"):
        LinearGaussian(*parts)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_curvature_is_symmetric_up_to_rounding_at_its_own_scale(sign):
    """Of size 1e6 an asymmetry of 1e-8 is rounding and one of 1e-3 is not."""
    for asymmetry, accepted in ((1e-8, True), (1e-3, False)):
        Q = sign * f64([1e6, 5e5, 0.0], [5e5 + asymmetry, 1e6, 2e4], [0.0, 2e4, 1e6])
        arguments = (torch.eye(3), Q, torch.zeros(3), None, 1e8)
        if accepted:
            LinearGaussian(*arguments)
        else:
            with pytest.raises(InputError, match="symmetric"):
                LinearGaussian(*arguments)


def test_one_direction_of_infinite_mass_is_refused():
    with pytest.raises(InputError, match="infinite"):
        LinearGaussian(torch.eye(2), torch.diag(f64(1.0, -2.0)), torch.zeros(2))


@pytest.mark.parametrize(
    ("curvature", "kind"), [([0.0, 0.0], "linear"), ([1.0, 0.0], "quadratic"), ([1.0, 2.0], "quadratic")]
)
def test_the_statement_names_the_reward(curvature, kind):
    statement = LinearGaussian(torch.eye(2), torch.diag(f64(*curvature)), torch.ones(2)).statement
    assert f"{kind} reward" in statement
    assert "W 2 x 2 of rank 2" in statement


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_the_rank_of_the_generator_does_not_depend_on_its_scale(scale):
    full, deficient, column = f64([2.0, 1.0], [1.0, 3.0]), f64([1.0, 2.0], [3.0, 6.0]), f64([1.0], [2.0], [3.0])
    for W, rank in ((full, 2), (deficient, 1), (column, 1)):
        m, d = W.shape
        problem = LinearGaussian(scale * W, torch.zeros(m, m), torch.zeros(m))
        assert f"of rank {rank}" in problem.statement
        assert problem.injective == (rank == d)


# Numbers.


@pytest.mark.parametrize("constant", [0.0, 1e6 / 3, -1e6 / 3])
@pytest.mark.parametrize(("h", "b"), [(0.0, 100.0), (3.0, 400.0), (-0.99, 0.01), (-0.9999, 0.0), (0.5, -1.3)])
def test_log_z_and_its_quadrature_at_narrow_wide_and_far_laws(h, b, constant):
    with mpmath.workdps(40):
        H, B = mpmath.mpf(h), mpmath.mpf(b)
        exact = mpmath.mpf(constant) + B * B / (2 * (1 + H)) - mpmath.log(1 + H) / 2
        problem = scalar(h, b, constant)
        value, error = problem.log_z_check()
        assert abs(problem.log_z() - exact) <= 1e-14 * (1 + abs(exact))
        assert abs(value - exact) <= error
        size = 1 + abs(constant) + b * b / (2 * (1 + h))
        assert 0 < error < 1e-13 * size + 2e-12


@pytest.mark.parametrize("claimed", [0.0, 1e-3])
def test_the_error_of_log_z_is_that_of_each_integral_over_its_value(claimed, monkeypatch):
    """Three integrals of 4 with the error `claimed` each; an error of 0 is not believed."""
    problem = LinearGaussian(torch.eye(3), torch.eye(3), torch.ones(3))
    monkeypatch.setattr(sys.modules[LinearGaussian.__module__], "quad", lambda *_, **__: (4.0, claimed))
    _, error = problem.log_z_check()
    assert error == pytest.approx(3 * claimed / 4, rel=1e-9, abs=1e-12)
    assert error > 3 * claimed / 4


@pytest.mark.parametrize("name", ["linear-gaussian", "linear-gaussian-low-rank", "linear-reward"])
def test_output_densities_are_those_of_scipy(name):
    """With a singular covariance SciPy too takes the density on the affine subspace that carries the law."""
    problem = PROBLEMS[name]()
    y = problem.generate(torch.randn(20, problem.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    W, w = problem.weight.numpy(), problem.offset.numpy()
    S = np.linalg.inv(np.eye(problem.dim) + W.T @ problem.curvature.numpy() @ W / problem.alpha)
    mean = S @ W.T @ (problem.slope.numpy() - problem.curvature.numpy() @ w) / problem.alpha
    for found, centre, covariance in (
        (problem.log_p_base(y), w, W @ W.T),
        (problem.log_p_star(y), w + W @ mean, W @ S @ W.T),
    ):
        law = stats.multivariate_normal(centre, covariance, allow_singular=True)
        assert found.numpy() == pytest.approx(law.logpdf(y.numpy()), abs=1e-8)


def test_a_far_point_of_the_support_is_on_the_support():
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    y = problem.generate(1e7 * torch.eye(8, dtype=torch.float64))
    assert bool(torch.isfinite(problem.log_p_base(y)).all())


def test_the_gap_of_an_affine_map_depends_on_the_law_it_gives():
    """`S^1/2 R` with a rotation `R` is optimal, though not symmetric."""
    problem = LinearGaussian(torch.eye(2), torch.diag(f64(3.0, 0.25)), f64(0.5, -1.0))
    turn = f64([0.6, -0.8], [0.8, 0.6])
    root = torch.diag(f64(1 / 4, 1 / 1.25).sqrt())
    mean = f64(0.5 / 4, -1 / 1.25)
    assert problem.gap_of_affine(root @ turn, mean) == pytest.approx(0, abs=1e-13)
    # turned the other way about: covariance R S R', trace of S^-1 R S R' = sum of s_j/s_i R_ij^2
    s = [0.25, 0.8]
    ratio = sum(s[j] / s[i] * float(turn[i, j]) ** 2 for i in range(2) for j in range(2))
    assert problem.gap_of_affine(turn @ root, mean) == pytest.approx((ratio - 2) / 2, abs=1e-13)


# The listed problems, by what is said of them.


def test_the_full_rank_default():
    """Singular values of W from 0.5 to 1.5, curvatures from 0.25 to 4, the best output at x = (cos 0, ..., cos 5)."""
    problem = PROBLEMS["linear-gaussian"]()
    values = torch.linalg.svdvals(problem.weight).flip(0)
    assert values.tolist() == pytest.approx([0.5, 0.7, 0.9, 1.1, 1.3, 1.5], rel=1e-12)
    W, Q = problem.weight, problem.curvature
    curvatures = torch.linalg.eigvalsh(W.mT @ Q @ W)
    assert curvatures.tolist() == pytest.approx([0.25 * 16 ** (k / 5) for k in range(6)], rel=1e-9)
    assert torch.linalg.eigvalsh(problem.covariance)[[0, -1]].tolist() == pytest.approx([0.2, 0.8], rel=1e-9)
    best = f64([math.cos(k) for k in range(6)])
    torch.testing.assert_close(problem.slope[None], problem.generate(best) @ Q)  # the gradient q - Q y vanishes
    at_zero = problem.generate(torch.zeros(1, 6, dtype=torch.float64))[0]
    assert at_zero.tolist() == pytest.approx([-0.5, -0.3, -0.1, 0.1, 0.3, 0.5], abs=1e-14)
    assert problem.alpha == 1.0


def test_the_low_rank_default():
    """Rank 2 with singular values 1.5 and 0.7, the reward a polynomial, temperature 2."""
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    assert torch.linalg.svdvals(problem.weight).tolist() == pytest.approx([1.5, 0.7, 0.0], abs=1e-12)
    assert problem.generate(torch.zeros(1, 8, dtype=torch.float64)).tolist() == [[0.2, -0.1, 0.3]]
    for a, b, c in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 2.0, -3.0), (-0.5, 0.3, 0.7)):
        expected = -a * a - 1.5 * b * b - 0.5 * c * c - 0.5 * a * b + 0.4 * b * c + 1.5 * a - 2 * b + 0.5 * c
        assert float(problem.reward(f64([a, b, c]))) == pytest.approx(expected, abs=1e-14)
    assert problem.alpha == 2.0


def test_the_linear_reward():
    """`W` is two orthonormal rows with columns scaled, the reward `0.4 a - 0.3 b` off (1, 1), temperature 1/2."""
    problem = PROBLEMS["linear-reward"]()
    rows = problem.weight / f64(1.0, 0.5, 2.0, 1.5)
    torch.testing.assert_close(rows @ rows.mT, torch.eye(2, dtype=torch.float64))
    assert problem.generate(torch.zeros(1, 4, dtype=torch.float64)).tolist() == [[1.0, 1.0]]
    rewards = problem.reward(f64([1.0, 0.0], [0.0, 1.0], [2.0, 5.0])).tolist()
    assert rewards == pytest.approx([0.4, -0.3, -0.7], abs=1e-15)
    # the tilt is exp(0.8 y_1 - 0.6 y_2) with y of mean (1, 1)
    push = f64(0.8, -0.6) @ problem.weight
    assert problem.log_z() == pytest.approx(0.2 + 0.5 * float(push @ push), abs=1e-13)
