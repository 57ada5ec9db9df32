"""The frontier against laws whose own is known: Gaussian and two-point rewards, and best-of-N by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from hnkit.errors import InputError
from hnkit.frontier import Frontier, curve

FALSE_ALARM = 1e-6


def gaussian(prompts: int, samples: int, seed: int, scale: float = 0.5) -> list[torch.Tensor]:
    """Rewards of law N(prompt, scale^2): `psi = beta^2 scale^2 / 2` whatever the prompt's mean."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(prompts, samples, generator=generator, dtype=torch.float64)
    return list(scale * draws + torch.arange(prompts)[:, None])


def within(found: torch.Tensor, truth: float) -> bool:
    """A z-test of the mean of independent replicates at the file's false-alarm rate."""
    radius = norm.isf(FALSE_ALARM / 2) * float(found.std()) / math.sqrt(len(found))
    return abs(float(found.mean()) - truth) <= radius


@pytest.mark.parametrize(("samples", "nats"), [(60, 0.2), (300, 0.6)])
def test_gaussian_rewards(samples, nats):
    points = [Frontier(gaussian(12, samples, seed)).point(nats) for seed in range(16)]
    gains = torch.tensor([point.gain for point in points], dtype=torch.float64)
    assert within(gains, 0.5 * math.sqrt(2 * nats))
    # the error bars are those of the replicates, within the chi-square spread of 16 of them
    ratio = float(gains.std()) / (sum(point.stderr for point in points) / len(points))
    assert 0.4 < ratio < 1.7
    # at the optimum beta = sqrt(2 K) / scale
    assert points[0].beta == pytest.approx(math.sqrt(2 * nats) / 0.5, rel=0.25)


def test_the_bootstrap_of_four_prompts():
    """Replicates of four prompts: without the correction of few units the mean variance is 3/4 of the true one."""
    gains, squares = [], []
    for seed in range(400):
        frontier = Frontier(gaussian(4, 60, seed))
        gains.append(float(frontier._minimum(frontier._at.psi, 0.1)[0]))
        squares.append(curve._spread(frontier._minimum(frontier._at.replicated, 0.1)[0], 4) ** 2)
    assert 0.87 < sum(squares) / len(squares) / float(torch.tensor(gains, dtype=torch.float64).var()) < 1.3


def test_one_prompt_has_an_error_bar_over_its_samples():
    gains = [Frontier(gaussian(1, 400, seed)).point(0.3) for seed in range(16)]
    values = torch.tensor([point.gain for point in gains], dtype=torch.float64)
    assert within(values, 0.5 * math.sqrt(0.6))
    assert 0.4 < float(values.std()) / (sum(point.stderr for point in gains) / 16) < 2


def test_an_efficiency_has_the_error_bar_of_its_replicates():
    """A shift of scale sqrt(2 K) buys everything; prompts differ in what they gain, and in how their rewards spread."""
    nats, truth = 0.15, 0.5
    found = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        scales = 0.5 + torch.rand(20, generator=generator, dtype=torch.float64)
        base = [s * torch.randn(80, generator=generator, dtype=torch.float64) for s in scales]
        whole = math.sqrt(2 * nats * (0.75 + 1 / 3))  # E s^2 of s uniform on [0.5, 1.5] is 13 / 12
        gains = truth * whole * scales + 0.2 * torch.randn(20, generator=generator, dtype=torch.float64)
        found.append(Frontier(base).efficiency_estimate(gains, nats, nats_stderr=0.0))
    values = torch.tensor([estimate.value for estimate in found], dtype=torch.float64)
    assert within(values, truth)
    # chi-square of 39 degrees of freedom, at the file's rate: the spread of the replicates over the mean error bar
    ratio = float(values.std()) / (sum(estimate.stderr for estimate in found) / len(found))
    assert 0.6 < ratio < 1.6
    # an error of the nats enters by the slope of the frontier: d log R / d log K = 1/2
    gains = torch.full((12,), 0.3, dtype=torch.float64)
    frontier = Frontier(gaussian(12, 400, 0))
    exact = frontier.efficiency_estimate(gains, nats)
    loose = frontier.efficiency_estimate(gains, nats, nats_stderr=0.3 * nats)
    assert math.sqrt(loose.stderr**2 - exact.stderr**2) == pytest.approx(0.15 * exact.value, rel=0.1)
    assert exact.value == pytest.approx(frontier.efficiency(0.3, nats))
    assert math.isnan(Frontier(gaussian(1, 400, 0)).efficiency_estimate(gains[:1], nats).stderr)


