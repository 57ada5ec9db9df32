"""Small errors in `hnkit/tilt.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hnkit import InputError, noise_kl
from hnkit.internal.stats import mean_and_stderr
from hnkit.tilt import affine_coefficients, kl_gaussians, log_z_monte_carlo, optimality_gap
from hnkit.toy import PROBLEMS


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


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
