"""One-dimensional rewards: windows, quadrature, transport, jumps and the L2 optimum, against other routes."""

from __future__ import annotations

import math
import sys

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import ConvexHull

from hnkit import InputError
from hnkit.toy import PROBLEMS, OneDimensional

MODULE = sys.modules[OneDimensional.__module__]


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def step(height, at, rising):
    """The reward `height` on one side of the break point `at`, 0 on the other."""
    return OneDimensional(lambda y: height * ((y >= at) == rising).double(), breakpoints=(at,))


def truncation(at, rising):
    """A reward of 0 on one side of `at`, minus infinity on the other: the tilted law is a truncated normal."""
    sign = 1 if rising else -1
    return OneDimensional(lambda y: torch.where(sign * y >= sign * at, 0.0, -math.inf).double(), breakpoints=(at,))


# The window and the quadrature.


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tilted_law_that_reaches_40_within_60_nats_of_its_peak_is_refused(sign):
    """Under a linear reward the law is N(slope, 1), and 60 nats below its peak is 10.954 off it."""
    for slope in (29.0, 29.04):
        problem = OneDimensional(lambda y, slope=slope: sign * slope * y)
        assert problem.log_z() == pytest.approx(0.5 * slope**2, rel=1e-12)
    with pytest.raises(InputError, match="beyond"):
        OneDimensional(lambda y: sign * 29.06 * y).log_z()


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("at", [0.005, -1.2342, 2.0071])
def test_the_window_holds_all_that_a_high_step_leaves(at, rising):
    """The step is over 60 nats high and may lie between two points of the grid."""
    with mpmath.workdps(50):
        low, high = mpmath.ncdf(-mpmath.mpf(at)), mpmath.ncdf(mpmath.mpf(at))
        exact = float(mpmath.log(low * mpmath.exp(70) + high if rising else low + high * mpmath.exp(70)))
    problem = step(70.0, at, rising)
    assert problem.log_z() == pytest.approx(exact, rel=1e-14)
    assert problem.log_z_check()[0] == pytest.approx(exact, rel=1e-13)


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("at", [0.7, -0.505])
def test_a_reward_of_minus_infinity_truncates_the_normal_law(at, rising):
    problem = truncation(at, rising)
    law = stats.truncnorm(at, math.inf) if rising else stats.truncnorm(-math.inf, at)
    assert problem.log_z() == pytest.approx(float(stats.norm.logsf(at) if rising else stats.norm.logcdf(at)), abs=1e-13)
    x = column(-5.0, -1.0, 0.0, 0.69, 0.71, 2.0, 6.0)
    assert problem.log_p0_star(x).numpy() == pytest.approx(law.logpdf(x[:, 0].numpy()), abs=1e-12)
    s = column(*np.linspace(-7, 7, 29))
    with torch.no_grad():
        T = (s + problem.optimal_map()(s))[:, 0].numpy()
    p = stats.norm
    quantile = p.isf(p.sf(at) * p.sf(s[:, 0])) if rising else p.ppf(p.cdf(at) * p.cdf(s[:, 0]))
    assert pytest.approx(quantile, abs=1e-9) == T


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("at", [0.3077, -0.505])
def test_the_optimal_map_stays_in_the_support_where_the_normal_tail_underflows(at, rising):
    """`Phi(-39)` is 0 in float64; from there on the map gives the end of the support, not a point outside."""
    f = truncation(at, rising).optimal_map()
    s = column(39.0, 40.0, 100.0) * (-1 if rising else 1)
    T = s + f(s)
    assert T[:, 0].tolist() == pytest.approx([at] * 3, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_optimal_map_is_a_translation_to_the_ends_of_the_window(shift):
    """The window of N(shift, 1) ends 10.96 from its middle; the mass beyond moves the last quantiles by under 0.03."""
    problem = OneDimensional(lambda y: shift * y)
    s = column(*np.linspace(-10.85, 10.85, 311))
    with torch.no_grad():
        moved = problem.optimal_map()(s)
    assert float((moved - shift).abs().max()) < 0.03
    assert float((moved - shift)[s.abs() < 10].abs().max()) < 1e-5
    assert float((moved - shift)[s.abs() < 8].abs().max()) < 1e-11


def test_the_check_of_log_z_splits_its_range_at_the_break_points():
    problem = OneDimensional(
        lambda y: 1.3 * (y >= 0.7).double() - 2.1 * (y >= math.sqrt(2)).double() + 0.4 * (y >= -math.pi / 3).double(),
        breakpoints=(-math.pi / 3, 0.7, math.sqrt(2)),
    )
    cdf = stats.norm.cdf([-math.pi / 3, 0.7, math.sqrt(2)])
    exact = math.log(cdf[0] + math.exp(0.4) * (cdf[1] - cdf[0]) + math.exp(1.7) * (cdf[2] - cdf[1])
                     + math.exp(-0.4) * (1 - cdf[2]))  # fmt: skip
    value, error = problem.log_z_check()
    assert value == pytest.approx(exact, abs=1e-13)
    assert abs(value - exact) < error < 1e-10
    assert problem.log_z() == pytest.approx(exact, abs=1e-14)


@pytest.mark.parametrize("claimed", [0.0, 1e-3])
def test_the_error_of_log_z_is_that_of_the_integral_over_its_value(claimed, monkeypatch):
    """Two integrals of 4 with the error `claimed` each; an error of 0 is not believed."""
    problem = step(1.0, 0.3, rising=True)
    monkeypatch.setattr(MODULE, "quad", lambda *_, **__: (4.0, claimed))
    _, error = problem.log_z_check()
    assert error == pytest.approx(claimed / 4, rel=1e-9, abs=1e-12)
    assert error > claimed / 4


def test_densities_of_the_outputs_of_asinh():
    """`y = asinh(x)` has the base density `p0(sinh y) cosh y`."""
    problem = PROBLEMS["one-dimensional"]()
    y = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)
    values = y.numpy()
    base = stats.norm.logpdf(np.sinh(values)) + np.log(np.cosh(values))
    assert problem.log_p_base(y[:, None]).numpy() == pytest.approx(base, abs=1e-12)
    tilted = base + 0.5 * np.cos(4 * values - 1) / 0.4
    fine = np.linspace(-3, 3, 60_001)
    weight = np.exp(stats.norm.logpdf(np.sinh(fine)) + 0.5 * np.cos(4 * fine - 1) / 0.4) * np.cosh(fine)
    tilted -= math.log(np.trapezoid(weight, fine))
    assert problem.log_p_star(y[:, None]).numpy() == pytest.approx(tilted, abs=1e-9)


