"""Small errors in `hnkit/lipschitz.py` that no other test notices quickly, found by benchmarks/mutate.py.

The oracles: matrices with a chosen singular value decomposition, `x -> roll(x^2 / 2)` whose Jacobian has the entries of
x as singular values, Krylov spaces built by QR of powers, and ascent paths on scalar maps worked out by hand.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hnkit import InputError
from hnkit.jacobian import RowJacobian
from hnkit.lipschitz.local import (
    LocalNorms,
    _against,
    _better,
    _default_tolerance,
    _norm_gradient,
    _small_svd,
    _unit,
    leading_singular,
    lipschitz_lower,
    lipschitz_upper,
    local_lipschitz,
    local_norms,
)

F64 = torch.float64


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(d, d, seed=seed))[0]


def operator(*matrices: Tensor) -> RowJacobian:
    """Row i has the Jacobian `matrices[i]`."""
    stacked = torch.stack(matrices)
    return RowJacobian(lambda x: torch.einsum("rij,rj->ri", stacked, x), torch.zeros(stacked.shape[:2], dtype=F64))


def rolled_square(x: Tensor) -> Tensor:
    """`J(x)` maps the unit vector e_i to `x_i e_(i+1)`: the singular values are the `|x_i|`."""
    return (x * x / 2).roll(1, -1)


class Seen:
    """A map that notes how many rows it was given each time."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.add(x.shape[0])
        return 0.5 * x


# --- the parts --------------------------------------------------------------------------------------------------------

VECTORS = [[3.0, -4.0, 0.0], [-0.3, -0.4, 0.0], [0.0, 0.0, 0.0], [-3e200, 0.0, 4e200], [3e-200, -4e-200, 0.0]]
LENGTHS = [5.0, 0.5, 0.0, 5e200, 5e-200]


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1)])
def test_unit_divides_each_vector_along_the_last_axis_by_its_length_at_any_scale(shape):
    vectors = torch.tensor(VECTORS, dtype=F64)
    length, unit = _unit(vectors.reshape(*shape, 3))
    assert length.shape == shape
    assert length.flatten().tolist() == pytest.approx(LENGTHS, rel=1e-15)
    expected = [[0.6, -0.8, 0], [-0.6, -0.8, 0], [0, 0, 0], [-0.6, 0, 0.8], [0.6, -0.8, 0]]
    assert unit.shape == (*shape, 3)
    assert unit.reshape(5, 3).tolist() == [pytest.approx(row, rel=1e-15) for row in expected]


def test_unit_makes_vectors_up_to_the_floor_zero():
    length, unit = _unit(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.6, 0.8]], dtype=F64), torch.tensor([4.0, 2.0, 0.5]))
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


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(F64, 1e-5), (torch.float32, 1e-5), (torch.float16, 2.0**-7), (torch.bfloat16, 2.0**-4)],
)
def test_the_default_tolerance_is_1e_5_or_eight_units_of_rounding(dtype, tolerance):
    assert _default_tolerance(torch.zeros(1, 1, dtype=dtype)) == tolerance


# --- leading singular values ------------------------------------------------------------------------------------------


