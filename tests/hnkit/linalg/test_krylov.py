"""Krylov processes and functions of the small matrices that they leave."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from scipy.special import roots_legendre
from torch import Tensor

from hnkit.linalg import krylov
from hnkit.linalg.krylov import ArnoldiProcess, LanczosProcess, gauss_nodes, phi_column, spectral_norm
from tests.hnkit.operator_zoo import MatrixOperator, matrix, phi_matrix

DIM = 8


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_arnoldi_basis_is_orthonormal_at_every_size_of_the_operator(scale):
    """Clustered eigenvalues, where one pass of orthogonalisation is not enough."""
    values = torch.cat([torch.linspace(0.5, 0.5 + 1e-7, 20), torch.tensor([0.1, 0.9])]).double()
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(22, 22, generator=generator, dtype=torch.float64)).Q
    probe = torch.randn(3, 22, generator=generator, dtype=torch.float64)
    process = ArnoldiProcess(MatrixOperator(scale * (Q * values) @ Q.T, 3), probe)
    for _ in range(6):
        process.advance()
    basis = process.space.basis
    alive = (basis.norm(dim=2) > 0.5).double()
    assert float((basis @ basis.mT - torch.diag_embed(alive)).abs().max()) < 1e-12


def test_an_exhausted_arnoldi_space_continues_with_zeros():
    A = torch.stack([matrix("low-rank", 0.9), matrix("gaussian", 0.9)])
    probe = torch.randn(2, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    process = ArnoldiProcess(MatrixOperator(A, 2), probe)
    for _ in range(6):
        process.advance()
    assert process.alive.tolist() == [False, True]  # rank 2: three vectors span everything
    assert not process.space.basis[0, 3:].any()
    assert not process.space.hessenberg[0, :, 3:].any()
    assert not process.space.hessenberg[0, 3:].any()


def test_arnoldi_keeps_at_most_twice_the_vectors_it_needs():
    process = ArnoldiProcess(MatrixOperator(matrix("gaussian", 0.9, 40), 1), torch.ones(1, 40, dtype=torch.float64))
    for m in range(1, 31):
        process.advance()
        space = process.space
        needed = max(m + 1, 9)
        assert space.basis.untyped_storage().nbytes() <= 2 * needed * 40 * 8
        assert space.hessenberg.untyped_storage().nbytes() <= 4 * needed**2 * 8


def lanczos_of(A: Tensor, probe: Tensor, steps: int) -> LanczosProcess:
    process = LanczosProcess(MatrixOperator(A, probe.shape[0]), probe)
    for _ in range(steps):
        process.advance()
    return process


def test_lanczos_counts_the_products_of_every_row():
    """One more than two a step, until nothing is left to find: a multiple of the identity takes one step."""
    Q = torch.linalg.qr(matrix("gaussian", 1.0, DIM)).Q
    spectra = [[0.0] * 8, [-0.5] * 8, [0.5] * 4 + [-0.5] * 4, [0.1, 0.2, 0.3, 0.4, -0.1, -0.2, -0.3, -0.4]]
    A = torch.stack([(Q * torch.tensor(values, dtype=torch.float64)) @ Q.T for values in spectra])
    probe = Q.sum(1).expand(4, DIM)
    assert lanczos_of(A, probe, 5).work.tolist() == [3.0, 3.0, 5.0, 11.0]


def test_lanczos_norm_is_the_largest_stretch_of_its_own_unit_vectors():
    A = torch.stack([matrix("low-rank", 0.9), matrix("gaussian", 0.8), matrix("nilpotent", 0.7)])
    probe = torch.randn(3, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    process = lanczos_of(A, probe, 6)
    for row in range(3):
        M = A[row] + A[row].T + A[row].T @ A[row]
        krylov_vectors = torch.stack([torch.linalg.matrix_power(M, k) @ probe[row] for k in range(6)], 1)
        # The rank-2 matrix leaves the probe, its image under J and two directions of J^T: five dimensions at most.
        size = int(torch.linalg.matrix_rank(krylov_vectors, rtol=1e-10))
        units = torch.linalg.qr(krylov_vectors[:, :size]).Q
        assert float(process.norm[row]) == pytest.approx(float((A[row] @ units).norm(dim=0).max()), rel=1e-8)
    assert process.alive.tolist() == [False, True, True]


def test_an_exhausted_lanczos_space_continues_with_zeros():
    A = torch.stack([0.3 * torch.eye(12, dtype=torch.float64), matrix("gaussian", 0.8)])
    A[0, 0, 1] = 0.0
    process = lanczos_of(A, torch.ones(2, 12, dtype=torch.float64), 4)
    torch.testing.assert_close(process.diagonal[0], torch.tensor([0.69, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert process.beside[0].tolist() == [0.0] * 4
    assert float(process.norm[0]) == pytest.approx(0.3)


def shapes_solved(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of all systems solved from now on."""
    seen: list[torch.Size] = []
    solve = torch.linalg.solve

    def watched(A: Tensor, B: Tensor) -> Tensor:
        seen.append(A.shape)
        return solve(A, B)

    monkeypatch.setattr(torch.linalg, "solve", watched)
    return seen


