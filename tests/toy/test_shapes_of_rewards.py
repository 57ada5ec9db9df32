"""The toys on rewards and generators other than the listed ones, and on bad arguments."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from scipy import stats

from hnkit import InputError
from hnkit.tilt import log_standard_normal
from hnkit.toy import Folding, HalfSpace, Mixture, OneDimensional
from hnkit.toy.numerics import derivatives, integrate, normal_cdf, solve_increasing


def grid(low, high, n=2001):
    return torch.linspace(low, high, n, dtype=torch.float64)[:, None]


def test_normal_cdf_in_the_tail():
    for x in (-37.0, -20.0, -8.0, -3.0, 0.0, 2.0, 8.0):
        expected = float(mpmath.ncdf(x))
        assert float(normal_cdf(torch.tensor(x, dtype=torch.float64))) == pytest.approx(expected, rel=1e-12)


def test_integrate_is_adaptive_and_reports_failure():
    panels = integrate(lambda x: (x - 0.3).abs().sqrt(), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64))
    expected = 2 / 3 * (0.3**1.5 + 0.7**1.5)
    assert panels.total == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="breakpoints"):
        integrate(lambda x: (x > 1 / 3).double(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    with pytest.raises(InputError, match="finite"):
        integrate(lambda x: 1 / (x * 0), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_solve_increasing_on_hard_functions():
    low = torch.tensor([0.0, -1.0, 0.0, 2.0], dtype=torch.float64)
    high = torch.tensor([1.0, 1.0, 50.0, 3.0], dtype=torch.float64)

    def function(t, rows):
        value = torch.stack([t**9 - 1e-9, torch.sign(t) * t.abs() ** (1 / 3), torch.exp(t) - 1e20, t])
        return value[rows, torch.arange(len(rows))]

    expected = torch.tensor([0.1, 0.0, math.log(1e20), 2.0], dtype=torch.float64)
    torch.testing.assert_close(solve_increasing(function, low, high), expected, rtol=1e-10, atol=1e-10)


def test_derivatives_of_functions_with_few_of_them():
    x = torch.tensor([0.5, -2.0], dtype=torch.float64)
    for function, expected in (
        (torch.sin, [x.sin(), x.cos(), -x.sin(), -x.cos()]),
        (lambda u: 3 * u, [3 * x, torch.full_like(x, 3), 0 * x, 0 * x]),
        (lambda u: torch.ones_like(u), [torch.ones_like(x), 0 * x, 0 * x, 0 * x]),
    ):
        for found, wanted in zip(derivatives(function, x, 3), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_one_dimension_with_a_quadratic_reward_is_linear_gaussian():
    problem = OneDimensional(lambda y: 2 * y - 0.75 * y.square(), alpha=0.5)
    h, b = 3.0, 4.0
    s = 1 / (1 + h)
    assert problem.log_z() == pytest.approx(0.5 * math.log(s) + 0.5 * s * b * b, abs=1e-12)
    x = grid(-8, 8)
    torch.testing.assert_close(x + problem.optimal_map()(x), s * b + math.sqrt(s) * x, rtol=0, atol=1e-11)
    torch.testing.assert_close(x + problem.l2_map()(x), s * (x + b), rtol=0, atol=1e-11)
    assert problem.l2_gap() == pytest.approx((s - 1 - math.log(s)) / 2, abs=1e-10)
    assert problem.kl_optimal() == pytest.approx((s + (s * b) ** 2 - 1 - math.log(s)) / 2, abs=1e-10)
    assert not problem.discontinuous


def test_one_dimension_with_a_linear_reward_far_away():
    problem = OneDimensional(lambda y: 20 * y)
    assert problem.log_z() == pytest.approx(200, abs=1e-9)
    x = grid(-5, 5)
    torch.testing.assert_close(x + problem.optimal_map()(x), x + 20, rtol=0, atol=1e-10)
    torch.testing.assert_close(x + problem.l2_map()(x), x + 20, rtol=0, atol=1e-10)
    assert problem.l2_gap() == pytest.approx(0, abs=1e-10)


def test_one_dimension_with_a_step_agrees_with_the_half_space():
    step = OneDimensional(lambda y: 1.2 * (y >= 0.7).double(), breakpoints=(0.7,), alpha=0.8)
    plane = HalfSpace(torch.eye(1), torch.zeros(1), torch.ones(1), 0.7, 1.2, 0.8)
    assert step.log_z() == pytest.approx(plane.log_z(), abs=1e-12)
    assert step.log_z() == pytest.approx(step.log_z_check()[0], abs=1e-9)
    assert step.kl_optimal() == pytest.approx(plane.kl_optimal(), abs=1e-11)
    x = grid(-7, 7)
    torch.testing.assert_close(step.optimal_map()(x), plane.optimal_map()(x), rtol=0, atol=1e-10)
    assert {"l2_map", "l2_gap"} <= step.unavailable
    for member in ("l2_map", "l2_gap"):
        with pytest.raises(InputError, match="break points"):
            getattr(step, member)()


def test_one_dimension_even_reward_jumps_at_the_middle():
    """Two equal modes: the L2 optimum jumps over 0, and its gap is that of brute-force quadrature."""
    problem = OneDimensional(lambda y: -2 * (y.square() - 1).square())
    T = problem.l2_map()
    with torch.no_grad():
        right, left = (float(x + T(x)) for x in (torch.tensor([[1e-9]]).double(), torch.tensor([[-1e-9]]).double()))
    assert right == pytest.approx(-left, abs=1e-7)
    assert right > 0.5
    # u solves 8u(1 - u^2) + x - u = 0 at x = 0: u^2 = 7/8
    assert right == pytest.approx(math.sqrt(7 / 8), abs=1e-7)
    u = grid(right, 3, 400_001)[:, 0]
    x, slope = u - 8 * u * (1 - u.square()), 1 - 8 + 24 * u.square()
    density = torch.exp(log_standard_normal(x[:, None])) * slope
    integrand = density * (density.clamp(min=1e-300).log() - problem.log_p0_star(u[:, None]))
    assert problem.l2_gap() == pytest.approx(2 * float(torch.trapezoid(integrand, u)), rel=1e-6)
    # by symmetry the optimal map is odd
    x = grid(0, 6)
    torch.testing.assert_close(x + problem.optimal_map()(x), -(-x + problem.optimal_map()(-x)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneDimensional(lambda y: y, torch.sinh), "inverse_function"),
        (lambda: OneDimensional(lambda y: y, breakpoints=(1.0, 0.0)), "breakpoints"),
        (lambda: OneDimensional(lambda y: y, alpha=0), "alpha"),
        (lambda: OneDimensional(lambda y: 0.6 * y.square()).log_z(), "beyond"),
        (lambda: OneDimensional(lambda y: 50 * y).log_z(), "beyond"),
        (lambda: OneDimensional(lambda y: torch.log(y)).log_z(), "NaN"),
        (lambda: OneDimensional(lambda y: (y > 0.123).double()).log_z(), "breakpoints"),
        (lambda: Folding(torch.zeros(2), torch.zeros(3)), "shapes"),
        (lambda: Folding(torch.zeros(2), -torch.ones(2)), "infinite"),
        (lambda: HalfSpace(torch.zeros(2, 2), torch.zeros(2), torch.ones(2), 0.0, 1.0), "invertible"),
        (lambda: HalfSpace(torch.eye(2), torch.zeros(2), torch.zeros(2), 0.0, 1.0), "normal"),
        (lambda: HalfSpace(torch.eye(2), torch.zeros(2), torch.ones(2), 0.0, -1.0), "height"),
        (lambda: HalfSpace(torch.eye(2), torch.zeros(2), torch.ones(2), 0.0, 1.0, alpha=1e-3), "alpha of 0.00143"),
        (lambda: Mixture(torch.ones(2), torch.zeros(2, 2, 2), torch.zeros(2, 3), torch.eye(3)), "weights"),
        (lambda: Mixture(-torch.ones(1), torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.eye(2)), "positive"),
        (lambda: Mixture(torch.ones(1), -torch.eye(2)[None], torch.zeros(1, 2), torch.eye(2)), "infinite"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_soft_thresholding_is_the_l2_optimum_of_a_repelled_fold():
    problem = Folding(torch.tensor([-0.8]), torch.tensor([0.5]), alpha=1.0)
    x = grid(-4, 4)
    expected = torch.sign(x) * torch.relu(x.abs() - 0.8) / 1.5
    torch.testing.assert_close(x + problem.l2_map()(x), expected)
    assert problem.l2_gap() == math.inf
    assert problem.log_z() == pytest.approx(problem.log_z_check()[0], abs=1e-9)


def test_folded_outputs_are_truncated_normals():
    problem = Folding(torch.tensor([1.0]), torch.tensor([1.0]), alpha=1.0)
    y = problem.sample_p_star(20_000, torch.Generator().manual_seed(0))[:, 0].numpy()
    scale = math.sqrt(0.5)
    assert stats.kstest(y, stats.truncnorm(-0.5 / scale, math.inf, loc=0.5, scale=scale).cdf).pvalue > 1e-6


def test_negative_entries_are_no_outputs_of_the_fold():
    problem = Folding(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    y = torch.tensor([[0.5, -0.1], [0.5, 0.1]], dtype=torch.float64)
    for density in (problem.log_p_base(y), problem.log_p_star(y)):
        assert float(density[0]) == -math.inf
        assert math.isfinite(float(density[1]))


def test_a_mixture_of_one_gaussian_is_linear_gaussian():
    H = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    b = torch.tensor([0.5, -1.0], dtype=torch.float64)
    problem = Mixture(torch.tensor([1.0]), H[None], b[None], torch.eye(2))
    S = torch.linalg.inv(torch.eye(2) + H)
    s = torch.linalg.eigvalsh(S)
    assert problem.log_z() == pytest.approx(0.5 * float(torch.logdet(S) + b @ S @ b), abs=1e-12)
    assert problem.l2_gap() == pytest.approx(0.5 * float((s - 1 - s.log()).sum()), abs=1e-9)
    assert problem.kl_optimal() == pytest.approx(
        0.5 * float((s - 1 - s.log()).sum() + (S @ b).square().sum()), abs=1e-11
    )
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x + problem.l2_map()(x), (x + b) @ S)
    factor = torch.linalg.cholesky(S)
    torch.testing.assert_close(x + problem.optimal_map()(x), S @ b + x @ factor.mT)


def test_a_mixture_in_three_dimensions():
    generator = torch.Generator().manual_seed(1)
    curvatures = torch.stack([torch.eye(3) * scale for scale in (0.2, 1.0, 3.0)])
    slopes = torch.randn(3, 3, generator=generator)
    problem = Mixture(torch.ones(3), curvatures, slopes, torch.eye(3))
    x = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    f = problem.optimal_map()
    point = x.clone().requires_grad_()
    y = f(point)
    J = torch.stack([torch.autograd.grad(y[:, i].sum(), point, retain_graph=True)[0] for i in range(3)], 1)
    det = torch.linalg.slogdet(J + torch.eye(3)).logabsdet
    residual = log_standard_normal(x) - problem.log_p0_star(x + y.detach()) - det
    assert float(residual.abs().max()) < 1e-9
    assert "l2_gap" in problem.unavailable
    with pytest.raises(InputError, match="l2_gap"):
        problem.l2_gap()


def test_half_space_projects_onto_the_boundary():
    problem = HalfSpace(torch.eye(2), torch.zeros(2), torch.tensor([1.0, 0.0]), 1.0, 0.5, 1.0)
    x = torch.tensor([[0.5, 0.3], [-0.5, 0.3], [1.5, 0.3], [0.01, 2.0]], dtype=torch.float64)
    T = x + problem.l2_map()(x)
    expected = torch.tensor([[1.0, 0.3], [-0.5, 0.3], [1.5, 0.3], [1.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(T, expected, rtol=0, atol=1e-11)
    assert float(problem.reward(T)[0]) == 0.5


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 1.0, 100.0])
def test_quadrature_of_the_fold_at_any_temperature(alpha):
    """Neither a weight of exp(800) nor a peak of width 0.03 is lost."""
    problem = Folding(torch.tensor([1.3, -0.4]), torch.tensor([1.0, 0.5]), alpha)
    value, error = problem.log_z_check()
    assert value == pytest.approx(problem.log_z(), rel=1e-10, abs=1e-10)
    assert error < 1e-8
