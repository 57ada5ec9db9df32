"""The half-space: tails, thresholds and heights, against high precision."""

from __future__ import annotations

import math
import sys

import mpmath
import pytest
import torch

from hnkit import InputError
from hnkit.toy import PROBLEMS, HalfSpace


def line(threshold, height, alpha=1.0):
    """The reward `height` on `x >= threshold`, one dimension, `y = x`."""
    return HalfSpace(torch.eye(1), torch.zeros(1), torch.ones(1), threshold, height, alpha)


def exact_log_z(threshold, exponent):
    with mpmath.workdps(40):
        return float(mpmath.log(mpmath.ncdf(threshold) + mpmath.exp(exponent) * mpmath.ncdf(-mpmath.mpf(threshold))))


@pytest.mark.parametrize("height", [0.0, -1.0, math.inf, math.nan])
def test_a_height_that_is_not_positive_and_finite_is_refused(height):
    with pytest.raises(InputError, match="height"):
        line(0.5, height)


def test_a_tilt_of_up_to_700_nats_is_accepted():
    assert line(0.0, 350.0, 0.5).log_z() == pytest.approx(700 - math.log(2), rel=1e-15)
    with pytest.raises(InputError, match="overflows"):
        line(0.0, 350.1, 0.5)


def test_the_reward_is_finite_where_the_coordinate_across_the_boundary_is_0():
    y = torch.tensor([[0.0], [0.5], [2.0]], dtype=torch.float64)
    assert line(1.0, 1.2).reward(y).tolist() == [0.0, 0.0, 1.2]


@pytest.mark.parametrize(
    ("threshold", "height"),
    [(0.3, 30.0), (0.3, 0.01), (-3.0, 1.0), (-20.0, 2.0), (5.0, 10.0), (11.5, 80.0), (12.5, 80.0), (25.0, 320.0)],
)
def test_the_quadrature_of_log_z_holds_its_error_wherever_the_boundary_is(threshold, height):
    value, error = line(threshold, height).log_z_check()
    exact = exact_log_z(threshold, height)
    assert line(threshold, height).log_z() == pytest.approx(exact, rel=1e-13, abs=1e-13)
    assert abs(value - exact) <= error + 1e-15 * abs(exact)
    assert 0 < error < 2e-11


@pytest.mark.parametrize("threshold", [-20.0, -3.0, 0.3, 5.0, 11.5, 25.0])
def test_no_range_of_the_quadrature_has_the_boundary_inside(threshold, monkeypatch):
    ranges = []
    monkeypatch.setattr(
        sys.modules[HalfSpace.__module__], "quad", lambda _, low, high, **__: ranges.append((low, high)) or (1.0, 0.0)
    )
    line(threshold, 1.0).log_z_check()
    assert not any(low < threshold < high for low, high in ranges)
    assert all(low <= high for low, high in ranges)


@pytest.mark.parametrize("claimed", [0.0, 1e-3])
def test_the_error_of_log_z_is_that_of_the_integral_over_its_value(claimed, monkeypatch):
    """Two integrals of 4 with the error `claimed` each; an error of 0 is not believed."""
    monkeypatch.setattr(sys.modules[HalfSpace.__module__], "quad", lambda *_, **__: (4.0, claimed))
    value, error = line(0.3, 1.0).log_z_check()
    assert value == math.log(8)
    assert error == pytest.approx(claimed / 4, rel=1e-9, abs=1e-12)
    assert error > claimed / 4


