"""The fold: its rivals, its branches and its quadrature, against closed forms and high precision."""

from __future__ import annotations

import itertools
import math
import sys

import mpmath
import pytest
import torch

from hnkit import InputError
from hnkit.toy import PROBLEMS, Folding
from tests.hnkit.functions import f64


def test_the_alternatives_of_folding_have_the_entropy_of_their_signs():
    """KL to p0* is that of the signs to independent fair ones, summed over the sign patterns."""
    problem = PROBLEMS["folding"]()
    assert problem.dim == 2
    patterns = {
        "folded": [1.0, 0.0, 0.0, 0.0],
        "first sign": [0.45, 0.45, 0.05, 0.05],
        "all signs": [0.5, 0.0, 0.0, 0.5],
    }
    laws = problem.alternatives()
    assert len(laws) == len(patterns)
    for law, (name, shares) in zip(laws, patterns.items(), strict=True):
        assert law.name.startswith(name)
        excess = sum(share * math.log(4 * share) for share in shares if share)
        assert law.kl - problem.kl_optimal() == pytest.approx(excess, rel=1e-12)


def test_one_entry_pulled_to_the_fold_makes_the_gap_infinite():
    assert Folding(f64(0.6, -0.3), f64(0.25, 1.0), 0.5).l2_gap() == math.inf


@pytest.mark.parametrize("law", ["log_p_base", "log_p_star"])
def test_the_density_of_folding_is_continuous_at_the_fold(law):
    problem = PROBLEMS["folding"]()
    at, near, off = (getattr(problem, law)(f64([value, 0.5])) for value in (0.0, 1e-9, -1e-9))
    torch.testing.assert_close(at, near, rtol=1e-7, atol=1e-7)
    assert float(off) == -math.inf


def one(slope, curvature, alpha=1.0):
    return Folding(f64(slope), f64(curvature), alpha)


def exact_log_z(b, h):
    """Quadrature of `2 exp(b x - (1 + h) x^2/2)` over the half-line, scaled by its largest value."""
    with mpmath.workdps(30):
        s = 1 / (1 + mpmath.mpf(h))
        peak, width = max(mpmath.mpf(0), s * b), mpmath.sqrt(s)

        def exponent(x):
            return b * x - x * x / (2 * s)

        width = min(width, 1 / abs(mpmath.mpf(b))) if b < 0 else width
        cuts = sorted(
            {mpmath.mpf(0), peak, *(peak + k * width for k in (-8, -2, 2, 8, 20, 80) if peak + k * width > 0)}
        )
        total = mpmath.quad(lambda x: mpmath.exp(exponent(x) - exponent(peak)), cuts)
        return float(exponent(peak) + mpmath.log(2 * total / mpmath.sqrt(2 * mpmath.pi)))


def test_one_curvature_that_is_too_negative_is_refused():
    with pytest.raises(InputError, match="infinite"):
        Folding(f64(0.1, 0.2), f64(1.0, -1.0), 0.5)


@pytest.mark.parametrize(
    ("b", "h"),
    [
        (30.0, 0.0),
        (-30.0, 0.0),
        (0.0, -0.99),
        (1.0, -0.99),
        (14.0, -0.75),
        (60.0, 3.0),
        (60.0, 0.0),
        (400.0, 3.0),
        (0.6, 0.25),
        (-50.0, 0.0),
        (-2.0, 24.0),
    ],
)
def test_log_z_and_its_quadrature_at_narrow_wide_and_far_laws(b, h):
    problem = one(b, h)
    exact = exact_log_z(b, h)
    value, error = problem.log_z_check()
    assert problem.log_z() == pytest.approx(exact, rel=1e-13, abs=1e-13)
    assert abs(value - exact) <= error + 1e-14 * abs(exact)
    assert 0 < error < 3e-11


@pytest.mark.parametrize(("b", "h"), [(0.6, 0.25), (3.0, 0.0), (-0.6, 0.25), (0.2, 99.0)])
def test_no_range_of_the_quadrature_has_the_fold_or_a_mode_inside(b, h, monkeypatch):
    """The ranges follow one another; the tilted density has its modes at `+-b/(1 + h)` if `b > 0`."""
    ranges = []
    monkeypatch.setattr(
        sys.modules[Folding.__module__], "quad", lambda _, low, high, **__: ranges.append((low, high)) or (1.0, 0.0)
    )
    one(b, h).log_z_check()
    ranges.sort()
    for point in (0.0, b / (1 + h), -b / (1 + h)) if b > 0 else (0.0,):
        assert not any(low + 1e-12 < point < high - 1e-12 for low, high in ranges)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))


@pytest.mark.parametrize("claimed", [0.0, 1e-3])
def test_the_error_of_log_z_is_that_of_each_integral_over_its_value(claimed, monkeypatch):
    """Every range has the integral 4 with the error `claimed`; an error of 0 is not believed; the entries add up."""
    monkeypatch.setattr(sys.modules[Folding.__module__], "quad", lambda *_, **__: (4.0, claimed))
    _, error = Folding(f64(0.6, -0.3, 0.2), f64(0.25, 1.0, 0.0), 1.0).log_z_check()
    assert error == pytest.approx(3 * claimed / 4, rel=1e-9, abs=1e-12)
    assert error > 3 * claimed / 4


