"""Small errors in `hnkit/tilt.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import torch

from hnkit import noise_kl
from hnkit._stats import mean_and_stderr
from hnkit.tilt import affine_coefficients, kl_gaussians, optimality_gap
from toy import PROBLEMS


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