def test_tiny_budgets_follow_the_square_root():
    """Below the temperatures that are tried: an untrained map spends 1e-9 nats, which is no budget of 5e-7."""
    frontier = Frontier(gaussian(12, 400, 0))
    for nats in (1e-12, 1e-9, 4e-7, 1e-6, 1e-4):
        point = frontier.point(nats)
        assert point.gain == pytest.approx(0.5 * math.sqrt(2 * nats), rel=0.1)
        assert point.beta == pytest.approx(math.sqrt(2 * nats) / 0.5, rel=0.15)
        assert frontier.efficiency_estimate(torch.full((12,), point.gain), nats).value == pytest.approx(1)


def test_what_the_samples_do_not_carry_is_known_before_it_is_asked_for():
    frontier = Frontier(gaussian(10, 50, 0))
    for nats in torch.linspace(0.5, 1.2, 150).tolist():
        nats *= frontier.most_nats
        if frontier.carries(nats):
            frontier.point(nats)
        else:
            with pytest.raises(InputError, match="carry the frontier up to"):
                frontier.point(nats)
    assert not frontier.carries(0.0)
    assert not frontier.carries(frontier.most_nats)


def bernoulli_kl(q: float, p: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_two_point_rewards(share):
    """The best law within K nats of a coin is the coin q with KL(q || p) = K; the samples hold the share exactly."""
    count, nats = 500, 0.1
    r = (torch.arange(count) < share * count).double()
    found = Frontier([r, 3 + r]).point(nats)
    best = brentq(lambda q: bernoulli_kl(q, share) - nats, share, 1 - 1e-12)
    # without the jackknife the two agree exactly; it moves the estimate by a term of order 1 / n
    assert found.gain == pytest.approx(best - share, abs=5 / count)
    frontier = Frontier([r, 3 + r])
    alpha = frontier.temperature(nats)
    assert frontier.nats_at(alpha) == pytest.approx(nats, rel=0.05)
    odds = math.log(best / (1 - best)) - math.log(share / (1 - share))
    assert 1 / alpha == pytest.approx(odds, rel=0.05)


def test_units_and_offsets_of_the_reward():
    base = gaussian(5, 200, 3)
    plain, scaled = Frontier(base), Frontier([1e6 + 1e-3 * r for r in base])
    assert scaled.point(0.3).gain == pytest.approx(1e-3 * plain.point(0.3).gain, rel=1e-6)
    assert scaled.temperature(0.3) == pytest.approx(1e-3 * plain.temperature(0.3), rel=1e-6)
    order = Frontier(base[::-1])
    assert order.point(0.3).gain == pytest.approx(plain.point(0.3).gain, rel=1e-12)


def test_the_budget_goes_to_the_prompts_where_it_pays():
    """Two prompts of scales a and b: `psi = beta^2 (a^2 + b^2) / 4`, so that one beta beats equal nats a prompt."""
    a, b = gaussian(1, 4000, 0, 1.0)[0], gaussian(1, 4000, 1, 0.1)[0]
    found = Frontier([a, b]).point(0.2)
    together = math.sqrt(2 * 0.2 * (1 + 0.01) / 2)
    assert found.gain == pytest.approx(together, rel=0.05)
    assert found.gain > 0.5 * (1 + 0.1) * math.sqrt(2 * 0.2) * 1.1


def test_the_curve_rises_ends_and_says_why():
    frontier = Frontier(gaussian(10, 50, 0))
    points = frontier.curve()
    assert points[0].nats == 0.01
    assert all(b.gain > a.gain and b.effective < a.effective for a, b in itertools.pairwise(points))
    assert all(point.effective >= curve.LEAST_EFFECTIVE for point in points)
    assert points[-1].nats <= frontier.most_nats < math.log(50)
    with pytest.raises(InputError, match="carry the frontier up to"):
        frontier.point(3.0)
    with pytest.raises(InputError, match="the lowest that these samples carry"):
        frontier.nats_at(0.05)


def test_best_of_n_is_the_mean_over_all_choices():
    base = [
        torch.tensor([0.0, 5.0, 1.0, 1.0, 3.0, -2.0, 0.5, 2.0], dtype=torch.float64),
        torch.arange(9, dtype=torch.float64).square(),
    ]
    for n in (1, 2, 3, 8):
        gains = []
        for r in base:
            choices = list(itertools.combinations(r.tolist(), n))
            gains.append(sum(max(choice) for choice in choices) / len(choices) - float(r.mean()))
        assert Frontier(base).best_of(n).gain == pytest.approx(sum(gains) / 2, rel=1e-12, abs=1e-12)
    assert Frontier(base).best_of(4).nats == pytest.approx(math.log(4) - 0.75)


def test_best_of_n_lies_below_the_frontier_at_its_nats():
    frontier = Frontier(gaussian(30, 400, 5))
    for n in (2, 4):
        best = frontier.best_of(n)
        assert 0.8 < frontier.efficiency(best.gain, best.nats) < 1


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ([], "no prompts"),
        ([torch.zeros(20)], "constant"),
        ([torch.full((20,), 1e9), torch.full((20,), 3.0)], "constant"),
        ([torch.randn(5)], "8 or more"),
        ([torch.randn(4, 5)], "8 or more"),
        ([torch.randn(20), torch.tensor([math.nan] * 20)], "prompt 1: a base value is not finite"),
    ],
)
def test_bad_base_samples(base, message):
    with pytest.raises(InputError, match=message):
        Frontier(base)


