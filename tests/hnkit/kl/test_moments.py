"""Per-sample figures from dense Jacobians and from probes, in chunks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnkit import noise_kl
from hnkit.kl import Arnoldi, SecondOrder, moments
from hnkit.kl.method import Run
from hnkit.kl.moments import dense_moments
from tests.hnkit.operator_zoo import matrix

SLOPES = torch.tensor([0.5, -0.3, 0.2, 0.1], dtype=torch.float64)


def scaled(x: Tensor) -> Tensor:
    """`f(x) = diag(a) x`: every Rademacher probe gives the traces of diagonal matrices without error."""
    return x * SLOPES


def points(n: int, dim: int = 4) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sizes_of_groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many Jacobians are made together from now on, and the entries of the memory they are written to."""
    seen: list[tuple[int, int]] = []
    fill = moments.fill_dense_jacobian

    def watched(J: Tensor, *args, **kwargs) -> None:
        seen.append((J.shape[0], J.untyped_storage().nbytes() // 8))
        fill(J, *args, **kwargs)

    monkeypatch.setattr(moments, "fill_dense_jacobian", watched)
    return seen


@pytest.mark.parametrize(
    ("entries", "groups"),
    [
        (64, [(4, 64), (2, 64)]),
        (127, [(6, 96)]),
        (31, [(1, 16)] * 6),
        (15, [(1, 16)] * 6),  # one Jacobian alone is larger than that
    ],
)
def test_dense_jacobians_are_made_in_groups_that_fit_the_memory(monkeypatch, entries, groups):
    monkeypatch.setattr(moments, "_IN_PLACE_ENTRIES", entries)
    seen = sizes_of_groups(monkeypatch)
    x = points(6)
    found = dense_moments(scaled, x, None)
    assert seen == groups
    expected = float((SLOPES - torch.log1p(SLOPES)).sum())
    torch.testing.assert_close(found.error, torch.full((6,), expected, dtype=torch.float64))


def test_a_group_of_dense_jacobians_takes_64_mebibytes(monkeypatch):
    seen = sizes_of_groups(monkeypatch)
    dense_moments(lambda x: 0.1 * x, torch.zeros(513, 128, dtype=torch.float64), None)
    assert seen == [(512, 2**23), (1, 2**23)]


@pytest.mark.parametrize("entries", [7, 100, 10**6])
@pytest.mark.parametrize("dim", [6, 32, 33, 50])
def test_traces_of_squares_by_blocks_of_any_size(monkeypatch, entries: int, dim: int) -> None:
    monkeypatch.setattr(moments, "_CACHE_ENTRIES", entries)
    J = torch.stack([matrix("gaussian", 0.9, dim), matrix("jordan", 0.5, dim)])
    square, frobenius = moments._square_and_frobenius(J)
    torch.testing.assert_close(square, (J @ J).diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(frobenius, torch.linalg.matrix_norm(J).square())


@pytest.mark.parametrize("method", ["l2", "exact"])
def test_methods_without_probes_count_none_and_no_steps(method):
    estimate = noise_kl(scaled, points(3), method=method)
    assert (estimate.probes, estimate.steps) == (0, 0)
    assert (estimate.num_jvp, estimate.num_vjp) == (0, 12 if method == "exact" else 0)


@pytest.mark.parametrize(("method", "num_jvp", "num_vjp"), [("power", 0, 3), ("second-order", 0, 2), ("lanczos", 3, 4)])
@pytest.mark.parametrize("chunk", [None, 4])
def test_products_are_counted_over_all_rows(method, num_jvp, num_vjp, chunk):
    """Three steps for each of 15 rows: one product a step, or Lanczos's two and one more."""
    estimate = noise_kl(scaled, points(5), method=method, probes=3, steps=3, chunk=chunk)
    assert (estimate.num_jvp, estimate.num_vjp) == (15 * num_jvp, 15 * num_vjp)


@pytest.mark.parametrize(
    ("chunk", "variance_reduction", "ends"),
    [
        (4, "none", [4, 8, 12]),
        (7, "none", [7, 12]),
        (7, "xtrace", [6, 12]),  # whole samples of three probes
        (4, "xtrace", [3, 6, 9, 12]),
        (2, "xtrace", [3, 6, 9, 12]),
        (100, "xtrace", [12]),
    ],
)
def test_chunks_have_the_rows_asked_for_and_whole_samples_for_xtrace(chunk, variance_reduction, ends):
    seen: list[tuple[int, int]] = []
    estimator = Arnoldi(3, steps=4, variance_reduction=variance_reduction)
    run = Run(chunk=chunk, progress=lambda done, total: seen.append((done, total)))
    found = estimator.moments(scaled, points(4), run)
    assert seen == [(end, 12) for end in ends]
    expected = float((SLOPES - torch.log1p(SLOPES)).sum())
    if variance_reduction == "none":
        torch.testing.assert_close(found.error, torch.full((4,), expected, dtype=torch.float64))


@pytest.mark.parametrize("probes", [1, 2, 5])
def test_figures_of_a_sample_are_means_over_its_probes(probes):
    """With a diagonal Jacobian all Rademacher probes agree, so their number does not matter."""
    x, lipschitz = points(3), 0.5
    found = noise_kl(scaled, x, method="arnoldi", form="change-of-variables", probes=probes, steps=4)
    density = (SLOPES * x.square() + (SLOPES * x).square() / 2 - torch.log1p(SLOPES)).sum(1)
    torch.testing.assert_close(found.per_sample, density)
    second = noise_kl(scaled, x, method="second-order", probes=probes, lipschitz=lipschitz)
    fourth = math.sqrt(float((SLOPES**4).sum()))  # |J J v| for every v
    alone = noise_kl(scaled, x[:1], method="second-order", lipschitz=lipschitz)
    assert second.bias_estimate == pytest.approx(alone.bias_estimate)
    assert abs(float((SLOPES - torch.log1p(SLOPES) - SLOPES**2 / 2).sum())) == pytest.approx(
        second.bias_estimate, rel=0.9
    )
    rest = (-lipschitz - math.log(1 - lipschitz)) / lipschitz**2 - 0.5
    assert second.bias_bound == pytest.approx(math.sqrt(4) * fourth * rest)


def test_local_norm_of_a_sample_is_the_largest_of_its_probes():
    """In two dimensions a Rademacher probe is (1, 1) or (1, -1) up to sign: eigenvectors of 0.8 and 0.1."""
    J = torch.tensor([[0.45, 0.35], [0.35, 0.45]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = SecondOrder(16).moments(lambda x: x @ J.T, torch.zeros(3, 2, dtype=torch.float64), Run(generator))
    torch.testing.assert_close(found.norm, torch.full((3,), 0.8, dtype=torch.float64))


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_steps_are_those_of_the_chunk_that_took_most(order):
    """J = 0 at the first point, where one step suffices, and has three eigenvalues at the second."""
    x = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 2.0, 3.0]], dtype=torch.float64)[order]
    estimate = noise_kl(lambda x: 0.1 * x.relu().square(), x, method="arnoldi", steps=3, chunk=1, check=False)
    assert estimate.steps == 3