@pytest.mark.parametrize(("rows", "together"), [(2, 2), (3, 1), (9, 1)])
def test_quadrature_solves_as_many_shifted_matrices_together_as_its_memory_holds(monkeypatch, rows, together):
    H = matrix("gaussian", 0.9, 4).expand(rows, 4, 4)
    monkeypatch.setattr(krylov, "_QUADRATURE_ENTRIES", 64)  # four 4 x 4 matrices
    shapes = shapes_solved(monkeypatch)
    found = phi_column(H, 0.9)
    assert max(shape[0] for shape in shapes) == together
    assert sum(shape[0] for shape in shapes) == len(gauss_nodes(0.9)[0])
    torch.testing.assert_close(found, phi_matrix(H[0])[:, 0].expand(rows, 4))


def test_quadrature_holds_16_mebibytes_of_shifted_matrices(monkeypatch):
    shapes = shapes_solved(monkeypatch)
    found = phi_column(torch.full((2**18, 1, 1), -0.3, dtype=torch.float64), 0.3)
    assert max(shape.numel() for shape in shapes) * 8 == 16 * 2**20
    assert float(found.min()) == pytest.approx(-0.3 - cmath.log(0.7).real, rel=1e-13)


def test_functions_of_no_matrices():
    """As when no row of a batch has a norm below 1, or before the first step."""
    assert phi_column(torch.zeros(0, 3, 3), 0.0).shape == (0, 3)
    assert spectral_norm(torch.zeros(0, 3, 2)).shape == (0,)
    assert spectral_norm(torch.zeros(3, 1, 0)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("h", [-0.75, 0.5, 3.0])
def test_spectral_norm_of_a_number_is_its_modulus(h):
    assert spectral_norm(torch.tensor([[[h]]], dtype=torch.float64)).tolist() == [abs(h)]


def test_quadrature_is_accurate_to_rounding_unless_told_otherwise():
    nodes, weights = gauss_nodes(0.9)
    z = -0.9
    value = sum(w * t * z * z / (1 + t * z) for t, w in zip(nodes, weights, strict=True))
    assert value == pytest.approx((z - cmath.log(1 + z)).real, rel=1e-13)


@pytest.mark.parametrize("gap", [0.1, 1e-2, 1e-3, 1e-6, 1e-9, 1e-12, 0.0])
def test_the_number_of_nodes_grows_with_the_logarithm_of_the_distance_to_a_norm_of_one(gap):
    """A panel for every factor of e^2, of 25 nodes for an error of 1e-15: rho = (e + 1)/(e - 1) = e^0.772."""
    nodes, weights = gauss_nodes(1 - gap)
    assert len(nodes) <= 13 * (1 - math.log(max(gap, 2**-53)))
    assert bool(((nodes > 0) & (nodes <= 1)).all())
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-14)
    assert float(weights @ nodes**2) == pytest.approx(1 / 3, rel=1e-14)


def test_one_panel_below_a_norm_of_095():
    """Plain Gauss-Legendre: s = 2/0.9 - 1, rho = 1.925, 27 nodes by the rate and two more."""
    nodes, weights = gauss_nodes(0.9)
    expected = roots_legendre(29)
    assert nodes == pytest.approx((expected[0] + 1) / 2, rel=1e-14)
    assert weights == pytest.approx(expected[1] / 2, rel=1e-14)


@pytest.mark.parametrize(("norm", "panels"), [(0.99, 2), (0.999, 3)])
def test_panels_come_nearer_to_the_singularity_by_one_factor(norm, panels):
    """1/norm - t falls to 1 - norm of itself over [0, 1]: by a factor of 10 a panel, for its ends and all its nodes."""
    distances = 1 / norm - gauss_nodes(norm)[0].reshape(panels, -1)
    for k in range(1, panels):
        assert distances[k - 1] == pytest.approx(10 * distances[k], rel=1e-11)
