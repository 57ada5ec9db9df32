"""Small errors in `toy/linear_gaussian.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest

from toy import PROBLEMS


def test_the_alternatives_of_a_low_rank_generator():
    """On the kernel p0* is N(0, 1): a shift by 1 costs 1/2, a scale c costs (c^2 - 1)/2 - log c."""
    problem = PROBLEMS["linear-gaussian-low-rank"]()
    costs = [0.5, *((c * c - 1) / 2 - math.log(c) for c in (0.5, 2.0))]
    found = [law.kl - problem.kl_optimal() for law in problem.alternatives()]
    assert found == pytest.approx(costs, rel=1e-9)