def with_values(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    U, V = orthogonal(len(values), seed), orthogonal(len(values), seed + 100)
    return U @ torch.diag(torch.tensor(values, dtype=F64)) @ V.T, U, V


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


# --- norms at rows ----------------------------------------------------------------------------------------------------


def test_local_norms_of_the_rolled_square():
    x = noise(6, 5, 4, seed=2)
    found = local_norms(lambda x: rolled_square(x.flatten(1)).reshape(x.shape), x, tolerance=1e-11, cycles=40)
    flat = x.flatten(1)
    largest, place = flat.abs().max(1)
    assert found.value.tolist() == pytest.approx(largest.tolist(), rel=1e-12)
    assert found.right.abs().argmax(1).tolist() == place.tolist()
    assert found.left.abs().argmax(1).tolist() == ((place + 1) % 20).tolist()
    assert float(found.residual.max()) <= 1e-11


@pytest.mark.parametrize("dim", [3, 20])
def test_a_single_row_is_a_batch(dim):
    x = torch.linspace(-1, 2, dim, dtype=F64)[None]
    assert local_lipschitz(rolled_square, x).tolist() == pytest.approx([2.0], rel=1e-9)
    assert lipschitz_lower(rolled_square, x, ascent_steps=1).value == pytest.approx(2.5, rel=1e-6)


@pytest.mark.parametrize(
    ("dim", "batch", "rows"),
    [
        (20, 5, {5}),
        (2**29 // (16 * 48 * 2), 3, {2, 1}),  # two rows of 2 x 48 float64 vectors just fit into 2^29 bytes
        (2**29 // (16 * 48) + 1, 2, {1}),
    ],
)
def test_rows_run_together_as_far_as_their_krylov_vectors_fit_into_half_a_gibibyte(dim, batch, rows):
    f = Seen()
    found = local_norms(f, torch.zeros(batch, dim), cycles=0)
    assert found.value.tolist() == pytest.approx([0.5] * batch)
    assert found.right.shape == (batch, dim)
    assert f.rows == rows
    assert found.products == 2 * batch


def test_start_vectors_come_from_the_generator_given():
    x = noise(1, 20)
    start = noise(1, 20, seed=3)
    found = local_norms(rolled_square, x, generator=torch.Generator().manual_seed(3), cycles=0)
    assert found.right.tolist() == [pytest.approx((start[0] / start[0].norm()).tolist())]
    default = local_norms(rolled_square, x, cycles=0)
    assert torch.equal(default.right, local_norms(rolled_square, x, cycles=0).right)
    assert not torch.equal(default.right, found.right)


def test_up_to_dimension_16_the_dense_jacobian_needs_no_tolerance():
    """No product resolves 1e-17, so that only the Krylov route refuses it."""
    values = torch.linspace(0.5, 1, 17, dtype=F64)
    Q = orthogonal(17, 3)
    for dim in (16, 17):
        A = (orthogonal(dim, 4) * values[:dim]) @ Q[:dim, :dim]
        f = lambda x, A=A: x @ A.T  # noqa: E731
        if dim == 16:
            found = local_lipschitz(f, noise(2, dim), tolerance=1e-17)
            assert found.tolist() == pytest.approx([float(torch.linalg.svdvals(A)[0])] * 2, rel=1e-13)
        else:
            with pytest.raises(InputError, match="did not converge"):
                local_lipschitz(f, noise(2, dim), tolerance=1e-17)


def test_the_row_that_does_not_converge_is_named():
    A = with_values(torch.linspace(1, 0.5, 20, dtype=F64).tolist())[0]
    x = torch.tensor([0.0, 1.0, 0.0], dtype=F64)[:, None].expand(3, 20)
    f = lambda x: (x * x / 2) @ A.T  # noqa: E731  J = 0 at rows 0 and 2, whose residual is exactly 0
    with pytest.raises(InputError, match="sample 1 did not converge"):
        local_lipschitz(f, x, tolerance=1e-17)
    assert local_lipschitz(f, x).tolist() == pytest.approx([0.0, 1.0, 0.0], rel=1e-9)


@pytest.mark.parametrize("tolerance", [0.0, -0.5, 1.0, 1.5])
def test_a_relative_tolerance_lies_strictly_between_0_and_1(tolerance):
    with pytest.raises(InputError, match=f"tolerance = {tolerance}"):
        local_norms(rolled_square, noise(1, 2), tolerance=tolerance)
    assert local_norms(rolled_square, noise(1, 2), tolerance=0.5).value.shape == (1,)


# --- ascent -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_the_step_starts_at_one_half_and_doubles_while_the_norm_grows(steps):
    """|J(x)| = |x| for x^2 / 2: from 0.7 the steps 0.5, 1, 2, ... all go up."""
    estimate = lipschitz_lower(lambda x: x * x / 2, torch.tensor([[0.2], [-0.7]], dtype=F64), ascent_steps=steps)
    assert estimate.value == pytest.approx(0.7 + 0.5 * (2**steps - 1))
    assert estimate.kind == "lower"


def backtracked(norm, slope, x: float, steps: int) -> float:
    """The largest norm on the path that doubles the step after a rise and halves it after anything else."""
    length, value = 0.5, norm(x)
    for _ in range(steps):
        trial = x + length * math.copysign(1, slope(x))
        if norm(trial) > value:
            x, value, length = trial, norm(trial), 2 * length
        else:
            length /= 2
    return value


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 9])
def test_the_step_is_halved_where_the_norm_does_not_grow(steps):
    """`x - x^3 / 3` has the derivative `1 - x^2`, positive on the path from 0.3 over -0.2 to 0.05."""
    estimate = lipschitz_lower(lambda x: x - x**3 / 3, torch.tensor([[0.3]], dtype=F64), ascent_steps=steps)
    assert estimate.value == pytest.approx(backtracked(lambda x: abs(1 - x * x), lambda x: -2 * x, 0.3, steps))
    if steps in (1, 2, 3):
        assert estimate.value == pytest.approx(0.96)
    if steps == 4:
        assert estimate.value == pytest.approx(1 - 0.05**2)


def two_bumps(x: Tensor) -> Tensor:
    """Derivative `exp(-x^2 / 2) + 0.5 exp(-(x - 40)^2 / 2)`."""
    return math.sqrt(math.pi / 2) * (torch.erf(x / math.sqrt(2)) + 0.5 * torch.erf((x - 40) / math.sqrt(2)))


@pytest.mark.parametrize("starts", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7])
def test_a_row_on_its_summit_does_not_hold_the_others_back(starts, steps):
    x = torch.tensor([[40.0], [0.3]], dtype=F64)
    estimate = lipschitz_lower(two_bumps, x, ascent_steps=steps, starts=starts)
    expected = backtracked(lambda x: math.exp(-x * x / 2), lambda x: -x, 0.3, steps)
    assert estimate.value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 2), (3, 4, 5)])
