"""XTrace against its naive twin, and what it is for: spectra that decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnkit import InputError
from hnkit.kl.estimators import (
    arnoldi,
    draw_probes,
)
from hnkit.kl.xtrace import xtrace
from tests.hnkit.operator_zoo import MatrixOperator, exact_error, matrix, phi_matrix

DIM = 12
ROWS = 24


def probes(rows: int = ROWS, dim: int = DIM, seed: int = 1) -> Tensor:
    return draw_probes(rows, dim, "rademacher", torch.Generator().manual_seed(seed))


def naive_xtrace(M: Tensor, v: Tensor) -> list[float]:
    """Leave-one-out estimates with one orthonormal basis made afresh for every i."""
    estimates = []
    for i in range(v.shape[0]):
        others = torch.cat([v[:i], v[i + 1 :]])
        Q = torch.linalg.qr(M @ others.T).Q
        u = v[i] - Q @ (Q.T @ v[i])
        estimates.append(float(torch.trace(Q.T @ M @ Q) + u @ M @ u))
    return estimates


@pytest.mark.parametrize("kind", ["gaussian", "symmetric", "normal", "nilpotent", "jordan"])
def test_xtrace_against_its_naive_twin(kind: str) -> None:
    A, v = matrix(kind, 0.7), probes(10)
    result = xtrace(MatrixOperator(A, 10), v, group=5, steps=DIM)
    M = phi_matrix(A).T
    expected = naive_xtrace(M, v[:5]) + naive_xtrace(M, v[5:])
    assert result.value.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_xtrace_is_exact_for_low_rank() -> None:
    A = matrix("low-rank", 0.9)
    result = xtrace(MatrixOperator(A, 8), probes(8), group=4)
    torch.testing.assert_close(result.value, torch.full((8,), exact_error(A), dtype=torch.float64))


def test_xtrace_reduces_the_variance_of_decaying_spectra() -> None:
    decay = torch.diag(0.9 ** torch.arange(1.0, 41, 2, dtype=torch.float64) ** 1.5).double()
    Q = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    A, v = Q @ decay @ Q.T, probes(400, 20)
    plain = arnoldi(MatrixOperator(A, 400), v, steps=20).value.reshape(-1, 8).mean(1)
    better = xtrace(MatrixOperator(A, 400), v, group=8, steps=20).value.reshape(-1, 8).mean(1)
    assert float(better.var()) < float(plain.var()) / 50
    assert float(better.mean()) == pytest.approx(exact_error(A), abs=4 * float(better.std()) / math.sqrt(50))


@pytest.mark.parametrize("group", [1, 13])
def test_xtrace_refuses_impossible_groups(group: int) -> None:
    with pytest.raises(InputError, match="2 or more"):
        xtrace(MatrixOperator(matrix("gaussian", 0.5), 13), probes(13), group=group)


def test_xtrace_of_two_probes_against_its_naive_twin() -> None:
    A, v = matrix("gaussian", 0.7), probes(2)
    M = phi_matrix(A).T
    expected = []
    for mine, other in ((v[0], v[1]), (v[1], v[0])):
        q = M @ other / (M @ other).norm()
        u = mine - q * (q @ mine)
        expected.append(float(q @ M @ q + u @ M @ u))
    assert xtrace(MatrixOperator(A, 2), v, group=2, steps=DIM).value.tolist() == pytest.approx(expected, rel=1e-9)


def test_xtrace_counts_the_products_of_both_spaces() -> None:
    operator = MatrixOperator(matrix("gaussian", 0.7), 8)
    result = xtrace(operator, probes(8), group=4, steps=3)
    assert result.steps == 3
    assert result.products.tolist() == [6.0] * 8
    assert operator.num_vjp == 48


def test_xtrace_tells_the_length_of_the_longer_space() -> None:
    """The shift of six coordinates: phi(J') is a multiple of J'^2, so the second spaces are two dimensions smaller."""
    dim = 6
    operator = MatrixOperator(0.5 * torch.diag(torch.ones(dim - 1, dtype=torch.float64), 1), 2)
    result = xtrace(operator, probes(2, dim), group=2, steps=dim)
    assert result.steps == dim
    assert operator.num_vjp == 2 * (dim + dim - 2)


def test_points_of_xtrace_do_not_disturb_one_another() -> None:
    """One point has J = 0, the other a norm of 0.9: each is what it is alone."""
    A = torch.cat([matrix("gaussian", norm).expand(4, DIM, DIM) for norm in (0.0, 0.9)])
    v = probes(8)
    together = xtrace(MatrixOperator(A, 8), v, group=4, steps=DIM).value
    assert together[:4].tolist() == [0.0] * 4
    torch.testing.assert_close(together[4:], xtrace(MatrixOperator(A[4:], 4), v[4:], group=4, steps=DIM).value)
