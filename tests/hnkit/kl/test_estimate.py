"""The record of an estimated KL: what it prints, keeps per sample, and says of folds."""

import dataclasses
import math

import pytest
import torch

from hnkit import Estimate, noise_kl
from hnkit.internal.stats import rounded_up
from hnkit.kl import Arnoldi
from hnkit.kl.estimate import joined_estimates
from tests.hnkit.functions import Linear, network, noise, seeded
from tests.hnkit.operator_zoo import matrix


def test_printing() -> None:
    estimate = noise_kl(Linear(matrix("symmetric", 0.6, 6)), noise(4, 6), method="arnoldi", steps=3, lipschitz=0.6)
    assert (
        str(estimate)
        == f"{Estimate(estimate.value, estimate.stderr)} nats (bias at most {rounded_up(estimate.bias_bound, 2)})"
    )
    assert str(dataclasses.replace(estimate, value=1.0, stderr=0.25, bias_bound=0.0)) == "1.00 ± 0.25 nats"
    unproved = dataclasses.replace(estimate, bias_bound=None)
    assert str(unproved).endswith(f" nats (truncation about {estimate.bias_estimate:.2g})")
    assert repr(estimate) == f"KLEstimate({estimate}, arnoldi, 4 samples, injective: unknown)"
    assert isinstance(estimate, Estimate)


def test_parts_are_kept_per_sample() -> None:
    f, x = network(), noise(5, 6)
    J = torch.func.vmap(torch.func.jacrev(f))(x).detach()
    for method in ("exact", Arnoldi(probes=4)):
        estimate = noise_kl(f, x, method=method, form="change-of-variables", generator=seeded())
        parts = estimate.parts
        torch.testing.assert_close(parts.l2, f(x).detach().square().sum(1) / 2)
        torch.testing.assert_close(parts.alignment, (x * f(x).detach()).sum(1))
        torch.testing.assert_close(estimate.per_sample, parts.l2 + parts.error + parts.alignment - parts.trace)
        assert estimate.l2 == float(parts.l2.mean())
        assert estimate.error == float(parts.error.mean())
        assert Estimate.of(parts.error).value == estimate.error
    exact = noise_kl(f, x).parts
    torch.testing.assert_close(exact.trace, J.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(exact.frobenius, J.square().sum((1, 2)))


def test_folds_of_a_map_that_folds() -> None:
    """`f = -1.2 tanh 2x` folds the middle of the line: degree 1, eq. 53 0.058 (not the KL, 0.927)."""
    estimate = noise_kl(lambda x: -1.2 * torch.tanh(2 * x), noise(20_000, 1), form="change-of-variables")
    folds = estimate.folds
    assert folds is not None
    inside = math.acosh(math.sqrt(2.4)) / 2  # det = 1 - 2.4 / cosh(2x)^2 is negative for |x| below it
    mass = math.erf(inside / math.sqrt(2))
    assert abs(folds.negative / 20_000 - mass) < 4.5 * math.sqrt(mass * (1 - mass) / 20_000)
    assert mass < folds.upper < mass + 0.02
    assert abs(folds.degree.value - 1) < 4.5 * folds.degree.stderr
    assert folds.degree.stderr < 0.05
    assert abs(estimate.value - 0.058) < 4.5 * estimate.stderr + 5e-4
    assert "orientation reversed at" in str(folds)
    # E[1{det < 0} exp(-ell)] is the integral of the density of T x over folded points, by quadrature in x.
    t = torch.linspace(-inside, inside, 20_001, dtype=torch.float64)
    y = t - 1.2 * torch.tanh(2 * t)
    density = torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi) * (1 - 2.4 / torch.cosh(2 * t) ** 2).abs()
    assert abs(folds.folded.value - float(torch.trapezoid(density, t))) < 4.5 * folds.folded.stderr


def test_no_fold_is_said_with_its_bound() -> None:
    folds = noise_kl(network(), noise(59, 6)).folds
    assert folds is not None
    assert folds.negative == 0
    assert folds.upper == pytest.approx(1 - 0.05 ** (1 / 59))
    assert str(folds) == "no fold in 59 samples (at most 5 % of the noise, 95 %)"
    assert noise_kl(network(), noise(5, 6), method="arnoldi").folds is None


def test_no_truncation_is_not_printed():
    estimate = noise_kl(lambda x: 0.1 * x, torch.zeros(3, 2, dtype=torch.float64))
    half = dataclasses.replace(estimate.parts, truncation=torch.full((3,), 0.5))
    assert "truncation" not in str(dataclasses.replace(estimate, bias_bound=None))
    assert "truncation about 0.5" in str(dataclasses.replace(estimate, bias_bound=None, parts=half))


def test_the_fourth_verdict() -> None:
    """ "unknown" where nobody looked is not "unknown" where all signs were positive."""
    rough = noise_kl(Linear(matrix("gaussian", 1.2, 6)), noise(20, 6))
    assert (rough.injective, rough.injectivity) == ("unknown", "no fold seen")
    assert rough.folds is not None
    assert rough.folds.upper == pytest.approx(1 - 0.05 ** (1 / 20))
    unseen = noise_kl(network(), noise(5, 6), method="arnoldi", certify=False)
    assert (unseen.injective, unseen.injectivity) == ("unknown", "unknown")
    turned = noise_kl(lambda x: -3 * x, noise(5, 3))
    assert (turned.injective, turned.injectivity) == ("unknown", "unknown")
    folded = noise_kl(lambda x: -1.2 * torch.tanh(2 * x), noise(100, 1))
    assert (folded.injective, folded.injectivity) == ("violated", "violated")
    sure = noise_kl(torch.nn.Tanhshrink(), noise(5, 3))
    assert (sure.injective, sure.injectivity) == ("certified", "certified")


def test_an_estimate_of_blocks_is_that_of_all_samples():
    x = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(x):
        return 0.3 * torch.tanh(x.roll(1, -1)) + 0.1 * x

    whole = noise_kl(f, x)
    joined = joined_estimates([noise_kl(f, part) for part in x.split(3)], torch.zeros(len(x)))
    assert joined.value == pytest.approx(whole.value, rel=1e-12)
    assert joined.stderr == pytest.approx(whole.stderr, rel=1e-12)
    assert (joined.bias_bound, joined.injective, joined.method) == (whole.bias_bound, whole.injective, whole.method)
    assert (joined.num_vjp, joined.num_jvp) == (whole.num_vjp, whole.num_jvp)
    assert torch.allclose(joined.per_sample, whole.per_sample, rtol=1e-12)
    assert torch.allclose(joined.parts.alignment, whole.parts.alignment, rtol=1e-12)


def test_a_fold_between_blocks_is_seen_in_one_map_alone():
    def f(x):  # x + f(x) = x^2 / 2 folds at 0
        return x.square() / 2 - x

    x = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]], dtype=torch.float64)
    blocks = [noise_kl(f, part) for part in x.split(2)]
    assert {block.injective for block in blocks} == {"unknown"}
    count = sum(block.samples for block in blocks)
    assert joined_estimates(blocks, torch.zeros(count)).injective == "violated"
    assert joined_estimates(blocks, torch.arange(count)).injective == "unknown"