def test_bad_arguments():
    frontier = Frontier(gaussian(3, 50, 0))
    for call, message in (
        (lambda: frontier.point(0.0), "positive"),
        (lambda: frontier.point(math.nan), "positive"),
        (lambda: frontier.nats_at(-1.0), "positive"),
        (lambda: frontier.best_of(0), "from 1 to 50"),
        (lambda: frontier.best_of(51), "from 1 to 50"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_a_point_below_the_temperatures_that_are_tried():
    """There `R*` is a root of K, the temperature its slope, errors are shares of their figures, and nothing jumps."""
    frontier = Frontier(gaussian(6, 200, seed=1))
    least = frontier._least_nats
    below, at = frontier.point(least / 400), frontier.point(least)
    assert below.gain == pytest.approx(at.gain / 20)
    nats = least / 400
    slope = (frontier.point(1.001 * nats).gain - frontier.point(0.999 * nats).gain) / (0.002 * nats)
    assert below.alpha == pytest.approx(slope, rel=1e-4)
    assert below.beta == pytest.approx(1 / slope, rel=1e-4)
    assert below.stderr / below.gain == pytest.approx(at.stderr / at.gain)
    assert below.alpha_stderr / below.alpha == pytest.approx(at.alpha_stderr / at.alpha)
    assert below.gain == pytest.approx(0.5 * math.sqrt(2 * least / 400), rel=0.1)
    near = frontier.point(least * (1 - 1e-9))
    for figure in ("gain", "stderr", "beta", "alpha", "alpha_stderr"):
        assert getattr(near, figure) == pytest.approx(getattr(at, figure), rel=1e-6)
