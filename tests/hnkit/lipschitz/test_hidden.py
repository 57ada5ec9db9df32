"""One hidden layer, and bounded maps that keep orientation: certificates of injectivity beyond norms and monotony."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from hnkit import Sum, certify_injective, noise_kl
from hnkit.lipschitz.certify import certified_bounds
from hnkit.lipschitz.hidden import hidden_dominance
from tests.hnkit.functions import f64, noise


def layers(W: Tensor, V: Tensor, s: nn.Module) -> nn.Sequential:
    first, last = (nn.Linear(*A.T.shape, dtype=torch.float64) for A in (W, V))
    with torch.no_grad():
        first.weight.copy_(W)
        last.weight.copy_(V)
    return nn.Sequential(first, s, last).requires_grad_(False)


def test_a_ridge_is_injective_at_any_norm() -> None:
    """`f(x) = v tanh(w.x)`: det(I + J) = 1 + s' w.v, positive exactly if w.v > -1, whatever |w||v|."""
    w = f64([3.0, 0.0])
    for along, status in ((0.0, "certified"), (5.0, "certified"), (-0.33, "certified"), (-0.34, "unknown")):
        f = layers(w, f64([along], [4.0]), nn.Tanh())
        certificate = certify_injective(f)
        assert certificate.status == status
        assert certificate.everywhere
        assert ("hidden layer" in certificate.how) == (status == "certified")
    assert noise_kl(layers(w, f64([-0.33], [4.0]), nn.Tanh()), noise(4, 2)).injective == "certified"


def test_both_ends_of_the_slopes_count() -> None:
    w, v = f64([20.0, 0.0]), f64([1.0], [7.0])
    assert certify_injective(layers(w, v, nn.Tanh())).status == "certified"
    assert certify_injective(layers(w, v, nn.GELU())).status == "unknown"  # GELU falls by 0.129 x 20
    assert certify_injective(layers(w / 4, v, nn.GELU())).status == "certified"


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-0.13, 1.13), (-1.0, 0.0), (0.25, 0.5)])
def test_what_is_certified_keeps_its_sign_on_the_whole_box(low: float, high: float) -> None:
    """Determinants at all vertices (they are affine in every slope, so that those decide) of random layers."""
    certified = 0
    for seed in range(60):
        W, V = noise(4, 6, seed=seed) / 3, noise(6, 4, seed=100 + seed) / 3
        vertices = torch.tensor(list(product((low, high), repeat=4)), dtype=torch.float64)
        J = torch.einsum("dk,vk,ke->vde", V, vertices, W)
        least = float(torch.linalg.det(torch.eye(6, dtype=torch.float64) + J).min())
        if hidden_dominance(W, V, low, high):
            certified += 1
            assert least > 0
    assert certified >= 5


def test_a_fold_is_never_certified() -> None:
    for size in (1.0001, 1.2, 100.0):
        assert not hidden_dominance(f64([1.0]), f64([-size]), 0.0, 1.0)
    assert hidden_dominance(f64([1.0]), f64([-0.9999]), 0.0, 1.0)
    assert not hidden_dominance(f64([1.0]), f64([-1.0]), 0.0, 1.0)  # singular, and no margin for rounding
    assert not hidden_dominance(f64([1e200]), f64([1e200]), 0.0, 1.0)
    assert not hidden_dominance(f64([1.0, 2.0]), f64([1.0]), 0.0, 1.0)  # shapes that do not meet


def test_boundedness_passes_through_layers() -> None:
    linear = nn.Linear(3, 3, dtype=torch.float64)
    for f, bounded in (
        (nn.Tanh(), True),
        (nn.Sequential(linear, nn.Sigmoid(), linear), True),
        (nn.Sequential(nn.Tanh(), nn.ReLU()), True),
        (Sum(nn.Tanh(), nn.Sequential(linear, nn.Softsign())), True),
        (Sum(nn.Tanh(), nn.Identity()), False),
        (nn.ReLU(), False),
        (nn.Sequential(linear, nn.GELU(), linear), False),
        (nn.Identity(), False),
    ):
        assert certified_bounds(f).bounded is bounded, f


class Declared(nn.Module):
    """`f = -tanh`, of which two facts are declared: T is strictly increasing with a slope of 0 at the origin."""

    def __init__(self, bounded: object = True, oriented: object = True) -> None:
        super().__init__()
        self.facts = bounded, oriented

    def forward(self, x: Tensor) -> Tensor:
        return -torch.tanh(x)

    def lipschitz_upper(self) -> float:
        return 1.0

    def bounded(self) -> bool:
        return self.facts[0]

    def oriented(self) -> bool:
        return self.facts[1]


def test_injective_almost_everywhere() -> None:
    certificate = certify_injective(Declared())
    assert (certificate.status, certificate.everywhere) == ("certified", False)
    assert certificate.how.startswith("almost everywhere: f is bounded")
    assert noise_kl(Declared(), noise(5, 2)).injective == "certified"
    for facts in ((False, True), (True, False), (False, False)):
        assert certify_injective(Declared(*facts)).status == "unknown"
    wrong = certify_injective(Declared("yes"))
    assert wrong.status == "unknown"
    assert "True or False is needed" in wrong.how
