"""Small errors in `hnkit/logdet.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import pytest
import torch

from hnkit.logdet import log_det_error, log_det_error_


def test_log_det_error_of_an_empty_batch():
    assert log_det_error(torch.zeros(5, 0, 3, 3)).shape == (5, 0)


@pytest.mark.parametrize("order", [[1, 0, 2], [1, 2, 0]])
def test_the_sign_of_a_factorisation_with_swaps(order):
    """I + A is a permutation matrix: one swap, then two."""
    identity = torch.eye(3, dtype=torch.float64)
    value, sign = log_det_error_((identity[order] - identity).clone())
    assert float(sign) == pytest.approx(float(torch.linalg.det(identity[order])))
    assert float(value) == pytest.approx(float((identity[order] - identity).trace()))