def test_each_row_moves_by_its_own_step_along_its_own_gradient(shape):
    """The gradient of the largest `|x_i|` has one entry that is not 0, and only the best row reaches the value."""
    x = noise(*shape, seed=4)
    estimate = lipschitz_lower(lambda x: rolled_square(x.flatten(1)).reshape(x.shape), x, ascent_steps=4)
    assert estimate.value == pytest.approx(float(x.abs().max()) + 7.5, rel=1e-5)
    assert estimate.how == "largest |J(x)|_2 of 3 samples, then 4 steps of gradient ascent on x from the best 3"


def test_by_default_twenty_steps_from_the_best_four():
    x = noise(6, 2)
    estimate = lipschitz_lower(torch.tanh, x)
    assert estimate.how == "largest |J(x)|_2 of 6 samples, then 20 steps of gradient ascent on x from the best 4"
    assert lipschitz_lower(torch.tanh, x[:2]).how.endswith("from the best 2")
    assert lipschitz_lower(torch.tanh, x, starts=1).how.endswith("from the best 1")
    sampled = lipschitz_lower(rolled_square, x, ascent_steps=0)
    assert (sampled.kind, sampled.how) == ("sampled", "largest |J(x)|_2 of 6 samples")
    assert sampled.value == pytest.approx(float(x.abs().max()), rel=1e-9)


@pytest.mark.parametrize(("option", "value"), [("ascent_steps", -1), ("starts", 0)])
def test_what_cannot_be_counted_is_refused(option, value):
    with pytest.raises(InputError, match=f"{option} = {value}"):
        lipschitz_lower(torch.sin, noise(2, 3), **{option: value})


