"""Low rank plus remainder against dense determinants, where norms exceed 1 and orientation is reversed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnkit import InputError, log_det_error, noise_kl
from hnkit.kl import LowRank
from hnkit.kl.estimators import draw_probes
from hnkit.kl.method import Run
from hnkit.kl.methods.low_rank import low_rank
from tests.hnkit.operator_zoo import MatrixOperator, form, matrix, phi_matrix

DIM = 40


def spiked(*sizes: float, rest: float = 0.3, dim: int = DIM) -> Tensor:
    """A non-normal matrix with some large singular values and a rest of this norm."""
    generator = torch.Generator().manual_seed(2)
    U, V = (torch.linalg.qr(torch.randn(dim, len(sizes), generator=generator, dtype=torch.float64)).Q for _ in range(2))
    return (U * torch.tensor(sizes, dtype=torch.float64)) @ V.T + matrix("gaussian", rest, dim)


def probes(points: int, group: int, dim: int = DIM) -> Tensor:
    return draw_probes(points * group, dim, "rademacher", torch.Generator().manual_seed(1))


def run(seed: int = 3) -> Run:
    return Run(torch.Generator().manual_seed(seed))


def test_the_mean_over_probes_is_the_determinant() -> None:
    A = torch.stack([spiked(8.0, 3.0, 1.5), spiked(-4.0, 2.0)])
    group = 2000
    operator = MatrixOperator(A.repeat_interleave(group, 0), 2 * group)
    found = low_rank(operator, probes(2, group), LowRank(probes=group, rank=16, tolerance=1e-8), run())
    for i in range(2):
        values = found.value.reshape(2, group)[i]
        stderr = float(values.std()) / math.sqrt(group)
        assert abs(float(values.mean()) - float(log_det_error(A[i]))) < 4.5 * stderr + 1e-9


def test_the_naive_twin() -> None:
    """Q, A and every quadratic form made densely from the definition, probe by probe."""
    A, v, group, rank = spiked(5.0, 2.0), probes(1, 3), 3, 12
    found = low_rank(MatrixOperator(A, 3), v, LowRank(probes=group, rank=rank, steps=DIM), run())
    source = torch.Generator().manual_seed(3)
    seeds = torch.cat([draw_probes(3, DIM, "gaussian", source) for _ in range(2)])
    half = torch.linalg.qr(A @ seeds.T).Q
    Q = torch.linalg.qr(torch.cat([half, A.T @ half], 1)).Q
    eye = torch.eye(DIM, dtype=torch.float64)
    remainder = torch.linalg.solve(eye + Q @ Q.T @ A, (eye - Q @ Q.T) @ A)
    S = torch.eye(rank, dtype=torch.float64) + Q.T @ A @ Q
    total = torch.linalg.slogdet(S).logabsdet + torch.linalg.slogdet(eye + remainder).logabsdet
    assert float(total) == pytest.approx(float(torch.linalg.slogdet(eye + A).logabsdet), rel=1e-12)
    rest = A - Q @ Q.T @ A
    expected = (
        torch.trace(Q.T @ A @ Q)
        - torch.linalg.slogdet(S).logabsdet
        + form(rest - remainder, v)
        + form(phi_matrix(remainder), v)
    )
    torch.testing.assert_close(found.value, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.trace, torch.trace(Q.T @ A @ Q) + form(rest, v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.square, form(A @ A, v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.frobenius, (Q.T @ A).square().sum() + (v @ rest).square().sum(1))
    assert found.sign is not None
    assert found.sign.tolist() == [float(torch.linalg.slogdet(S).sign)] * 3
    assert 2.0 < float(found.norm.max()) <= float(torch.linalg.matrix_norm(A, ord=2)) * (1 + 1e-12)


def test_full_rank_is_exact_and_zero_is_silent() -> None:
    A = spiked(-3.0, 2.0, rest=1.4)  # every part above a norm of 1
    found = low_rank(MatrixOperator(A, 4), probes(1, 4), LowRank(rank=DIM), run())
    torch.testing.assert_close(found.value, log_det_error(A).expand(4), rtol=1e-9, atol=1e-9)
    zero = low_rank(MatrixOperator(torch.zeros_like(A), 4), probes(1, 4), LowRank(), run())
    for figure in (zero.value, zero.truncation, zero.trace, zero.frobenius, zero.norm):
        assert torch.equal(figure, torch.zeros(4, dtype=torch.float64))


def test_products_are_those_announced() -> None:
    settings = LowRank(probes=4, rank=10, steps=5)
    operator = MatrixOperator(spiked(5.0), 4)
    found = low_rank(operator, probes(1, 4), settings, run())
    assert found.products.tolist() == [float(settings.products_of(5))] * 4
    assert operator.num_jvp + operator.num_vjp == 4 * settings.products_of(5)


def test_the_kl_where_arnoldi_refuses() -> None:
    """Local norms of 5 and a fold: value, sign and error bar against the exact method."""
    A = spiked(5.0, 2.5)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(x) @ A.T

    x = torch.randn(60, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = noise_kl(f, x, check=False)
    with pytest.raises(InputError, match="local norm"):
        noise_kl(f, x, method="arnoldi", check=False)
    found = noise_kl(f, x, method="low-rank", probes=8, check=False, generator=torch.Generator().manual_seed(1))
    assert abs(found.value - exact.value) < 4.5 * found.probe_stderr + 10 * found.bias_estimate
    assert found.probe_stderr < 0.05
    assert exact.folds is not None
    assert found.folds is not None
    assert found.folds.negative == exact.folds.negative
    assert found.symmetry_index == pytest.approx(exact.symmetry_index, abs=0.2)


def test_a_budget_is_kept() -> None:
    A = spiked(5.0, 2.5)
    x = torch.randn(10, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = noise_kl(lambda z: z @ A.T, x, method="low-rank", budget=1500, check=False)
    assert 600 < found.num_jvp + found.num_vjp <= 1500


def test_too_little_rank_is_said() -> None:
    A = spiked(*[3.0] * 12, rest=0.1)
    with pytest.raises(InputError, match="more rank"):
        low_rank(MatrixOperator(A, 4), probes(1, 4), LowRank(rank=4), run())


@pytest.mark.parametrize("scale", [1e-3, 1e-9, 1e-14, 1e-100])
def test_a_tiny_jacobian_keeps_its_digits(scale: float) -> None:
    """E(J) is of second order; a first-order difference on the way would leave 1e-16 |J| of rounding."""
    A = scale * spiked(5.0, 2.0)
    group = 400
    found = low_rank(MatrixOperator(A, group), probes(1, group), LowRank(probes=group, rank=16, steps=6), run())
    half = float((A / scale * (A / scale).T).sum()) / 2  # tr(A^2)/2 of the unscaled matrix
    values = found.value / scale**2
    assert abs(float(values.mean()) - half) < 4.5 * float(values.std()) / math.sqrt(group) + 0.1 * scale**0.5 * half


def test_norm_and_truncation_are_told() -> None:
    """The norm is one from below, near for few large singular values; the truncation is of the size of what is left."""
    A, v = spiked(5.0, 2.0), probes(1, 3)
    few, all_ = (low_rank(MatrixOperator(A, 3), v, LowRank(probes=3, rank=12, steps=k), run()) for k in (2, DIM))
    norm = float(torch.linalg.matrix_norm(A, 2))
    assert bool((few.norm > 0.9 * norm).all())
    assert bool((few.norm <= norm * (1 + 1e-12)).all())
    off = (few.value - all_.value).abs().mean()
    assert 0.05 < float(few.truncation.mean() / off) < 20