@pytest.mark.parametrize(("b", "h"), [(0.6, 0.25), (-1.5, 0.5), (8.5, 0.0), (-6.0, 2.0)])
def test_the_optimal_map_has_the_tail_masses_of_a_truncated_normal(b, h):
    """`2 Phi(-x) Phi(b sqrt(s)) = Phi(-(T - s b)/sqrt(s))` for `x > 0`, near the fold and far out, solved by mpmath."""
    problem = one(b, h)
    points = [1e-12, 1e-6, 0.01, 0.3, 1.0, 3.0, 6.0, 8.0]
    expected = []
    with mpmath.workdps(60):
        s = 1 / (1 + mpmath.mpf(h))
        kept, cut = mpmath.ncdf(b * mpmath.sqrt(s)), mpmath.ncdf(-b * mpmath.sqrt(s))
        for x in points:
            level = cut + kept * mpmath.erf(mpmath.mpf(x) / mpmath.sqrt(2))
            root = mpmath.findroot(
                lambda z, level=level: mpmath.log(mpmath.ncdf(z) / level) - mpmath.log(mpmath.ncdf(-z) / (1 - level)),
                (-12, 12), solver="anderson", tol=1e-40,
            )  # fmt: skip
            expected.append(float(s * b + mpmath.sqrt(s) * root))
    x = f64(*points)[:, None]
    with torch.no_grad():
        T = (x + problem.optimal_map()(x))[:, 0].tolist()
        mirrored = (-x + problem.optimal_map()(-x))[:, 0].tolist()
    assert pytest.approx(expected, rel=1e-9, abs=1e-15) == T
    assert mirrored == [-value for value in T]


@pytest.mark.parametrize(("b", "h"), [(0.6, 0.25), (-1.5, 0.5), (0.0, 0.0)])
def test_the_optimal_map_is_finite_at_the_fold(b, h):
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    T = x + one(b, h).optimal_map()(x)
    assert T.item() == pytest.approx(0, abs=1e-15)
    (slope,) = torch.autograd.grad(T.sum(), x, create_graph=True)
    # p0(0)/p*(0): the density of the tilted law at 0 is p0(0)/Z*
    assert slope.item() == pytest.approx(math.exp(exact_log_z(b, h)), rel=1e-12)
    assert bool(torch.isfinite(torch.autograd.grad(slope.sum(), x)[0]).all())


def test_without_slope_the_gap_is_that_of_the_scale():
    """`b = 0`: the tilted law is `N(0, s)`, the L2 optimum scales by `s`."""
    s = 1 / 1.5
    assert one(0.0, 0.5).l2_gap() == pytest.approx((s - 1 - math.log(s)) / 2, abs=1e-15)


def test_one_sample_is_a_sample():
    assert PROBLEMS["folding"]().sample_p0_star(1, torch.Generator().manual_seed(0)).shape == (1, 2)


def test_the_alternatives_have_the_signs_they_name():
    """20000 samples: shares within 0.02, 4.8 standard errors or more."""
    n = 20_000
    folded, biased, equal = (
        law.sample(n, torch.Generator().manual_seed(seed)).sign()
        for seed, law in enumerate(PROBLEMS["folding"]().alternatives())
    )
    assert folded.mean(0).tolist() == [1.0, 1.0]
    assert (biased > 0).double().mean(0).tolist() == pytest.approx([0.9, 0.5], abs=0.02)
    assert (biased[:, 0] == biased[:, 1]).double().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(equal[:, 0], equal[:, 1])
    assert (equal > 0).double().mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_one_entry_has_two_alternatives():
    laws = one(0.6, 0.25).alternatives()
    assert [law.name.split()[0] for law in laws] == ["folded", "first"]
    for law in laws:
        x = law.sample(20_000, torch.Generator().manual_seed(0))
        assert float((x > 0).double().mean()) == pytest.approx(
            {"folded": 1.0, "first": 0.9}[law.name.split()[0]], abs=0.02
        )


def test_the_default_problem():
    """Two entries, rewards `0.6 y - y^2/8` and `0.3 y - y^2/2`, both pushed away from the fold; temperature 1/2."""
    problem = PROBLEMS["folding"]()
    y = f64([1.0, 0.0], [0.0, 1.0], [2.0, 3.0])
    expected = [0.6 - 0.125, 0.3 - 0.5, 1.2 - 0.5 + 0.9 - 4.5]
    assert problem.reward(y).tolist() == pytest.approx(expected, abs=1e-6)
    assert problem.log_z() == pytest.approx(exact_log_z(1.2, 0.5) + exact_log_z(0.6, 2.0), abs=1e-6)
