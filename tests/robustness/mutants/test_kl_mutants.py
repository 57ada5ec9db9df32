"""Small errors in `hnkit/kl.py` that no other test noticed, found by benchmarks/mutate.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hnkit import InputError, noise_kl

TURN = torch.tensor([[0.0, -0.4], [0.4, 0.0]], dtype=torch.float64)


def f64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def noise(n: int, d: int = 2) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def turned(x: Tensor) -> Tensor:
    """0.4 times a quarter turn: every probe of two signs sees the same of it."""
    return x @ TURN


class Counted(torch.autograd.Function):
    """`x / 4`, counting the rows that products with its Jacobian are made of."""

    pulled = pushed = 0

    @staticmethod
    def forward(x):
        return x / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        Counted.pulled += grad.shape[0]
        return grad / 4

    @staticmethod
    def jvp(ctx, tangent):
        Counted.pushed += tangent.shape[0]
        return tangent / 4


def test_no_truncation_is_not_printed():
    estimate = noise_kl(lambda x: 0.1 * x, torch.zeros(3, 2, dtype=torch.float64))
    half = replace(estimate.parts, truncation=torch.full((3,), 0.5))
    assert "truncation" not in str(replace(estimate, bias_bound=None))
    assert "truncation about 0.5" in str(replace(estimate, bias_bound=None, parts=half))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lipschitz": math.inf}, "lipschitz inf"),
        ({"lipschitz": -0.1}, "lipschitz -0.1"),
        ({"tolerance": 1.0}, "tolerance 1.0"),
        ({"tolerance": 1.5}, "tolerance 1.5"),
        ({"method": "arnoldi", "rel_error": 1.0}, "rel_error 1.0"),
        ({"probes": 2**40}, "below 2\\^40"),
        ({"method": "arnoldi", "probes": 1, "variance_reduction": "xtrace"}, "2 probes or more"),
    ],
)
def test_options_just_outside_their_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        noise_kl(turned, noise(2), **{"method": "l2", **options})


def test_options_at_the_edge_of_their_range_are_accepted():
    assert noise_kl(lambda x: 0 * x + 1, noise(2), method="l2", lipschitz=0.0).bias_bound == 0.0
    assert noise_kl(turned, noise(2), method="l2", probes=2**40 - 1).probes == 0
    pair = noise_kl(turned, noise(3), method="arnoldi", probes=2, variance_reduction="xtrace")
    assert pair.probes == 2


def test_a_lipschitz_constant_of_one_bounds_nothing():
    assert noise_kl(turned, noise(2), method="l2", lipschitz=1.0).bias_bound is None
    assert noise_kl(turned, noise(2), method="second-order", lipschitz=1.0).bias_bound is None


@pytest.mark.parametrize("n", [1, 5])
def test_the_error_of_the_truncation_is_a_mean_over_samples(n):
    """`h(L) - L^2/2` for each dimension bounds what the second-order term leaves of the log-determinant."""
    estimate = noise_kl(turned, noise(n), method="second-order", lipschitz=0.4)
    assert estimate.bias_bound == pytest.approx(2 * (-math.log(0.6) - 0.4 - 0.08), rel=1e-12)
    alone = noise_kl(turned, noise(1), method="second-order", lipschitz=0.4)
    assert estimate.bias_estimate == pytest.approx(alone.bias_estimate, rel=1e-12)
    assert estimate.bias_estimate > 0


def test_the_symmetry_index_of_small_jacobians():
    assert noise_kl(lambda x: 0.01 * x, noise(3)).symmetry_index == pytest.approx(1.0)
    assert noise_kl(turned, noise(3)).symmetry_index == pytest.approx(-1.0)


def test_the_local_norm_is_the_largest_seen():
    estimate = noise_kl(lambda x: x.square() / 4, f64([0.2], [-1.5], [1.0]), method="arnoldi")
    assert estimate.local_norm == pytest.approx(0.75)


@pytest.mark.parametrize("size", [{"rel_error": 0.2}, {"budget": 60}, {}], ids=str)
@pytest.mark.parametrize("method", ["arnoldi", "lanczos"])
def test_every_product_with_the_jacobian_is_counted(method, size):
    """Those of the pilot run too."""
    Counted.pulled = Counted.pushed = 0
    estimate = noise_kl(Counted.apply, noise(6), method=method, probes=2, check=False, certify=False, **size)
    assert (estimate.num_vjp, estimate.num_jvp) == (Counted.pulled, Counted.pushed)
    assert estimate.num_vjp > 0
    assert (estimate.num_jvp > 0) == (method == "lanczos")


def test_a_map_is_prepared_for_compilation_only_if_it_is_compiled(monkeypatch):
    monkeypatch.setattr("hnkit.kl.divergence.reusable_graphs", lambda: pytest.fail("nothing is compiled"))
    assert noise_kl(turned, noise(3)).error == pytest.approx(-math.log1p(0.4**2))
