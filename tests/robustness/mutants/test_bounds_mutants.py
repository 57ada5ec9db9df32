"""Small errors in `hnkit/bounds.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest
import torch

from hnkit import InputError
from hnkit.bounds import singular_value_bound, theorem7_bound


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
