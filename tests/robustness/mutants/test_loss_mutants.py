"""Small errors in `hnkit/loss.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import hnkit.loss
from hnkit import InputError, NoiseLoss
from hnkit.jacobian import RowJacobian, math_attention
from hnkit.loss import KL_TERMS


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def identity(z: Tensor) -> Tensor:
    return z


def no_reward(y: Tensor) -> Tensor:
    return 0 * y.sum(1)


def fixed_probes(monkeypatch: pytest.MonkeyPatch, *probes: list[float]) -> None:
    """Every sample gets these probes."""

    def draw(rows, dim, kind, generator, device):
        assert rows % len(probes) == 0
        return f64(*probes).repeat(rows // len(probes), 1)

    monkeypatch.setattr(hnkit.loss, "draw_probes", draw)


def scaled(*factors: float):
    """The map of the diagonal matrix with these entries."""
    return lambda x: x * f64(*factors)


@pytest.mark.parametrize("tolerance", [1.0, 1.5])
def test_a_tolerance_of_one_asks_for_nothing_and_is_refused(tolerance):
    with pytest.raises(InputError, match="tolerance"):
        NoiseLoss(tolerance=tolerance)


@pytest.mark.parametrize("kl", [kl for kl in KL_TERMS if kl != "arnoldi"])
def test_a_term_without_a_linear_solve_reports_no_error_of_one(kl):
    terms = NoiseLoss(kl)(scaled(0.3, -0.2), torch.ones(3, 2, dtype=torch.float64), identity, no_reward)
    assert terms.solve_error.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_two_probes_are_the_mean_of_each_alone(monkeypatch, kl):
    """Of a map whose rows have different Jacobians."""
    x = f64([0.1, -0.2], [0.3, 0.2], [-0.1, 0.4])
    pair = ([1.0, 1.0], [1.0, -1.0])

    def terms(*probes):
        fixed_probes(monkeypatch, *probes)
        mix = f64([0.5, 1.0], [-0.7, 0.2])
        return NoiseLoss(kl, probes=len(probes))(lambda z: z.square() @ mix, x, identity, no_reward)

    together, first, second = terms(*pair), terms(pair[0]), terms(pair[1])
    torch.testing.assert_close(together.kl, (first.kl + second.kl) / 2)
    assert bool(((first.kl - second.kl).abs() > 1e-3).all())
    torch.testing.assert_close(together.solve_error, torch.maximum(first.solve_error, second.solve_error))


class Attention(nn.Module):
    """Two tokens of two channels through scaled-dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.mix = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x.reshape(-1, 2, 2)).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].reshape(x.shape)


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_one_probe_through_attention_trains(monkeypatch, kl):
    """The mean of the gradients of single probes, over all sign vectors, is that of the dense Jacobian's term."""
    f = Attention().double()
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = list(f.parameters())
    total = [torch.zeros_like(weight) for weight in weights]
    signs = list(itertools.product((-1.0, 1.0), repeat=4))
    for probe in signs:
        fixed_probes(monkeypatch, list(probe))
        loss = NoiseLoss(kl, steps=4)(f, x, identity, no_reward).total.sum()
        total = [old + new / len(signs) for old, new in zip(total, torch.autograd.grad(loss, weights), strict=True)]
    with math_attention():
        J = torch.stack(
            [torch.autograd.functional.jacobian(lambda z: f(z[None])[0], row, create_graph=True) for row in x]
        )
        term = (J @ J).diagonal(dim1=1, dim2=2).sum() / 2
        if kl == "arnoldi":
            eye = torch.eye(4, dtype=torch.float64)
            term = J.diagonal(dim1=1, dim2=2).sum() - torch.linalg.slogdet(eye + J).logabsdet.sum()
        expected = torch.autograd.grad(f(x).square().sum() / 2 + term, weights)
    for found, reference in zip(total, expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kl", ["arnoldi", "second-order"])
def test_one_probe_evaluates_the_map_once(kl):
    calls = []

    def f(x):
        calls.append(x.shape[0])
        return 0.1 * x

    NoiseLoss(kl, probes=1)(f, torch.ones(3, 2, dtype=torch.float64), identity, no_reward)
    assert calls[-1] == 3


def test_the_worst_probe_of_a_sample_is_reported(monkeypatch):
    """An eigenvector is solved for in one step; (1, 1) is not.

    For J = diag(a, b), v = (1, 1), q = v / sqrt 2: J q has the part (a + b)/2 along q and (a - b)/2 across, and the
    one-dimensional least-squares problem leaves the part of J q perpendicular to (I + J) q.
    """
    a, b = 0.5, -0.2
    along, across = (a + b) / 2, (a - b) / 2
    size = math.hypot(along, across)
    residual = across / (size * math.hypot(1 + along, across))
    expected = residual / (1 - size)
    for probes in (([1.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 1.0])):
        fixed_probes(monkeypatch, *probes)
        terms = NoiseLoss("arnoldi", probes=2, steps=1)(scaled(a, b), torch.ones(2, 2).double(), identity, no_reward)
        assert terms.solve_error.tolist() == pytest.approx([expected, expected])


def test_the_error_of_an_expansive_solve_comes_from_the_small_system(monkeypatch):
    """As before with a norm above 1, where `1 - |J|` says nothing: the margin is `|(I + J) q|`."""
    a, b = 1.5, -0.2
    along, across = (a + b) / 2, (a - b) / 2
    assert math.hypot(along, across) > 1
    system = math.hypot(1 + along, across)
    expected = across / (math.hypot(along, across) * system) / system
    fixed_probes(monkeypatch, [1.0, 1.0])
    terms = NoiseLoss("arnoldi", steps=1)(scaled(a, b), torch.ones(3, 2).double(), identity, no_reward)
    assert terms.solve_error.tolist() == pytest.approx([expected] * 3)


@pytest.mark.parametrize(("options", "count"), [({"steps": 6}, 6), ({}, 2)])
def test_the_tolerance_ends_adaptive_steps_alone(options, count):
    """At norm 0.05 in 6 dimensions, m steps leave a residual of about 0.05^(m - 1): two meet a tolerance of 0.5."""
    mix = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mix *= 0.05 / torch.linalg.matrix_norm(mix, 2)
    operator = RowJacobian(lambda x: x @ mix.T, torch.ones(1, 6, dtype=torch.float64), twice=True)
    probe = f64([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    _, weight, _ = NoiseLoss("arnoldi", tolerance=0.5, **options)._value_and_weight(operator, probe)
    assert operator.num_vjp == count
    exact = torch.linalg.solve(torch.eye(6, dtype=torch.float64) + mix.T, mix.T @ probe[0])
    error = float((weight[0] - exact).norm() / exact.norm())
    assert error < 1e-13 if count == 6 else 1e-4 < error < 0.5


@pytest.mark.parametrize("slopes", [(-1.5,), (-1.1, 0.4), (0.9, 0.01), (-0.95, 0.001), (1.0,), (-3.0, 0.2, 1.0)])
def test_value_at_jacobians_of_any_norm_in_one_batch(slopes):
    """In one dimension `E = J - log|1 + J|` and the solve is exact: its reported error is 0."""
    x = torch.zeros(len(slopes), 1, dtype=torch.float64)
    terms = NoiseLoss("arnoldi")(Slopes(slopes), x, identity, no_reward)
    assert terms.kl.tolist() == pytest.approx([s - math.log(abs(1 + s)) for s in slopes], rel=1e-11)
    assert terms.solve_error.tolist() == pytest.approx([0.0] * len(slopes), abs=1e-12)


class Slopes:
    """`f(x) = s x` with a slope of its own for each row."""

    def __init__(self, slopes) -> None:
        self.slopes = torch.as_tensor(slopes, dtype=torch.float64)

    def __call__(self, x: Tensor) -> Tensor:
        return self.slopes[:, None] * x

    def select(self, index: Tensor) -> Slopes:
        return Slopes(self.slopes[index])
