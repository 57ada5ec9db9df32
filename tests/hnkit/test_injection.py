"""Injected noise: the law of what is deployed, the bound of its KL, and what a sample of it certifies."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import beta, norm

from hnkit import InputError
from hnkit.injection import (
    NoiseInjection,
    bounded_mean_upper,
    deployed_noise,
    fresh_noise,
    injected_bound,
    lipschitz_mean_square_upper,
)
from hnkit.internal.seeds import forked

SHARES = (0.1, 0.5, 0.9)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise(n: int, d: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- what is deployed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
def test_the_coefficients_keep_the_variance(share):
    """Read off at unit vectors: a^2 + b^2 = 1, b^2 is the share, and f = 0 leaves the law of the noise as it is."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    injection = NoiseInjection(share)
    a, f, b = (
        float(injection.moved(*arguments)) for arguments in ((one, zero, zero), (zero, one, zero), (zero,) * 2 + (one,))
    )
    assert a == f
    assert b**2 == pytest.approx(share, rel=1e-14)
    assert a**2 + b**2 == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("share", SHARES)
def test_the_bound_is_the_kl_of_the_pair(share):
    """For f = c the pair (x, x_hat) is Gaussian beside (x, a x + b eps), and its KL that of a shift of the mean."""
    shift = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    injection = NoiseInjection(share)
    a2, c2 = 1 - share, 0.7**2 + 1.3**2
    # mean (0, a c), covariance [[1, a], [a, 1]] in each coordinate, whose inverse has 1 / (1 - a^2) at the second place
    expected = 0.5 * a2 * c2 / (1 - a2)
    assert float(injection.nats(shift)) == pytest.approx(expected, rel=1e-14)
    if share == 0.5:
        assert float(injection.nats(shift)) == pytest.approx(c2 / 2, rel=1e-14)


def test_deltas_are_clipped_by_row_and_keep_their_direction():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    clipped = NoiseInjection(0.5, 2.0).clipped(delta)
    torch.testing.assert_close(clipped.detach().norm(dim=1), torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(clipped.detach()[0] / 2, delta.detach()[0] / 5)
    clipped.sum().backward()
    assert bool(torch.isfinite(delta.grad).all())
    assert NoiseInjection(0.5).clipped(delta) is delta
    # a row on the sphere loses what points outwards
    assert float((delta.grad[0] * delta.detach()[0]).sum()) == pytest.approx(0, abs=1e-12)


def test_fresh_noise_of_a_row_depends_on_its_generator_alone():
    x = torch.zeros(3, 2, 2)
    whole = fresh_noise(x, generators(5, 6, 7))
    assert torch.equal(whole[1:2], fresh_noise(x[1:2], generators(6)))
    assert fresh_noise(x.half(), generators(5, 6, 7)).dtype == torch.float32
    one = fresh_noise(x, torch.Generator().manual_seed(1))
    assert torch.equal(one, torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1)))
    for wrong, words in (
        (generators(1), "1 generators for 3 rows"),
        ([1, 2, 3], "no torch.Generator"),
        (3, "no torch.Gen"),
    ):
        with pytest.raises(InputError, match=words):
            fresh_noise(x, wrong)


def test_what_is_deployed_is_drawn_row_by_row():
    x, delta = noise(2), noise(2, seed=1)
    plain, _ = deployed_noise(None, x, delta, None)
    assert torch.equal(plain, x + delta)
    first, used = deployed_noise(NoiseInjection(0.5, 0.1), x, delta, generators(1, 2))
    assert float(used.norm(dim=1).max()) <= 0.1 + 1e-12
    other, _ = deployed_noise(NoiseInjection(0.5, 0.1), x, delta, generators(3, 2))
    assert not torch.equal(other[0], first[0])
    assert torch.equal(other[1], first[1])
    assert deployed_noise(NoiseInjection(), x.half(), delta, generators(1, 2))[0].dtype == torch.float16


def test_a_forked_generator_depends_on_state_and_purpose_and_leaves_the_other_alone():
    given = torch.Generator().manual_seed(1)
    first = forked(given, "a").initial_seed()
    assert torch.equal(given.get_state(), torch.Generator().manual_seed(1).get_state())
    assert first == forked(torch.Generator().manual_seed(1), "a").initial_seed() != forked(given, "b").initial_seed()
    torch.randn(3, generator=given)
    assert forked(given, "a").initial_seed() != first