def test_the_default_is_the_problem_its_formula_states():
    """Reward `cos(4y - 1)/2`, and three modes of the tilted law at its temperature."""
    problem = PROBLEMS["one-dimensional"]()
    y = [-1.3, -0.2, 0.0, 0.25, 0.9, 2.0]
    assert problem.reward(column(*y)).tolist() == pytest.approx([0.5 * math.cos(4 * v - 1) for v in y], abs=1e-15)
    assert problem.generate(column(*y))[:, 0].tolist() == pytest.approx([math.asinh(v) for v in y], abs=1e-15)
    assert "alpha = 0.4" in problem.statement
    density = problem.log_p0_star(torch.linspace(-6, 6, 1201, dtype=torch.float64)[:, None])
    rises = density[1:] > density[:-1]
    assert int((rises[:-1] & ~rises[1:]).sum()) == 3


# The L2 optimum.


def two_wells(tilt, centre, mirrored):
    """`psi(u) = 3 v^4 - 2 v^2 + v^3 / 4 + tilt v + a constant`, `v` from `centre`, mirrored or not: two wells."""
    sign = -1.0 if mirrored else 1.0

    def psi(u):
        v = sign * (u - centre)
        return 3 * v**4 - 2 * v**2 + 0.25 * v**3 + tilt * v

    return OneDimensional(lambda y: 0.5 * y.square() - psi(y)), sign


def tangent(tilt):
    """Slope and the two points of the double tangent of the polynomial above, by mpmath."""

    def equations(a, b, slope):
        def psi(v):
            return 3 * v**4 - 2 * v**2 + mpmath.mpf("0.25") * v**3 + tilt * v

        return [mpmath.diff(psi, a) - slope, mpmath.diff(psi, b) - slope, psi(b) - psi(a) - slope * (b - a)]

    a, b, slope = mpmath.findroot(equations, (-0.62, 0.57, tilt))
    return float(a), float(b), float(slope)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("centre", [0.0, 0.0013, 0.0024, 0.0047, -0.0061, 0.0089])
@pytest.mark.parametrize("tilt", [0.3, -0.7])
def test_the_l2_optimum_jumps_at_the_double_tangent(tilt, centre, mirrored):
    """It jumps from one point of the double tangent to the other exactly where x is the slope of that tangent."""
    problem, sign = two_wells(tilt, centre, mirrored)
    a, b, slope = tangent(tilt)
    jump = sign * slope
    ends = sorted((centre + sign * a, centre + sign * b))
    x = column(jump - 1e-3, jump - 1e-9, jump + 1e-9, jump + 1e-3)
    with torch.no_grad():
        u = (x + problem.l2_map()(x))[:, 0].tolist()
    assert problem.discontinuous == frozenset({"l2_map"})
    assert u[1:3] == pytest.approx(ends, abs=1e-9)
    for point, here in ((x[0], u[0]), (x[3], u[3])):
        v = sign * (here - centre)
        assert sign * (12 * v**3 - 4 * v + 0.75 * v**2 + tilt) == pytest.approx(float(point), abs=1e-10)
    assert u[0] < u[1] < u[2] < u[3]


