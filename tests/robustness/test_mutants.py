"""Small errors that no other test noticed, found by benchmarks/mutate.py: one test for each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hnkit import InputError, noise_kl
from hnkit._stats import mean_and_stderr
from hnkit.bounds import singular_value_bound, theorem7_bound
from hnkit.logdet import log_det_error, log_det_error_
from hnkit.tilt import affine_coefficients, kl_gaussians, optimality_gap
from toy import PROBLEMS


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_bounds_see_one_nan_among_many():
    with pytest.raises(InputError, match="nan"):
        theorem7_bound(3, f64(0.1, math.nan))


def test_bounds_see_one_entry_that_is_not_finite():
    A = torch.zeros(2, 3, 3)
    A[1, 0, 2] = math.inf
    with pytest.raises(InputError, match="not finite"):
        singular_value_bound(A)


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


def test_log_det_error_of_an_empty_batch():
    assert log_det_error(torch.zeros(5, 0, 3, 3)).shape == (5, 0)


@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0]])
def test_the_sign_of_a_factorisation_with_swaps(order):
    """I + A is a permutation matrix: one swap, then two."""
    identity = torch.eye(3, dtype=torch.float64)
    value, sign = log_det_error_((identity[order] - identity).clone())
    assert float(sign) == pytest.approx(float(torch.linalg.det(identity[order])))
    assert float(value) == pytest.approx(float((identity[order] - identity).trace()))


def test_no_truncation_is_not_printed():
    estimate = noise_kl(lambda x: 0.1 * x, torch.zeros(3, 2, dtype=torch.float64))
    assert "truncation" not in str(replace(estimate, bias_bound=None, bias_estimate=0.0))
    assert "truncation about 0.5" in str(replace(estimate, bias_bound=None, bias_estimate=0.5))
