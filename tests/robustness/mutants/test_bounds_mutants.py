"""Small errors in `hnkit/bounds.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest
import torch

from hnkit import InputError
from hnkit.bounds import (
    field_of_values_bounds,
    frobenius_bound,
    leading_singular_value_bound,
    local_theorem7_bound,
    second_order_remainder_bound,
    singular_value_bound,
    theorem7_bound,
)


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


def test_bounds_name_the_place_of_a_nan_among_many_batches():
    A = torch.zeros(2, 5, 3, 3)
    A[1, 4, 2, 0] = math.nan
    with pytest.raises(InputError, match=r"A \(entry \(1, 4\)\)"):
        singular_value_bound(A)


def test_bounds_of_one_dimension_are_the_scalar_function():
    h = -math.log(0.6) - 0.4
    assert theorem7_bound(1, 0.4) == pytest.approx(h, rel=1e-14)
    assert local_theorem7_bound(1, f64(0.4)).tolist() == pytest.approx([h], rel=1e-14)
    assert singular_value_bound(f64([-0.4])).item() == pytest.approx(h, rel=1e-13)
    assert [side.item() for side in field_of_values_bounds(f64([-0.4]))] == pytest.approx([h, h], rel=1e-13)


@pytest.mark.parametrize("bound", [frobenius_bound, second_order_remainder_bound])
def test_a_number_and_a_tensor_give_a_tensor(bound):
    both = bound(2.0, 0.4)
    assert isinstance(both, float)
    for one in (bound(2.0, f64(0.4, 0.4)), bound(f64(2.0, 2.0), 0.4)):
        assert isinstance(one, torch.Tensor)
        assert one.tolist() == pytest.approx([both, both], rel=1e-15)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3, 3), (0, 4, 1, 1)])
def test_bounds_of_no_matrices_are_no_numbers(shape):
    A = torch.zeros(shape, dtype=torch.float64)
    assert singular_value_bound(A).shape == shape[:-2]
    assert [bound.shape for bound in field_of_values_bounds(A)] == [shape[:-2]] * 2


@pytest.mark.parametrize("shape", [(5, 3, 4), (5, 4, 3), (2, 3, 3, 1), (3, 0, 0), (3,)])
def test_matrices_that_are_not_square_are_refused(shape):
    with pytest.raises(InputError, match="square"):
        singular_value_bound(torch.zeros(shape))


def test_batches_of_any_depth_give_the_bounds_of_each_matrix():
    """Of `S + K`, `S = diag(s, s / 2, 0)`, `K` a skew block of size k: all known in closed form."""
    s, k = torch.linspace(0.1, 0.9, 10, dtype=torch.float64), torch.linspace(0.9, 0.2, 10, dtype=torch.float64)
    A = torch.zeros(10, 3, 3, dtype=torch.float64)
    A[:, 0, 0], A[:, 1, 1], A[:, 0, 2], A[:, 2, 0] = -s, s / 2, k, -k
    lower, upper = field_of_values_bounds(A.reshape(2, 5, 3, 3))
    expected = (-s - torch.log1p(-s)) + (s / 2 - torch.log1p(s / 2))
    torch.testing.assert_close(upper.flatten(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close((upper - lower).flatten(), k.square() / (1 - s).square(), rtol=1e-12, atol=1e-12)
    diagonal = torch.diag_embed(torch.stack([-s, s / 2], -1))
    values = singular_value_bound(diagonal.reshape(2, 5, 2, 2))
    expected = -torch.log1p(-s) - s - torch.log1p(-s / 2) - s / 2
    torch.testing.assert_close(values.flatten(), expected, rtol=1e-12, atol=0)


def test_singular_values_must_descend_all_the_way():
    with pytest.raises(InputError, match=r"singular value = 0.4 \(entry 1\)"):
        leading_singular_value_bound(f64(0.5, 0.2, 0.4), 1.0)
    assert leading_singular_value_bound(f64(0.5, 0.4, 0.4), 1.0).ndim == 0