def test_both_ends_of_a_jump_are_exact_where_one_starts_exact():
    """`psi = (v - a)^2 (v - b)^2 (1 + 1e6 (v - b)^2) >= 0` touches 0 at `a = -1`, on the grid, and at `b`."""
    a, b = -1.0, 1.0052
    problem = OneDimensional(
        lambda y: 0.5 * y.square() - ((y - a) * (y - b)).square() * (1 + 1e6 * (y - b).square()),
    )
    x = column(-1e-13, 1e-13)
    with torch.no_grad():
        u = (x + problem.l2_map()(x))[:, 0].tolist()
    assert u == pytest.approx([a, b], abs=1e-11)


@pytest.mark.parametrize("centre", [0.003, -0.0041, 0.0])
def test_a_branch_of_one_grid_point_has_both_its_jumps(centre):
    """`psi = u^2/2 - 8 exp(-(u - m)^2/(2 0.05^2))`: a sharp well in a parabola, and a jump on either side of it."""

    def psi(u):
        return u * u / 2 - 8 * mpmath.exp(-((u - centre) ** 2) / (2 * mpmath.mpf("0.05") ** 2))

    problem = OneDimensional(lambda y: 8 * torch.exp(-(y - centre).square() / (2 * 0.05**2)))
    for sign in (-1, 1):
        # off the well psi is u^2/2: the tangent of slope f touches it at f, and the well at e
        e, f = mpmath.findroot(
            lambda e, f: [mpmath.diff(psi, e) - f, psi(e) + f * (f - e) - f * f / 2], (centre + 0.001 * sign, 4 * sign)
        )
        f = float(f)
        x = column(f - 1e-9, f + 1e-9)
        with torch.no_grad():
            u = (x + problem.l2_map()(x))[:, 0].tolist()
        assert u == pytest.approx(sorted((float(e), f)), abs=1e-8)


def test_a_jump_over_less_than_two_steps_of_the_grid_is_found():
    """`psi = 100 u^4 - 0.0162 u^2`: the double tangent touches at +-0.009."""
    problem = OneDimensional(lambda y: 0.5 * y.square() - 100 * y**4 + 0.0162 * y.square())
    assert problem.discontinuous == frozenset({"l2_map"})
    x = column(-1e-9, 1e-9)
    with torch.no_grad():
        u = (x + problem.l2_map()(x))[:, 0].tolist()
    assert u == pytest.approx([-0.009, 0.009], abs=1e-7)


@pytest.mark.parametrize("x", [(0.0, 1.0, 45.0), (-45.0, 0.0, 1.0), (45.0,), (-45.0,)])
def test_an_l2_optimum_beyond_40_is_refused_whatever_else_is_asked(x):
    problem = OneDimensional(lambda y: 0.3 * y)
    with pytest.raises(InputError, match="leaves"):
        problem.l2_map()(column(*x))


def test_the_l2_gap_of_a_convex_reward():
    """`r = y^2 / 4` stretches the law: `s = 2`, `psi'' = 1/2`, and the gap is `(s - 1 - log s)/2`."""
    problem = OneDimensional(lambda y: 0.25 * y.square())
    assert problem.l2_gap() == pytest.approx((1 - math.log(2)) / 2, abs=1e-10)


def test_the_grid_has_the_spacing_that_the_brackets_rely_on():
    grid = OneDimensional(lambda y: y)._grid
    assert grid[[0, -1]].tolist() == [-40.0, 40.0]
    assert grid.diff().numpy() == pytest.approx(0.01, abs=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_lower_hull(seed):
    """The lower half of SciPy's (Qhull's) hull, for values of either bend at the ends."""
    generator = np.random.default_rng(seed)
    x = np.sort(generator.uniform(-1, 1, 40))
    y = generator.normal(size=40) + (3 * x**2 if seed % 2 else -3 * x**2)
    hull = ConvexHull(np.column_stack([x, y]))
    below = hull.simplices[hull.equations[:, 1] < 0]  # edges with an outer normal that points down
    assert MODULE._lower_hull(x, y) == sorted({int(i) for i in below.ravel()})


def test_lower_hull_by_hand():
    assert MODULE._lower_hull(np.arange(4.0), np.array([0.0, 5.0, 1.0, 0.0])) == [0, 3]
    assert MODULE._lower_hull(np.arange(4.0), np.array([0.0, -1.0, 0.0, 3.0])) == [0, 1, 2, 3]
    assert MODULE._lower_hull(np.arange(3.0), np.array([0.0, 0.0, -1.0])) == [0, 2]
