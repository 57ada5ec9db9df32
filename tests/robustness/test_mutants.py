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
from toy import PROBLEMS, Folding


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


def test_the_alternatives_of_a_low_rank_generator():
    """On the kernel p0* is N(0, 1): a shift by 1 costs 1/2, a scale c costs (c^2 - 1)/2 - log c."""
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    costs = [0.5, *((c * c - 1) / 2 - math.log(c) for c in (0.5, 2.0))]
    found = [law.kl - problem.kl_optimal() for law in problem.alternatives()]
    assert found == pytest.approx(costs, rel=1e-9)
