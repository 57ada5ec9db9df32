"""Derivatives of solved maps, adaptive quadrature and zeros of increasing functions, against other routes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from hnkit import InputError
from hnkit.toy.numerics import (
    antiderivative,
    derivatives,
    integrate,
    monotone_transport,
    solve_increasing,
    with_derivatives,
)
from tests.hnkit.functions import NoForwardMode, f64

# Derivatives.


def test_with_derivatives_takes_the_given_numbers_and_no_graph_of_theirs():
    x = f64(0.5, -2.0).requires_grad_()
    theta = f64(3.0).requires_grad_()
    given = (theta * x.sin(), theta * x.exp(), theta * x.cos())
    found = with_derivatives(x, *given)
    (first,) = torch.autograd.grad(found.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    for one, other in zip((found, first, second), given, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for order in (found, first):
        (part,) = torch.autograd.grad(order.sum(), theta, retain_graph=True, allow_unused=True)
        assert part is None
    assert not second.requires_grad


def test_a_function_of_its_parameters_alone_has_no_derivatives():
    theta = f64(3.0).requires_grad_()
    found = derivatives(lambda u: theta.expand_as(u), f64(0.5, -2.0), 2)
    torch.testing.assert_close(torch.stack(found), f64([3.0, 3.0], [0.0, 0.0], [0.0, 0.0]), rtol=0, atol=0)


def test_forward_mode_passes_by_the_functions_of_a_transport():
    """N(0, 1) to N(1, 4) is 1 + 2 s, whose derivative is 2."""
    s, v = f64(0.5, -2.0), f64(3.0, 1.0)

    def log_density(y):
        return -NoForwardMode.apply((y - 1) / 2) / 2 - math.log(2 * math.sqrt(2 * math.pi))

    def score(y):
        return derivatives(log_density, y, 1)[1]

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(s, v)
        found = forward_ad.unpack_dual(monotone_transport(dual, 1 + 2 * dual, log_density, score))
        slope = forward_ad.unpack_dual(score(dual))
    torch.testing.assert_close(found.primal, 1 + 2 * s)
    torch.testing.assert_close(found.tangent, 2 * v)
    torch.testing.assert_close(slope.primal, -(s - 1) / 4)
    assert slope.tangent is None


def test_antiderivative_of_a_legendre_series():
    coefficients = np.random.default_rng(0).standard_normal((6, 20))
    z = np.array([-1.0, -0.7, 0.0, 0.3, 0.99, 1.0])
    integral, value = antiderivative(torch.from_numpy(coefficients), torch.from_numpy(z))
    for k in range(6):
        series = np.polynomial.Legendre(coefficients[k])
        assert float(value[k]) == pytest.approx(series(z[k]), rel=1e-12)
        assert float(integral[k]) == pytest.approx(series.integ(lbnd=-1)(z[k]), rel=1e-12, abs=1e-14)


# Quadrature.


def by_gauss(f, low, high):
    nodes, weights = np.polynomial.legendre.leggauss(20)
    points = torch.from_numpy(0.5 * (low + high) + 0.5 * (high - low) * nodes)
    return 0.5 * (high - low) * float(np.dot(weights, f(points).numpy()))


def change(f, low, high):
    """How much halving changes the 20-point rule, and what it then gives."""
    middle = 0.5 * (low + high)
    fine = by_gauss(f, low, middle) + by_gauss(f, middle, high)
    return abs(fine - by_gauss(f, low, high)), fine


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("options", "size"),
    [({"scale": 10.0}, 10.0), ({"scale": 50.0, "floor": 0.1}, 5.0), ({"scale": 3.0, "floor": 1e-6}, None)],
)
def test_a_panel_is_halved_until_that_changes_less_than_the_tolerance(sign, options, size):
    def f(x):
        return sign * (x - 0.3).abs()

    moved, value = change(f, 0.0, 1.0)
    relative = moved / (size or abs(value))
    for factor, halved in ((1.01, False), (0.99, True)):
        panels = integrate(f, f64(0.0, 1.0), tolerance=factor * relative, **options)
        assert (panels.masses.numel() > 1) == halved
        assert panels.total == pytest.approx(sign * 0.29, rel=1e-2)


def test_the_size_of_the_whole_is_that_of_all_panels_whatever_their_signs():
    def f(x):
        return torch.where(x < 0, 1.0, -4 * (x - 0.3).abs())

    moved, value = change(f, 0.0, 1.0)
    relative = moved / (1 + abs(by_gauss(f, 0.0, 1.0)))
    assert relative < 0.6 * moved / abs(value)
    for factor, panels in ((1.01, 2), (0.99, 3)):
        assert integrate(f, f64(-1.0, 0.0, 1.0), tolerance=factor * relative).masses.numel() == panels


def test_a_negative_integrand_is_integrated_in_its_tails():
    panels = integrate(lambda x: -torch.exp(-x.square()), f64(-12.0, 0.0, 12.0), floor=1e-28)
    assert panels.total == pytest.approx(-math.sqrt(math.pi), rel=1e-13)


def test_the_error_of_a_coarse_sum_is_not_understated():
    edges = torch.arange(17, dtype=torch.float64)
    panels = integrate(lambda x: (x % 1 - 0.45).abs(), edges, tolerance=1.0)
    assert panels.masses.numel() == 16
    true = abs(panels.total - 16 * (0.45**2 + 0.55**2) / 2)
    assert true <= panels.error <= 100 * true


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(("f", "expected"), [(torch.ones_like, 1.0), (torch.exp, math.e - 1)])
def test_the_error_of_a_converged_sum_is_rounding(size, f, expected):
    panels = integrate(lambda x: size * f(x), f64(0.0, 0.5, 1.0))
    assert panels.error > 0
    assert abs(panels.total - size * expected) <= panels.error <= 1e-14 * size * expected


def test_one_panel_that_is_not_finite_is_enough():
    with pytest.raises(InputError, match="the integrand is not finite"):
        integrate(torch.sqrt, f64(-1.0, 0.0, 1.0))


def test_a_jump_is_given_up_after_thirty_halvings():
    widths = []

    def f(x):
        widths.append(float((x[:, -1] - x[:, 0]).abs().min()))
        return (x > 1 / 3).double()

    with pytest.raises(InputError, match="breakpoints"):
        integrate(f, f64(0.0, 1.0))
    assert round(math.log2(min(widths))) == -30


def test_many_panels_that_converged_are_no_reason_to_give_up():
    edges = torch.linspace(0, 1, 500_102, dtype=torch.float64)
    assert integrate(lambda x: (x > 1 / 3).double(), edges).total == pytest.approx(2 / 3, abs=1e-11)


# Zeros.


class Recorded:
    """One increasing function and where it was evaluated."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, t, rows):
        assert rows.tolist() == [0]
        self.seen.append(float(t))
        return self.function(t)

    def solve(self, low, high, **options):
        return float(solve_increasing(self, f64(low), f64(high), **options))


