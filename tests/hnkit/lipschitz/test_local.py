"""Local norms and ascent: `x -> roll(x^2 / 2)`, whose singular values are the entries of x, and paths found by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hnkit import InputError
from hnkit.linalg.singular import LocalNorms
from hnkit.lipschitz.local import (
    RESOLVED,
    _default_tolerance,
    _norm_gradient,
    lipschitz_lower,
    lipschitz_upper,
    local_lipschitz,
    local_norms,
)
from tests.hnkit.functions import noise, orthogonal, with_values

F64 = torch.float64


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


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(F64, 1e-5), (torch.float32, 1e-5), (torch.float16, 2.0**-7), (torch.bfloat16, 2.0**-4)],
)
def test_the_default_tolerance_is_1e_5_or_eight_units_of_rounding(dtype, tolerance):
    assert _default_tolerance(torch.zeros(1, 1, dtype=dtype)) == tolerance


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


# --- networks that compute in half precision inside -------------------------------------------------------------------


class Coarse(nn.Module):
    """A network in bfloat16 whose input and output are float32, as those of the published models are."""

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        with torch.no_grad():
            for parameter in self.parameters():
                drawn = torch.randn(parameter.shape, generator=generator) / d**0.5
                parameter.copy_(drawn.bfloat16())  # the same numbers in either type
        self.layers.to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.dtype)).float()


@pytest.fixture(scope="module")
def coarse():
    d = 48
    return Coarse(d, torch.bfloat16), Coarse(d, torch.float32), noise(4, d).float()


def test_the_norms_of_a_bfloat16_network_come_at_its_own_resolution(coarse):
    """The type of x and of f(x) says nothing about it."""
    rounded, exact, x = coarse
    truth = local_lipschitz(exact, x)
    found = local_norms(rounded, x)
    assert not bool(found.converged.all())
    assert 1e-3 < float(found.residual.max()) < RESOLVED
    assert found.value.tolist() == pytest.approx(truth.tolist(), rel=0.01)
    assert torch.equal(local_lipschitz(rounded, x), found.value)
    assert lipschitz_lower(rounded, x, ascent_steps=0).value == float(found.value.max())


def test_a_stated_tolerance_is_kept_or_refused(coarse):
    rounded, exact, x = coarse
    with pytest.raises(InputError, match=r"tolerance 1e-05: raise the tolerance, or run the map in a higher precision"):
        local_lipschitz(rounded, x, tolerance=1e-5)
    assert bool(local_norms(exact, x, tolerance=1e-5).converged.all())
    assert local_lipschitz(rounded, x, tolerance=0.05).shape == (4,)


def test_norms_of_products_that_say_nothing_are_refused(monkeypatch):
    """A residual of order 1, as forward and backward products of different matrices would leave."""
    half = torch.tensor([0.01, 0.5], dtype=F64)
    torn = LocalNorms(half, half, noise(2, 20), noise(2, 20), 77, 1e-5)
    monkeypatch.setattr("hnkit.lipschitz.local.local_norms", lambda *args, **kwargs: torn)
    with pytest.raises(
        InputError, match=r"sample 1 did not converge: relative residual 0.5 .*: run the map in a higher"
    ):
        local_lipschitz(torch.sin, noise(2, 20))
