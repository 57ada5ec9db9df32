"""Small errors in `hnkit/logdet.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math

import pytest
import torch

from hnkit.logdet import log_det_error, log_det_error_, log_det_errors_


def rank_one(scale: float, dim: int) -> torch.Tensor:
    """`scale u v^T` with `u . v = 1`: trace `scale`, determinant of I + A `1 + scale`."""
    u = torch.linspace(1.0, 2.0, dim, dtype=torch.float64)
    v = torch.linspace(-1.0, 3.0, dim, dtype=torch.float64)
    return scale * torch.outer(u, v) / (u @ v)


def test_log_det_error_of_an_empty_batch():
    assert log_det_error(torch.zeros(5, 0, 3, 3)).shape == (5, 0)


@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0]])
def test_the_sign_of_a_factorisation_with_swaps(order):
    """I + A is a permutation matrix: one swap, then two."""
    identity = torch.eye(3, dtype=torch.float64)
    value, sign = log_det_error_((identity[order] - identity).clone())
    assert float(sign) == pytest.approx(float(torch.linalg.det(identity[order])))
    assert float(value) == pytest.approx(float((identity[order] - identity).trace()))


@pytest.mark.parametrize("dim", [5, 64, 70])
def test_matrices_of_any_size_in_a_batch_keep_their_digits_and_signs(dim):
    """One that needs elimination, since its error term is below the rounding of its trace, among large ones."""
    scales = [1e-7, 3.0, -5.0, 2e-8]
    value, sign = log_det_errors_(torch.stack([rank_one(scale, dim) for scale in scales]))
    small = [scale**2 / 2 - scale**3 / 3 for scale in scales]
    large = [scale - math.log(abs(1 + scale)) for scale in scales]
    expected = [small[0], large[1], large[2], small[3]]
    assert value.tolist() == pytest.approx(expected, rel=1e-9)
    assert sign.tolist() == [1.0, 1.0, -1.0, 1.0]


def test_large_matrices_are_factored_in_their_own_memory():
    A = torch.stack([rank_one(3.0, 100), rank_one(-4.0, 100)])
    before = A.clone()
    log_det_errors_(A)
    factor = torch.linalg.lu_factor(before.mT + torch.eye(100, dtype=torch.float64)).LU
    torch.testing.assert_close(A.mT, factor)