def test_the_value_never_falls_below_the_samples():
    """`|x|^1.5 sign` has no finite second derivative at 0; a far start cannot lower the maximum of the samples."""
    x = torch.tensor([[0.0], [3.0], [-5.0]], dtype=F64)
    f = lambda x: torch.sin(x)  # noqa: E731
    assert lipschitz_lower(f, x, ascent_steps=3).value == 1.0
    assert lipschitz_lower(f, x, ascent_steps=3, starts=1).value == 1.0


class Shift(nn.Module):
    """A learnt constant: its output has a gradient, but none with respect to x."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(dim, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift.expand_as(x)


CONSTANT_JACOBIANS = {
    "constant": lambda x: torch.ones_like(x),
    "learnt constant": Shift(4),
    "linear": lambda x: 3 * x,
    "learnt linear": nn.Linear(4, 4).double(),
    "relu": lambda x: torch.relu(x) * 2,
}


@pytest.mark.parametrize("name", CONSTANT_JACOBIANS)
def test_where_the_jacobian_is_locally_constant_there_is_no_direction(name):
    f, x = CONSTANT_JACOBIANS[name], noise(3, 4).abs()
    unit = torch.full((3, 4), 0.5, dtype=F64)
    direction = _norm_gradient(f, x, unit, unit)
    assert direction.dtype == F64
    assert direction.tolist() == [[0.0] * 4] * 3
    assert _norm_gradient(f, x[:1], unit[:1], unit[:1]).tolist() == [[0.0] * 4]
    expected = lipschitz_lower(f, x, ascent_steps=0).value
    assert lipschitz_lower(f, x, ascent_steps=3).value == expected
    assert expected == pytest.approx({"linear": 3, "relu": 2}.get(name, expected))


@pytest.mark.parametrize("rows", [1, 3])
def test_the_direction_is_the_gradient_of_the_bilinear_form(rows):
    """`u' J v = sum of u_i+1 v_i x_i` for the rolled square: the gradient is `roll(u, -1) v`, of length one then."""
    x, u, v = (noise(rows, 5, seed=seed) for seed in range(3))
    gradient = u.roll(-1, -1) * v
    expected = gradient / torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    found = _norm_gradient(rolled_square, x, u, v)
    assert found.tolist() == [pytest.approx(row, rel=1e-12) for row in expected.tolist()]


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_the_direction_has_no_part_where_the_second_derivative_is_not_finite(sign):
    """The second derivative of x^1.5 is infinite at 0: +inf, -inf, and 0 * inf in the gradient's first entry."""
    x = torch.tensor([[0.0, 1.0]], dtype=F64)
    v = torch.tensor([[0.6, 0.8]], dtype=F64)
    u = torch.tensor([[0.6 * sign, 0.8]], dtype=F64)
    assert _norm_gradient(lambda x: x**1.5, x, u, v).tolist() == [[0.0, 1.0]]


def test_a_map_without_second_derivatives_is_refused():
    """Distances of rows have no double backward in torch."""
    unit = torch.ones(2, 1, dtype=F64)
    f = lambda x: torch.cdist(x[:, None], 3 + torch.zeros(2, 1, 1, dtype=F64))[:, 0]  # noqa: E731
    with pytest.raises(InputError, match=r"no second derivatives .* use ascent_steps=0"):
        _norm_gradient(f, 0.5 * unit, unit, unit)


def test_certified_constants_multiply_along_a_chain():
    first, last = nn.Linear(3, 5), nn.Linear(5, 3)
    expected = math.prod(float(torch.linalg.svdvals(layer.weight.detach().double())[0]) for layer in (first, last))
    estimate = lipschitz_upper(nn.Sequential(first, nn.Tanh(), last))
    assert estimate.kind == "certified"
    assert estimate.value == pytest.approx(expected, rel=1e-9)