@pytest.mark.parametrize("threshold", [-5.0, 3.0, 3000.0])
def test_points_that_the_l2_map_moves_get_the_reward(threshold):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.tensor([[1.0, 0.3, 0.0], [-0.2, 0.8, 0.1], [0.0, 0.4, 1.2]], dtype=torch.float64)
    normal = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    offset = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64)
    problem = HalfSpace(matrix, offset, normal, threshold, 1.2, 0.8)
    pulled = matrix.mT @ normal
    t = (threshold - float(normal @ offset)) / float(pulled.norm())
    x = torch.randn(400, 3, dtype=torch.float64, generator=generator)
    across = pulled / pulled.norm()
    inside_strip = t - math.sqrt(3.0) * torch.rand(400, dtype=torch.float64, generator=generator)
    x = x + (inside_strip - x @ across)[:, None] * across
    moved = x + problem.l2_map()(x)
    assert problem.reward(problem.generate(x)).tolist() == [0.0] * 400
    assert problem.reward(problem.generate(moved)).tolist() == [1.2] * 400
    assert float((moved @ across - t).abs().max()) < 1e-11 * (1 + abs(t))


@pytest.mark.parametrize(
    ("threshold", "height"),
    [
        (0.84, 1.5),
        (-3.0, 4.0),
        (-6.0, 1.0),
        (5.0, 10.0),
        (8.0, 1.0),
        (12.0, 1.0),
        (25.0, 5.0),
        (-8.0, 9.0),
        (9.0, 30.0),
    ],
)
def test_the_optimal_map_has_the_tilted_quantiles_in_both_tails(threshold, height):
    """`F*(T) = Phi(s)` at alpha = 1/2, solved with 250 digits, on either side of the boundary."""
    points = [-12.0, -8.0, -3.0, -0.5, 0.0, 0.4, 1.0, 3.0, 5.5, 7.0, 8.5, 10.0, 13.0, 20.0]
    with mpmath.workdps(250):
        t, weight = mpmath.mpf(threshold), mpmath.exp(mpmath.mpf(height))
        z = mpmath.ncdf(t) + weight * mpmath.ncdf(-t)
        expected = []
        for point in points:
            lower = mpmath.ncdf(point)
            inside = z * lower < mpmath.ncdf(t)
            level = z * lower if inside else 1 - z / weight * (1 - lower)
            expected.append(float(mpmath.sqrt(2) * mpmath.erfinv(2 * level - 1)))
    s = torch.tensor(points, dtype=torch.float64)[:, None]
    T = s + line(threshold, 0.5 * height, alpha=0.5).optimal_map()(s)
    assert T[:, 0].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_points_on_the_boundary_stay():
    x = torch.tensor([[0.5], [0.5 + 1e-9]], dtype=torch.float64)
    assert line(0.5, 1.0).l2_map()(x).tolist() == [[0.0], [0.0]]


def test_the_default_has_its_boundary_at_the_stated_place():
    """With `M'n = (0.6, 1.5, -1)`, of length 1.9, `n.m = -0.6` and threshold 1: `t = 1.6/1.9`; `c/alpha = 1.2/0.8`.

    The entries are float32 numbers, so all of this holds to 1e-7.
    """
    problem = PROBLEMS["half-space"]()
    t = 1.6 / 1.9
    assert problem.log_z() == pytest.approx(exact_log_z(t, 1.5), abs=1e-7)
    across = torch.tensor([[0.6, 1.5, -1.0]], dtype=torch.float64) / 1.9
    below, above = (float(problem.reward(problem.generate((t + step) * across))) for step in (-1e-6, 1e-6))
    assert (below, above) == (0.0, pytest.approx(1.2))
    # along the boundary nothing changes: two directions orthogonal to (0.6, 1.5, -1)
    x = torch.tensor([[5.0, -2.0, 0.0], [0.0, 2.0, 3.0]], dtype=torch.float64)
    expected = -0.5 * x.square().sum(1) - 1.5 * math.log(2 * math.pi) - exact_log_z(t, 1.5)
    torch.testing.assert_close(problem.log_p0_star(x), expected, rtol=0, atol=1e-6)
    # det M = 1 (0.96 - 0.04) + 0.2 (0.36) = 0.992
    y = torch.tensor([[0.1, -0.2, 0.3]], dtype=torch.float64)
    assert float(problem.log_p_base(y)) == pytest.approx(-1.5 * math.log(2 * math.pi) - math.log(0.992), abs=1e-7)