@pytest.mark.parametrize(("low", "high", "zero"), [(-8.0, -4.0, -4.5), (4.0, 8.0, 4.5), (-3.0, 1.0, 0.75)])
def test_a_linear_equation_is_solved_wherever_its_bracket_is(low, high, zero):
    assert Recorded(lambda t: 2 * (t - zero)).solve(low, high) == pytest.approx(zero, rel=1e-15)


@pytest.mark.parametrize("zero", [-1000.0, -1.0, 0.0, 0.7, 1000.0])
def test_a_zero_is_found_to_rounding_and_quickly(zero):
    f = Recorded(lambda t: torch.expm1(t - zero))
    assert f.solve(zero - 2.0, zero + 2.7) == pytest.approx(zero, rel=1e-15, abs=2e-15)
    assert len(f.seen) <= 20


def test_a_multiple_zero_is_found():
    f = Recorded(lambda t: (t - 0.3) ** 9)
    assert f.solve(0.0, 1.0) == pytest.approx(0.3, abs=1e-12)
    assert len(f.seen) < 150


@pytest.mark.parametrize("zero", [math.sqrt(2), -math.sqrt(2)])
def test_the_tolerance_is_that_of_the_zero(zero):
    found = Recorded(lambda t: (t - zero) ** 3).solve(zero - 0.3, zero + 0.7, tolerance=1.3e-3)
    assert abs(found - zero) <= 2 * 1.3e-3 * (1 + abs(zero))


@pytest.mark.parametrize("side", [1, -1])
def test_a_zero_beyond_the_bracket_is_its_end_and_nothing_beyond_is_evaluated(side):
    f = Recorded(lambda t: -side * torch.expm1(3.1 - side * t))
    low, high = sorted((2.0 * side, 3.0 * side))
    assert f.solve(low, high) == 3.0 * side
    assert all(low <= t <= high for t in f.seen)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0)])
def test_a_zero_that_is_hit_is_returned_also_where_the_slope_vanishes(low, high):
    assert Recorded(lambda t: t**3).solve(low, high) == pytest.approx(0.0, abs=1e-15)


def test_every_row_has_a_function_of_its_own_and_no_gradient_passes():
    zeros = torch.linspace(-3, 3, 50, dtype=torch.float64).requires_grad_()
    found = solve_increasing(lambda t, rows: torch.sinh(t - zeros[rows]), zeros - 1, zeros + 2)
    assert not found.requires_grad
    torch.testing.assert_close(found, zeros.detach(), rtol=1e-14, atol=1e-14)
