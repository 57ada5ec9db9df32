"""Golub-Kahan bidiagonalisation against chosen singular values and Krylov spaces built by QR of powers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hnkit.jacobian import RowJacobian
from hnkit.linalg.singular import LocalNorms, _against, _better, _small_svd, leading_singular, unit_rows
from tests.hnkit.functions import noise, orthogonal, with_values

F64 = torch.float64


def operator(*matrices: Tensor) -> RowJacobian:
    """Row i has the Jacobian `matrices[i]`."""
    stacked = torch.stack(matrices)
    return RowJacobian(lambda x: torch.einsum("rij,rj->ri", stacked, x), torch.zeros(stacked.shape[:2], dtype=F64))


# --- the parts --------------------------------------------------------------------------------------------------------

VECTORS = [[3.0, -4.0, 0.0], [-0.3, -0.4, 0.0], [0.0, 0.0, 0.0], [-3e200, 0.0, 4e200], [3e-200, -4e-200, 0.0]]
LENGTHS = [5.0, 0.5, 0.0, 5e200, 5e-200]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1)])
def test_unit_divides_each_vector_along_the_last_axis_by_its_length_at_any_scale(shape):
    vectors = torch.tensor(VECTORS, dtype=F64)
    length, unit = unit_rows(vectors.reshape(*shape, 3))
    assert length.shape == shape
    assert length.flatten().tolist() == pytest.approx(LENGTHS, rel=1e-15)
    expected = [[0.6, -0.8, 0], [-0.6, -0.8, 0], [0, 0, 0], [-0.6, 0, 0.8], [0.6, -0.8, 0]]
    assert unit.shape == (*shape, 3)
    assert unit.reshape(5, 3).tolist() == [pytest.approx(row, rel=1e-15) for row in expected]


def test_unit_makes_vectors_up_to_the_floor_zero():
    length, unit = unit_rows(
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.6, 0.8]], dtype=F64), torch.tensor([4.0, 2.0, 0.5])
    )
    assert length.tolist() == [5.0, 0.0, pytest.approx(1.0)]
    assert unit.tolist() == [[0.6, 0.8], [0.0, 0.0], pytest.approx([0.6, 0.8])]


def test_against_leaves_what_is_orthogonal_to_the_basis():
    Q = orthogonal(7, 0)
    vectors = 3 * Q[:2] + 5 * Q[2:4] - 2 * Q[4:6]
    rest = _against(vectors, [Q[:2], Q[2:4]])
    assert rest.tolist() == [pytest.approx(row, abs=1e-14) for row in (-2 * Q[4:6]).tolist()]


def test_small_svd_is_the_leading_triple_of_the_upper_bidiagonal_matrix():
    diagonal, above = noise(3, 4).abs(), noise(3, 3, seed=1).abs()
    left, value, right = _small_svd(list(diagonal.unbind(1)), list(above.unbind(1)))
    for row in range(3):
        B = [[float(diagonal[row, i]) if i == j else float(above[row, i]) if j == i + 1 else 0.0 for j in range(4)]
             for i in range(4)]  # fmt: skip
        matrix = torch.tensor(B, dtype=F64)
        assert float(value[row]) == pytest.approx(float(torch.linalg.eigvalsh(matrix.T @ matrix)[-1]) ** 0.5)
        assert (matrix @ right[row]).tolist() == pytest.approx((value[row] * left[row]).tolist(), abs=1e-14)
        assert (matrix.T @ left[row]).tolist() == pytest.approx((value[row] * right[row]).tolist(), abs=1e-14)
    left, value, right = _small_svd([torch.tensor([2.0, 0.0])], [])
    assert (left * right).tolist() == [[1.0], [1.0]]
    assert value.tolist() == [2.0, 0.0]


def test_better_takes_the_larger_value_with_its_own_vectors():
    def norms(values, mark, products):
        vectors = torch.full((2, 3), mark)
        return LocalNorms(torch.tensor(values), torch.full((2,), mark), vectors, 10 * vectors, products)

    old, new = norms([1.0, 5.0], 1.0, 4), norms([2.0, 3.0], 2.0, 9)
    assert _better(None, new) is new
    best = _better(old, new)
    assert best.value.tolist() == [2.0, 5.0]
    assert best.residual.tolist() == [2.0, 1.0]
    assert best.left.tolist() == [[2.0] * 3, [1.0] * 3]
    assert best.right.tolist() == [[20.0] * 3, [10.0] * 3]
    assert best.products == 9


# --- leading singular values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-200, 1e200])
@pytest.mark.parametrize("seed", range(3))
def test_one_cycle_with_room_for_the_whole_space_finds_the_leading_triple(seed, scale):
    """Rows of their own: a hard spectrum, a gap, J = 0, and a multiple of the identity that is complete at once."""
    d = 20
    hard, U, V = with_values(torch.linspace(1, 0.5, d, dtype=F64).tolist(), seed)
    gap, U2, V2 = with_values([1.0] + [0.1] * (d - 1), seed + 7)
    matrices = [scale * hard, scale * gap, torch.zeros(d, d, dtype=F64), 0.5 * scale * torch.eye(d, dtype=F64)]
    for chosen in ([0, 1, 2, 3], [0]):
        found = leading_singular(
            operator(*[matrices[i] for i in chosen]), noise(len(chosen), d, seed=seed + 3), tolerance=1e-10, cycles=1
        )
        expected = [[scale, scale, 0.0, 0.5 * scale][i] for i in chosen]
        assert found.value.tolist() == pytest.approx(expected, rel=1e-12)
        assert float(found.residual.max()) <= 1e-10
        for row, (left, right) in enumerate([(U[:, 0], V[:, 0]), (U2[:, 0], V2[:, 0])][: len(chosen)]):
            sign = torch.sign(found.right[row] @ right)
            assert (sign * found.right[row]).tolist() == pytest.approx(right.tolist(), abs=1e-8)
            assert (sign * found.left[row]).tolist() == pytest.approx(left.tolist(), abs=1e-8)
    assert torch.linalg.vector_norm(found.right, dim=1).tolist() == pytest.approx([1.0] * len(chosen))


def test_a_zero_jacobian_has_norm_and_residual_zero():
    found = leading_singular(operator(torch.zeros(4, 4, dtype=F64)), noise(1, 4), tolerance=1e-5)
    assert (found.value.tolist(), found.residual.tolist()) == ([0.0], [0.0])
    assert found.left.tolist() == [[0.0] * 4]
    assert float(torch.linalg.vector_norm(found.right)) == pytest.approx(1)
    assert found.products == 4  # the start and the measurement after one cycle, J and J' each


def test_no_cycle_measures_the_start():
    """`|J v|` and `|J' u - sigma v| / sigma` of `J = [[3, 0], [0, 4]] / 10` at v = (0.6, 0.8), by hand."""
    J = torch.diag(torch.tensor([0.3, 0.4], dtype=F64))
    found = leading_singular(operator(J, J), torch.tensor([[3.0, 4.0], [-6.0, -8.0]]), tolerance=1e-5, cycles=0)
    sigma = math.hypot(0.18, 0.32)
    u = (0.18 / sigma, 0.32 / sigma)
    residual = math.hypot(0.3 * u[0] - sigma * 0.6, 0.4 * u[1] - sigma * 0.8) / sigma
    assert found.value.tolist() == pytest.approx([sigma] * 2)
    assert found.residual.tolist() == pytest.approx([residual] * 2)
    assert found.left.tolist() == [pytest.approx(u), pytest.approx((-u[0], -u[1]))]
    assert found.right.tolist() == [pytest.approx((0.6, 0.8)), pytest.approx((-0.6, -0.8))]
    assert found.products == 4


def krylov_residual(J: Tensor, start: Tensor, steps: int) -> float:
    """Relative residual of the best right vector in the span of `(J'J)^k start, k < steps`."""
    powers = [start / start.norm()]
    for _ in range(steps - 1):
        following = J.T @ (J @ powers[-1])
        powers.append(following / following.norm())
    Q = torch.linalg.qr(torch.stack(powers, 1))[0]
    v = Q @ torch.linalg.svd(J @ Q)[2][0]
    sigma = (J @ v).norm()
    return float((J.T @ (J @ v / sigma) - sigma * v).norm() / sigma)


@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_cycle_ends_at_the_first_test_whose_residual_is_a_quarter_of_the_tolerance(seed, scale):
    """The tests are at 8, 12, 16, ... steps: a cycle of k steps costs k products of J and J' each, the first pair of
    the next cycle included."""
    d = 24
    J = scale * with_values([1.0, *torch.linspace(0.6, 0.1, d - 1).tolist()], seed)[0]
    start = noise(1, d, seed=seed + 50)
    residuals = {steps: krylov_residual(J, start[0], steps) for steps in (4, 7, 8, 9, 12)}
    assert residuals[8] > 4 * residuals[12]
    for factor, steps in ((4.1, 8), (3.9, 12)):
        tolerance = factor * residuals[8]
        found = leading_singular(operator(J), start, tolerance=tolerance)
        assert found.products == 2 * (steps + 1)
        assert float(found.residual) == pytest.approx(residuals[steps], rel=1e-4)
    easy = leading_singular(operator(J), start, tolerance=0.9)
    assert easy.products == 18


@pytest.mark.parametrize("sign", [1, -1])
def test_the_signs_of_the_small_singular_vectors_do_not_matter(sign, monkeypatch):
    """An SVD is unique up to the signs of its pairs of vectors."""
    svd = torch.linalg.svd

    def signed(matrix):
        u, s, vh = svd(matrix)
        flip = sign * u[..., -1, 0].sign()[..., None, None]
        return flip * u, s, flip * vh

    monkeypatch.setattr(torch.linalg, "svd", signed)
    J = with_values([1.0, *torch.linspace(0.99, 0.1, 23).tolist()])[0]
    found = leading_singular(operator(J), noise(1, 24), tolerance=1e-9, cycles=1)
    assert float(found.residual) <= 1e-9


def test_a_cycle_goes_on_until_the_last_row_passes():
    d = 24
    hard = with_values([1.0, *torch.linspace(0.99, 0.1, d - 1).tolist()])[0]
    easy = with_values([1.0, *torch.linspace(1e-3, 1e-4, d - 1).tolist()])[0]
    found = leading_singular(operator(easy, hard, easy), noise(3, d), tolerance=1e-9, cycles=1)
    assert float(found.residual.max()) <= 1e-9


def test_basis_bounds_the_steps_of_a_cycle_and_cycles_their_number():
    J = with_values(torch.linspace(1, 0.99, 30, dtype=F64).tolist())[0]
    start = noise(2, 30)
    for basis, cycles in ((1, 1), (4, 1), (4, 2), (10, 3)):
        found = leading_singular(operator(J, J), start, tolerance=1e-15, basis=basis, cycles=cycles)
        assert found.products == 2 * 2 * (1 + cycles * basis)
        assert float(found.residual.min()) > 1e-15
    one = leading_singular(operator(J, J), start, tolerance=1e-15, basis=5, cycles=1)
    expected = [krylov_residual(J, row, 5) for row in start]
    assert one.residual.tolist() == pytest.approx(expected, rel=1e-4)


def test_products_are_those_of_this_call():
    J = operator(0.5 * torch.eye(6, dtype=F64), torch.eye(6, dtype=F64))
    J.vjp(noise(2, 6))
    J.vjp(noise(2, 6))
    J.jvp(noise(2, 6))
    assert leading_singular(J, noise(2, 6), tolerance=1e-5).products == 8


def test_restarts_go_on_until_every_row_has_converged():
    d = 40
    hard = with_values(torch.linspace(1, 0.2, d, dtype=F64).tolist())[0]
    easy = 0.5 * torch.eye(d, dtype=F64)
    found = leading_singular(operator(easy, hard), noise(2, d), tolerance=1e-6, basis=12, cycles=60)
    assert found.value.tolist() == pytest.approx([0.5, 1.0], rel=1e-6)
    assert float(found.residual.max()) <= 1e-6
    assert found.products < 2 * 2 * 12 * 60


def test_a_start_that_is_almost_a_lower_singular_vector_does_not_end_there():
    """Its residual is below the tolerance, so that only the Krylov space tells it from the leading one."""
    J, _, V = with_values([1.0, 0.9, 0.5, 0.4, 0.3, 0.2])
    start = (V[:, 1] + 1e-8 * V[:, 0])[None]
    for cycles in (1, 12):
        found = leading_singular(operator(J), start, tolerance=1e-5, cycles=cycles)
        assert found.value.tolist() == pytest.approx([1.0], rel=1e-9)


@pytest.mark.parametrize(("small", "main", "share"), [(1e-6, 0, 1e-7), (1e-4, 1, 1e-7)])
def test_a_complete_invariant_subspace_ends_the_cycle(small, main, share):
    """Two distinct singular values span a Krylov space of dimension two: 2 steps and the measurement are 6 products;
    two more if rounding passes for a direction once. The start lies near one vector, so that some entry of the
    bidiagonal matrix is small."""
    d = 20
    J, _, V = with_values([1.0] + [small] * (d - 1))
    start = (V[:, main] + share * V[:, 1 - main])[None]
    found = leading_singular(operator(J), start, tolerance=1e-5, cycles=1)
    assert found.value.tolist() == pytest.approx([1.0], rel=1e-12)
    assert found.products in (6, 8)


# --- products that resolve no more than their rounding ----------------------------------------------------------------


class Rounded(RowJacobian):
    """Products with relative errors of a given size, other ones each time, as those of a coarse network have."""

    def __init__(self, A: Tensor, rows: int, size: float) -> None:
        super().__init__(lambda x: x @ A.T, torch.zeros(rows, A.shape[1], dtype=F64))
        self.size, self.generator = size, torch.Generator().manual_seed(0)

    def _noisy(self, product: Tensor) -> Tensor:
        noise = torch.randn(product.shape, generator=self.generator, dtype=F64)
        return product + self.size * noise * product.norm(dim=1, keepdim=True) / product.shape[1] ** 0.5

    def jvp(self, vectors: Tensor) -> Tensor:
        return self._noisy(super().jvp(vectors))

    def vjp(self, vectors: Tensor) -> Tensor:
        return self._noisy(super().vjp(vectors))


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-6])
def test_a_residual_that_stops_falling_is_left_where_it_is(size):
    """Within a few restarts of the sixty allowed, at about the size of the errors, with the value right to that."""
    A = with_values([1.0, *torch.linspace(0.8, 0.1, 59, dtype=F64).tolist()])[0]
    found = leading_singular(Rounded(A, 3, size), noise(3, 60), tolerance=1e-9, cycles=60)
    assert not bool(found.converged.any())
    assert 0.3 * size < float(found.residual.min()) <= float(found.residual.max()) < 5 * size
    assert found.value.tolist() == pytest.approx([1.0] * 3, abs=4 * size)
    assert found.products < 30 * 2 * 3 * 8  # of at least 8 steps in each restart
    exact = leading_singular(operator(A, A, A), noise(3, 60), tolerance=1e-9)
    assert bool(exact.converged.all())
    assert exact.tolerance == 1e-9


def test_a_row_that_still_falls_is_not_given_up_for_one_that_does_not():
    d = 40
    hard = with_values(torch.linspace(1, 0.2, d, dtype=F64).tolist())[0]
    found = leading_singular(operator(hard, 0.5 * hard), noise(2, d), tolerance=1e-8, basis=10, cycles=200)
    assert bool(found.converged.all())
    assert found.value.tolist() == pytest.approx([1.0, 0.5], rel=1e-8)
