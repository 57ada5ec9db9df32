"""The tilt's own functions, against closed forms that do not share their code."""

from __future__ import annotations

import math
from types import SimpleNamespace

import mpmath
import pytest
import torch
from torch import nn

from hnkit import InputError, NonFiniteError, noise_kl
from hnkit.internal.stats import mean_and_stderr
from hnkit.tilt import (
    affine_coefficients,
    kl_gaussians,
    log_standard_normal,
    log_z_monte_carlo,
    optimality_gap,
)
from hnkit.toy import PROBLEMS, LinearGaussian
from tests.hnkit.functions import f64


def spd(seed, d=4):
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT + 0.5 * torch.eye(d, dtype=torch.float64)


def test_log_standard_normal_against_torch_distributions():
    x = torch.randn(7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(torch.zeros(()).double(), 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(log_standard_normal(x), expected)


def test_kl_gaussians_against_torch_distributions():
    m0, m1, c0, c1 = f64(0.3, -1, 2, 0), f64(0, 0.5, 1, -1), spd(1), spd(2)
    p, q = (torch.distributions.MultivariateNormal(m, c) for m, c in ((m0, c0), (m1, c1)))
    assert kl_gaussians(m0, c0, m1, c1) == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-12)
    assert kl_gaussians(m0, c0, m0, c0) == pytest.approx(0, abs=1e-14)
    assert kl_gaussians(m0, c0, m1, c1) != pytest.approx(kl_gaussians(m1, c1, m0, c0), rel=1e-3)


@pytest.mark.parametrize("power", [20, 30, 45])
def test_kl_gaussians_does_not_cancel(power):
    variance = 1 + 2.0**-power
    with mpmath.workdps(50):
        e = mpmath.mpf(variance) - 1
        expected = float((e - mpmath.log1p(e)) / 2)
    found = kl_gaussians(f64(0.0), f64([variance]), f64(0.0), f64([1.0]))
    assert found == pytest.approx(expected, rel=1e-12)


def test_kl_of_a_degenerate_law_is_infinite():
    zero, identity = torch.zeros(2), torch.eye(2)
    assert kl_gaussians(zero, f64([1.0, 0.0], [0.0, 0.0]), zero, identity) == math.inf
    with pytest.raises(InputError, match="positive definite"):
        kl_gaussians(zero, identity, zero, f64([1.0, 0.0], [0.0, 0.0]))


def test_affine_coefficients():
    layer = nn.Linear(3, 3, dtype=torch.float64)
    K, c = affine_coefficients(layer, 3)
    torch.testing.assert_close(K, layer.weight.detach() + torch.eye(3))
    torch.testing.assert_close(c, layer.bias.detach())
    assert affine_coefficients(lambda x: layer(x) + 1e-6 * torch.sin(x), 3) is None
    assert affine_coefficients(lambda x: x * math.nan, 3) is None
    # affine at 0 and the unit vectors alone is not affine
    assert affine_coefficients(lambda x: x.square() - x.abs(), 3) is None


def quadratic_problem(alpha=0.7):
    return LinearGaussian(f64([1.0, 0.5], [0.0, 1.0]), f64([2.0, 0.3], [0.3, 1.0]), f64(1.0, -0.5), alpha=alpha)


def test_optimality_gap_of_affine_maps_is_the_gaussian_kl():
    problem = quadratic_problem()
    x = torch.randn(40_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    layer = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(f64([0.2, -0.3], [0.1, 0.25]))
    layer.bias.copy_(f64(0.4, -0.2))
    gap = optimality_gap(problem, layer, x)
    K = layer.weight + torch.eye(2)
    target = torch.distributions.MultivariateNormal(problem.mean, problem.covariance)
    law = torch.distributions.MultivariateNormal(layer.bias, K @ K.mT)
    expected = float(torch.distributions.kl_divergence(law, target))
    assert gap.value == pytest.approx(expected, abs=4.8 * gap.stderr)
    assert gap.stderr < 0.02 * expected + 0.01
    assert problem.gap_of_affine(K, layer.bias) == pytest.approx(expected, rel=1e-12)
    assert gap.kl - gap.reward / problem.alpha + problem.log_z() == pytest.approx(gap.value, rel=1e-10)
    assert gap.certified
    assert gap.kind == "gap"


def test_the_gap_depends_on_the_temperature():
    x = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    problem, other = quadratic_problem(0.7), quadratic_problem(1.4)
    f = problem.optimal_map()
    assert float(optimality_gap(problem, f, x).per_sample.abs().max()) < 1e-12
    assert optimality_gap(other, f, x).value > 0.01


def test_a_folding_map_gets_a_lower_bound_only():
    """Item g: x -> |x| sends N(0, 1) to a law with density; the formula misses log 2 of its divergence."""
    problem = PROBLEMS["one-dimensional"]()
    x = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gap = optimality_gap(problem, lambda x: x.abs() - x, x)
    assert not gap.certified
    assert gap.kind == "lower bound"
    half_normal = problem.log_z() - float((problem.reward(problem.generate(x.abs())) / problem.alpha).mean())
    assert gap.value == pytest.approx(half_normal, abs=1e-9)  # the true gap is log 2 more


def test_other_methods_are_approximations():
    problem = quadratic_problem()
    x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    gap = optimality_gap(problem, problem.optimal_map(), x, method="l2", form="stein")
    assert gap.kind == "approximation"
    assert not gap.certified
    assert abs(gap.value) > 0.01


@pytest.mark.parametrize("budget", [12, 64, 3000])
@pytest.mark.parametrize("method", ["arnoldi", "lanczos"])
def test_the_gap_under_a_budget_is_that_of_the_samples_it_pays_for(method, budget):
    """Against the Gaussian KL; at most six z-tests at 4.8 standard errors, false-alarm rate below 1e-5."""
    problem = quadratic_problem()
    x = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    layer = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(f64([0.2, -0.3], [0.1, 0.25]))
    layer.bias.copy_(f64(0.4, -0.2))
    probes = torch.Generator().manual_seed(10)
    gap = optimality_gap(problem, layer, x, method=method, budget=budget, generator=probes)
    used = len(gap.per_sample)
    assert used < len(x)
    reward = problem.reward(problem.generate(x + layer(x)))[:used]
    assert gap.reward == pytest.approx(float(reward.mean()), rel=1e-12)
    assert gap.kl - gap.reward / problem.alpha + problem.log_z() == pytest.approx(gap.value, rel=1e-9)
    if used > 20:
        K = layer.weight + torch.eye(2)
        assert abs(gap.value - problem.gap_of_affine(K, layer.bias)) < 4.8 * gap.stderr
    else:
        assert used > 1 or math.isnan(gap.stderr)


def test_the_gap_under_a_budget_keeps_rows_with_their_conditions():
    """A map with a condition for each row is asked for those of the samples that are used."""
    problem = quadratic_problem()
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(11))

    class Rows:
        def __init__(self, shift):
            self.shift = shift

        def __call__(self, x):
            return 0.1 * x + self.shift

        def select(self, index):
            return Rows(self.shift[index])

    shift = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
    gap = optimality_gap(problem, Rows(shift), x, method="arnoldi", budget=40, generator=torch.Generator())
    used = len(gap.per_sample)
    assert used < 50
    moved = 1.1 * x[:used] + shift[:used]
    assert gap.reward == pytest.approx(float(problem.reward(problem.generate(moved)).mean()))


def test_one_sample_has_no_error_bar():
    problem = quadratic_problem()
    gap = optimality_gap(problem, problem.l2_map(), torch.ones(1, 2, dtype=torch.float64))
    assert math.isnan(gap.stderr)


@pytest.mark.parametrize("shape", [(4, 3), (0, 2), (2,), ()])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(InputError, match="noise of shape"):
        optimality_gap(quadratic_problem(), lambda x: 0 * x, torch.zeros(shape, dtype=torch.float64))


def test_a_reward_that_is_not_finite_names_the_sample(monkeypatch):
    problem = quadratic_problem()
    monkeypatch.setattr(LinearGaussian, "reward", lambda self, y: torch.where(torch.arange(len(y)) == 3, math.nan, 0.0))
    monkeypatch.setattr(LinearGaussian, "log_z", lambda self: 0.0)
    with pytest.raises(NonFiniteError, match="sample 3"):
        optimality_gap(problem, lambda x: 0.1 * x, torch.zeros(5, 2, dtype=torch.float64))


def test_log_z_monte_carlo():
    problem = quadratic_problem()
    value, stderr = log_z_monte_carlo(problem, 50_000, torch.Generator().manual_seed(5))
    assert abs(value - problem.log_z()) < 4.8 * stderr
    assert 1e-4 < stderr < 0.02
    assert math.isnan(log_z_monte_carlo(problem, 1, torch.Generator())[1])
    with pytest.raises(InputError, match="0 samples"):
        log_z_monte_carlo(problem, 0, torch.Generator())
    # a reward of 2000 nats does not overflow
    huge = LinearGaussian(f64([1.0]), f64([0.0]), f64(1e-3), f64(2e6))
    assert log_z_monte_carlo(huge, 100, torch.Generator().manual_seed(6))[0] == pytest.approx(2000, rel=1e-3)


def test_affinity_is_tested_on_both_sides():
    """This map is never above the affine map that it touches at 0 and the unit vectors."""
    assert affine_coefficients(lambda x: -(torch.sin(math.pi * x).square()), 3) is None


def test_a_covariance_that_rounding_made_indefinite_is_singular():
    zero, identity = torch.zeros(2), torch.eye(2)
    assert kl_gaussians(zero, f64([1.0, 0.0], [0.0, -1e-10]), zero, identity) == math.inf


def test_an_approximate_gap_keeps_the_larger_error():
    """At the optimal map the terms of the gap cancel sample by sample and the KL's own error is larger."""
    problem = PROBLEMS["linear-gaussian"]()
    x = torch.randn(50, *problem.noise_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    f = problem.optimal_map()

    def same_probes():
        return {"method": "second-order", "form": "change-of-variables", "generator": torch.Generator().manual_seed(8)}

    gap, kl = optimality_gap(problem, f, x, **same_probes()), noise_kl(f, x, **same_probes())
    assert gap.kind == "approximation"
    assert mean_and_stderr(gap.per_sample)[1] < kl.stderr
    assert gap.stderr == kl.stderr


@pytest.mark.parametrize(("share", "affine"), [(0.98, True), (1.02, False)])
def test_the_tolerance_of_affinity_is_relative_to_the_largest_image(share, affine):
    """An affine map onto one point, of largest entry 9, that misses its mark by a constant off the unit vectors."""
    tolerance = 1e-6
    point = f64(-9.0, 0.5)

    def f(x):
        away = (x.square().sum(1) - 0.5).abs() != 0.5
        return point - x + share * tolerance * (1 + 9) * away[:, None]

    found = affine_coefficients(f, 2, tolerance=tolerance)
    assert (found is not None) == affine
    if found is not None:
        torch.testing.assert_close(found[0], torch.zeros(2, 2, dtype=torch.float64))
        torch.testing.assert_close(found[1], point)


def test_a_single_number_is_no_batch_of_noise():
    problem = SimpleNamespace(name="numbers", noise_shape=())
    with pytest.raises(InputError, match="noise of shape"):
        optimality_gap(problem, lambda x: 0 * x, torch.tensor(1.0))


def test_rewards_beyond_the_range_of_the_exponential():
    """`exp(2000)` overflows; the logarithm of its mean over the half space is `2000 + log(1/2)`."""
    problem = SimpleNamespace(
        noise_shape=(1,), alpha=0.5, generate=lambda x: x, reward=lambda y: 1000.0 * (y[:, 0] > 0).double()
    )
    value, stderr = log_z_monte_carlo(problem, 4000, torch.Generator().manual_seed(0))
    assert stderr == pytest.approx(1 / math.sqrt(4000), rel=0.1)  # of the mean of n coins, relative to the mean
    assert abs(value - 2000 - math.log(0.5)) < 4.5 * stderr  # false-alarm rate below 1e-5
