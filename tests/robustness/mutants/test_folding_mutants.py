"""Small errors in `toy/folding.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest
import torch

from toy import PROBLEMS, Folding


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


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