def test_the_injected_noise_is_standard_normal_and_independent_of_the_noise():
    """f = 0 at 10,000 rows: mean, variance and covariance with x by z-tests at 1e-6 each (two-sided, |z| < 4.9)."""
    n, share = 10_000, 0.3
    x = noise(n, 1)
    moved, _ = deployed_noise(
        NoiseInjection(share), x, torch.zeros_like(x), [torch.Generator().manual_seed(i) for i in range(n)]
    )
    for values, mean, spread in (
        (moved, 0.0, 1.0), (moved.square(), 1.0, math.sqrt(2)), (moved * x, math.sqrt(1 - share), math.sqrt(2 - share)),
    ):  # fmt: skip
        assert abs(float(values.mean()) - mean) < 4.9 * spread / math.sqrt(n)


@pytest.mark.parametrize("arguments", [(0.0,), (1.0,), (-0.5,), (math.nan,), ("x",), (0.5, 0.0), (0.5, math.inf)])
def test_bad_values_are_one_line(arguments):
    with pytest.raises(InputError) as caught:
        NoiseInjection(*arguments)
    assert "\n" not in str(caught.value)


# --- what is known of the KL ------------------------------------------------------------------------------------


def test_the_bound_of_values_in_an_interval_is_hoeffding_s():
    """At a mean of 0 the largest q has (1 - q)^n = 1 - c; it is never below Clopper and Pearson's exact bound."""
    n = 50
    assert bounded_mean_upper(torch.zeros(n), 2.0) == pytest.approx(2 * (1 - 0.05 ** (1 / n)), rel=1e-9)
    assert bounded_mean_upper(3 * torch.ones(n), 3.0) == pytest.approx(3.0)
    for successes in (1, 10, 40):
        coins = (torch.arange(n) < successes).double()
        exact = beta.ppf(0.95, successes + 1, n - successes)
        found = bounded_mean_upper(coins, 1.0)
        assert exact < found < exact + 0.1
    with pytest.raises(InputError, match="outside"):
        bounded_mean_upper(torch.tensor([0.5, 1.5]), 1.0)


def test_certificates_hold_as_often_as_they_say():
    """2,000 repetitions of n = 16: neither certificate misses more than 5 % of the time (one-sided z-test at 1e-6)."""
    repeats, n = 2000, 16
    allowed = 0.05 + norm.isf(1e-6) * math.sqrt(0.05 * 0.95 / repeats)
    uniform = torch.rand(repeats, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    skewed = (uniform > 0.8).double()
    missed = sum(bounded_mean_upper(values, 1.0) < 0.2 for values in skewed) / repeats
    assert 0 < missed < allowed
    # f(x) = 0.5 x in one dimension: E|f|^2 = 1/4, and the sharpest L is 0.5
    x = noise(repeats * n, 1).view(repeats, n)
    missed = sum(lipschitz_mean_square_upper((0.5 * row).square(), 0.5) < 0.25 for row in x) / repeats
    assert missed < allowed
    # the concentration is tight enough to fail with half the constant
    assert sum(lipschitz_mean_square_upper((0.5 * row).square(), 0.1) < 0.25 for row in x) / repeats > allowed


def test_what_is_known_is_said_in_words_that_keep_bound_and_estimate_apart():
    delta = noise(200)
    plain = injected_bound(delta, NoiseInjection(0.5))
    assert plain.nats.value == pytest.approx(float(delta.square().sum(1).mean()) / 2)
    assert plain.certified is None
    assert plain.ceiling is None
    assert "at most" in plain.sentence()
    assert "mean is estimated" in plain.sentence()
    assert "no certificate" in plain.sentence()
    smooth = injected_bound(delta, NoiseInjection(0.5), lipschitz=1.0)
    assert smooth.certified == pytest.approx(0.5 * lipschitz_mean_square_upper(delta.square().sum(1), 1.0))
    clipped = injected_bound(delta, NoiseInjection(0.2, 1.0))
    assert clipped.ceiling == pytest.approx(0.8 / 0.4)
    assert clipped.nats.value < clipped.certified < clipped.ceiling
    assert "for certain" in clipped.sentence()
    with pytest.raises(InputError, match="no samples"):
        injected_bound(delta[:0], NoiseInjection(0.5))
