"""When the L2 term is good enough: verdicts against KLs in closed form, by quadrature and by dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from hnkit import InputError, l2_verdict, noise_kl
from hnkit.kl.verdict import L2Verdict, _beyond_third, _Moments, _percent
from tests.hnkit.functions import Linear, Once, noise, seeded
from tests.hnkit.operator_zoo import KINDS, exact_error, matrix


def linear_missed(A: Tensor) -> float:
    """`(KL - L2) / KL` of `f(x) = Ax`, in closed form."""
    error = float(torch.trace(A) - torch.linalg.slogdet(torch.eye(len(A), dtype=A.dtype) + A).logabsdet)
    return error / (float(A.square().sum()) / 2 + error)


def judged(A: Tensor, n: int = 64, **options: float) -> L2Verdict:
    return l2_verdict(Linear(A), noise(n, len(A), seed=5), generator=seeded(1), **options)


def test_a_gradient_field_loses_half() -> None:
    """Symmetric J: the L2 term misses half, which the second order mends."""
    A = matrix("symmetric", 0.4, 24)
    found = judged(A)
    assert found.lower < linear_missed(A) < found.upper
    assert 0.4 < found.lower < 0.5 < found.upper < 0.6
    assert not found.good
    assert found.advice == "second-order"
    assert str(found).startswith("use --kl second-order: the L2 term misses 4")
    assert "of the KL (95 %); tr(J²) is " in str(found)


def test_a_rotation_is_overcounted() -> None:
    """Skew J costs almost nothing and the L2 term counts it in full: to second order the KL vanishes."""
    A = matrix("skew", 0.5, 24)
    found = judged(A, 128)
    assert linear_missed(A) < -10
    assert found.ratio.value == pytest.approx(-1, abs=4 * found.ratio.stderr)
    assert found.lower == -math.inf
    assert not found.good
    assert found.advice == "arnoldi"  # no order of a series is small beside a KL of almost nothing
    half = judged(A + 0.5 * matrix("symmetric", 0.5, 24), 128)
    truth = linear_missed(A + 0.5 * matrix("symmetric", 0.5, 24))
    assert half.lower < truth < half.upper < 0
    assert "overcounts" in str(half)


def test_a_generic_map_is_counted_right() -> None:
    for kind in ("gaussian", "nilpotent"):
        A = matrix(kind, 0.3, 64)
        found = judged(A)
        assert found.lower < linear_missed(A) < found.upper
        assert found.good
        assert found.within < 0.1
        assert found.advice == "l2"
        assert str(found).startswith(f"the L2 term is within {_percent(found.within)} of the KL (95 %): tr(J²) is ")
        assert not judged(A, tolerance=1e-3).good  # the tolerance decides


def test_one_dimension_by_quadrature() -> None:
    """`f = 0.2 sin 3x`: KL 0.114620 nats, L2 term 0.01, so that 91 % is missed."""
    found = l2_verdict(lambda x: 0.2 * torch.sin(3 * x), noise(400, 1), generator=seeded())
    missed = 1 - 0.0100000 / 0.114620
    assert found.lower < missed < found.upper
    assert found.advice == "arnoldi"
    assert not found.good


def test_a_network_against_its_exact_kl() -> None:
    torch.manual_seed(1)
    f = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).double().requires_grad_(False)
    exact = noise_kl(f, noise(2000, 32, seed=3))
    found = l2_verdict(f, noise(64, 32, seed=4), generator=seeded(2))
    missed = (exact.value - exact.l2) / exact.value
    assert found.lower - 0.01 < missed < found.upper + 0.01
    assert found.local_norm < 1


def test_the_interval_covers() -> None:
    """100 runs of 24 samples at a norm so small that the interval is sampling error alone.

    At a coverage of 94 %, for the delta method on 24 samples may lose a percent, fewer than 86 hits have a chance of
    1e-3; all 100 have one of 6e-3 at 95 %.
    """
    A = matrix("gaussian", 0.05, 8)
    truth, hits = linear_missed(A), 0
    for seed in range(100):
        found = l2_verdict(Linear(A), noise(24, 8, seed=1000 + seed), probes=1, generator=seeded(seed))
        hits += found.lower <= truth <= found.upper
    assert 86 <= hits <= 99


@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_beyond_the_third_order_is_bounded(kind: str) -> None:
    for norm in (1e-3, 0.3, 0.9, 0.99):
        A = matrix(kind, norm, 8)
        A2 = A @ A
        sizes = A2.square().sum()[None], (A2 @ A).square().sum()[None]
        moments = _Moments(sizes[0], sizes[0], sizes[0], *sizes, 0)
        bound = float(_beyond_third(moments, torch.tensor([norm + 1e-12], dtype=torch.float64)))
        left = exact_error(A) - float(torch.trace(A2)) / 2 + float(torch.trace(A2 @ A)) / 3
        assert abs(left) <= bound + 1e-15
        assert bound <= 6 * abs(left) or kind != "negative"  # all eigenvalues are -L: not far from attained


def test_where_the_bound_is_void() -> None:
    """A norm above 1 leaves nothing bounded: never good, whatever the second order says."""
    found = judged(matrix("gaussian", 1.5, 24))
    assert found.remainder == math.inf
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    assert abs(found.missed) < 0.2
    assert not found.good
    assert found.advice == "exact"
    assert "a local norm of 1.5" in str(found)
    assert "nothing bounds" in str(found)
    assert judged(matrix("skew", 1.5, 24)).advice == "exact"
    wide = l2_verdict(lambda x: 1.5 * torch.tanh(x.roll(1, 1)), noise(3, 600), probes=1, generator=seeded())
    assert wide.advice == "arnoldi"  # d products per sample are no advice at d = 600


def test_a_shear_needs_no_norm() -> None:
    """J^2 = 0: E(J) = 0 exactly, at norms far above 1."""

    def shear(x: Tensor) -> Tensor:
        return torch.stack([7 * torch.tanh(x[:, 1]), torch.zeros_like(x[:, 1])], 1)

    found = l2_verdict(shear, noise(16, 2), generator=seeded())
    assert found.local_norm > 1
    assert (found.remainder, found.lower, found.upper) == (0.0, 0.0, 0.0)
    assert str(found).startswith("the L2 term is within 0 % of the KL (95 %)")


def test_nothing_at_all() -> None:
    for f in (lambda x: 0 * x, lambda x: 0 * x + 2):
        found = l2_verdict(f, noise(4, 3))
        assert (found.missed, found.within, found.good, found.advice) == (0.0, 0.0, True, "l2")
    assert "f vanishes at every sample" in str(l2_verdict(lambda x: 0 * x, noise(4, 3)))


class Backward(torch.autograd.Function):
    """`sin x / 2` with its first derivative backward and no other."""

    forward = staticmethod(lambda ctx, x: (ctx.save_for_backward(x), x.sin() / 2)[1])
    backward = staticmethod(
        torch.autograd.function.once_differentiable(lambda ctx, grad: grad * ctx.saved_tensors[0].cos() / 2)
    )


def test_the_finding_is_the_verdict_without_its_advice() -> None:
    x = noise(64, 3)
    for slope, good in ((0.4, False), (0.0, True)):
        verdict = l2_verdict(Linear(slope * torch.eye(3, dtype=torch.float64)), x)
        advice = "" if good else f"use --kl {verdict.advice}: "
        assert str(verdict) == f"{advice}{verdict.finding}"
        assert "--kl" not in verdict.finding


def test_one_sample_that_carries_all_bounds_nothing() -> None:
    """Where f vanishes at all samples but one, the ratio of means has no spread to see, and is no less unknown."""

    def rare(x: Tensor) -> Tensor:
        return 0.3 * torch.relu(x - 2.2)

    x = torch.cat([torch.full((1, 2), 2.5), torch.zeros(15, 2)]).double()
    found = l2_verdict(rare, x, generator=seeded())
    assert found.ratio.stderr < 1e-12
    assert found.within == math.inf
    assert not found.good


def test_without_local_norms_nothing_is_bounded() -> None:
    found = l2_verdict(Backward.apply, noise(8, 20), generator=seeded())
    assert math.isnan(found.local_norm)
    assert found.within == math.inf
    assert not found.good
    assert "without local norms nothing bounds the rest" in str(found)
    assert l2_verdict(Once.apply, noise(8, 20), generator=seeded()).local_norm <= 1.02


def test_products_are_counted() -> None:
    f, x = Linear(matrix("gaussian", 0.5, 32)), noise(5, 32)
    one = l2_verdict(f, x, probes=1, generator=seeded())
    three = l2_verdict(f, x, probes=3, generator=seeded())
    assert three.products - one.products == 2 * 3 * 5
    assert one.products < 60 * 5
    assert (one.samples, three.samples) == (5, 5)


def test_bfloat16() -> None:
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh()).requires_grad_(False)
    with torch.no_grad():
        net[0].weight.copy_(matrix("symmetric", 0.4, 24))
    half = l2_verdict(net.bfloat16(), noise(32, 24).bfloat16(), generator=seeded())
    full = l2_verdict(net.double(), noise(32, 24), generator=seeded())
    assert half.missed == pytest.approx(full.missed, abs=0.03)
    assert half.advice == full.advice == "second-order"


def test_bad_input() -> None:
    f = Linear(matrix("gaussian", 0.5, 4))
    with pytest.raises(InputError, match="one sample"):
        l2_verdict(f, noise(1, 4))
    with pytest.raises(InputError, match="tolerance"):
        l2_verdict(f, noise(2, 4), tolerance=2)
    with pytest.raises(InputError, match="probes"):
        l2_verdict(f, noise(2, 4), probes=0)
    with pytest.raises(InputError, match="not finite"):
        l2_verdict(lambda x: x / 0, noise(2, 4))
    with pytest.raises(InputError, match="shape"):
        l2_verdict(lambda x: x[:, :1], noise(2, 4))


def test_percentages_are_rounded_outward() -> None:
    assert [_percent(s) for s in (0.0, 0.0423, 0.0428, 0.5, 1.234, 0.00012)] == [
        "0 %",
        "4.3 %",
        "4.3 %",
        "50 %",
        "124 %",
        "0.012 %",
    ]
    assert [_percent(s, up=False) for s in (0.0423, 0.0428, 0.5)] == ["4.2 %", "4.2 %", "50 %"]


@pytest.mark.parametrize("slope", [-0.5, 0.4])
def test_the_third_order_counts(slope: float) -> None:
    """`f = a x`: every Rademacher probe is exact, and the share is `u / (1 + u)`, `u = (a^2/2 - a^3/3) d / L2`."""
    x = noise(20, 5)
    found = l2_verdict(lambda z: slope * z, x, generator=seeded())
    u = 5 * (slope**2 / 2 - slope**3 / 3) / (slope**2 * float(x.square().sum(1).mean()) / 2)
    assert found.missed == pytest.approx(u / (1 + u), rel=1e-12)
