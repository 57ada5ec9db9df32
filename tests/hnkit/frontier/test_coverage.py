"""Error bars of the frontier against laws whose own is known in closed form: how often 1.96 of them cover it.

A coverage is tested as the share of independent replicates whose interval holds the truth, by a z-test at the file's
false-alarm rate against the least that is claimed, 93 %; at each budget whose point half of the replicates show, and at
the last point that each shows. The slow tests have the replicates, the plain ones a share of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm
from torch import Tensor

from hnkit.frontier import Frontier, curve
from hnkit.frontier.cumulant import cumulant, tail_index

FALSE_ALARM = 1e-4
CLAIMED = 0.93
NATS = tuple(0.01 * 2.0**k for k in range(8))


def uniform(prompts: int, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, samples, generator=generator, dtype=torch.float64).clamp(min=1e-300)


def divergence(q: float, p: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


@dataclass(frozen=True)
class Law:
    """A law of rewards, its frontier `R*(K)`, and the gain of the best of n."""

    draw: Callable[[int, int, int], Tensor]
    best: Callable[[float], float]
    best_of: Callable[[int], float]

    def slope(self, nats: float) -> float:
        """`dR*/dK`, the temperature of the budget."""
        return (self.best(1.001 * nats) - self.best(0.999 * nats)) / (0.002 * nats)


def exponential(nats: float) -> float:
    """`psi = -log(1 - beta) - beta`."""
    bounds = (1e-6, 1 - 1e-9)
    return float(minimize_scalar(lambda b: (nats - math.log1p(-b) - b) / b, bounds=bounds, method="bounded").fun)


def coin(nats: float, p: float) -> float:
    """The best law is the coin of the largest share that the budget reaches, up to certainty."""
    return 1 - p if nats >= -math.log(p) else brentq(lambda q: divergence(q, p) - nats, p, 1 - 1e-13) - p


def gaussian_best_of(n: int) -> float:
    return float(quad(lambda x: x * n * norm.pdf(x) * norm.cdf(x) ** (n - 1), -10, 10)[0])


LAWS = {
    "gaussian": Law(
        lambda c, n, seed: math.sqrt(2) * torch.erfinv(2 * uniform(c, n, seed) - 1),
        lambda nats: math.sqrt(2 * nats),
        gaussian_best_of,
    ),
    "exponential": Law(
        lambda c, n, seed: -uniform(c, n, seed).log(), exponential, lambda n: sum(1 / k for k in range(2, n + 1))
    ),
    "coin": Law(
        lambda c, n, seed: (uniform(c, n, seed) < 0.2).double(),
        lambda nats: coin(nats, 0.2),
        lambda n: 0.8 - 0.8**n,
    ),
}
SHAPES = {"12 prompts": (12, 100), "4 prompts": (4, 60), "40 prompts": (40, 32), "one prompt": (1, 400)}
PLAIN = [("exponential", "12 prompts"), ("exponential", "one prompt"), ("coin", "4 prompts"), ("gaussian", "4 prompts")]


def refuted(hits: list[bool]) -> bool:
    """Whether the coverage is below what is claimed, by a z-test of the share."""
    radius = norm.isf(FALSE_ALARM) * math.sqrt(CLAIMED * (1 - CLAIMED) / len(hits))
    return sum(hits) / len(hits) < CLAIMED - radius


def covers(value: float, stderr: float, truth: float) -> bool:
    return abs(value - truth) <= 1.96 * stderr + 1e-12


def replicates(law: Law, shape: str, count: int) -> Iterator[dict[str, bool]]:
    """For each replicate, by name of the figure, whether its interval holds the truth."""
    prompts, samples = SHAPES[shape]
    truths = [(nats, law.best(nats), law.slope(nats)) for nats in NATS]
    best_of = {n: law.best_of(n) for n in (2, 4, 16)}
    for seed in range(count):
        rewards = law.draw(prompts, samples, 4000 + seed)
        frontier = Frontier(list(rewards), seed=seed)
        found = {}
        for nats, gain, alpha in truths:
            if not frontier.carries(nats):
                break
            point = frontier.point(nats)
            found[f"gain at {nats:.2f}"] = found["gain at the end"] = covers(point.gain, point.stderr, gain)
            found[f"alpha at {nats:.2f}"] = covers(point.alpha, point.alpha_stderr, alpha)
            if prompts > 1:
                scatter = 0.1 * (2 * uniform(1, prompts, 90_000 + seed)[0] - 1)
                share = frontier.efficiency_estimate(0.5 * gain * (1 + scatter), nats)
                found[f"efficiency at {nats:.2f}"] = covers(share.value, share.stderr, 0.5)
        middle = truths[3]
        if frontier.carries(2 * middle[0]):  # so that the true temperature of the half is one that it carries
            estimate = frontier.nats_estimate(middle[2])
            found["nats of a temperature"] = covers(estimate.value, estimate.stderr, middle[0])
        if prompts > 1:
            for n, gain in best_of.items():
                best = frontier.best_of(n)
                found[f"best of {n}"] = covers(best.gain, best.stderr, gain)
        yield found


def check(law: str, shape: str, count: int) -> None:
    hits: dict[str, list[bool]] = {}
    for found in replicates(LAWS[law], shape, count):
        for name, hit in found.items():
            hits.setdefault(name, []).append(hit)
    assert f"gain at {NATS[3]:.2f}" in hits
    shares = {name: sum(of) / len(of) for name, of in hits.items() if len(of) > count / 2 and refuted(of)}
    assert not shares


@pytest.mark.parametrize(("law", "shape"), PLAIN)
def test_error_bars_cover(law: str, shape: str) -> None:
    check(law, shape, 40)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("law", LAWS)
def test_error_bars_cover_in_many_replicates(law: str, shape: str) -> None:
    check(law, shape, 400)


def test_the_bootstrap_alone_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the widening is for: with the error that a bootstrap gives, and with the curve drawn on, the test is red."""
    monkeypatch.setattr(curve, "_widened", lambda spread, *others: spread)
    monkeypatch.setattr(curve, "_of_a_scale", lambda stderr, value: stderr)
    monkeypatch.setattr(curve, "MOST_TAIL", math.inf)
    with pytest.raises(AssertionError, match="gain at the end"):
        check("exponential", "one prompt", 40)


def test_error_bars_that_are_too_small_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = curve._widened
    monkeypatch.setattr(curve, "_widened", lambda *others: right(*others) / 2)
    with pytest.raises(AssertionError, match="gain at"):
        check("gaussian", "one prompt", 40)


def test_exponential_rewards_have_the_index_beta() -> None:
    """The weights `exp(beta r)` of exponential rewards of unit scale are Pareto of index beta, for every prompt."""
    betas = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = tail_index(list(LAWS["exponential"].draw(5, 2000, 0)), betas)
    # Hill's estimate from 300 weights has a standard error of a 17th; 5 of them
    assert torch.allclose(found, betas, rtol=0.29)
    flat = tail_index(list(LAWS["coin"].draw(5, 2000, 0)), betas)
    assert float(flat.max()) < 0.01


def test_the_curve_of_heavy_tails_ends_before_the_index_is_large() -> None:
    """At index 0.7 exponential rewards are at `K = beta^2 / (1 - beta) + log(1 - beta) + beta` = 1.13 nats."""
    most = [Frontier(list(LAWS["exponential"].draw(12, 200, seed))).most_nats for seed in range(8)]
    assert min(most) > 0.5
    assert max(most) < 2
    gaussian = [Frontier(list(LAWS["gaussian"].draw(12, 200, seed))).most_nats for seed in range(8)]
    assert sum(gaussian) > sum(most)
    frontier = Frontier(list(LAWS["coin"].draw(12, 200, 0)))
    assert frontier.most_nats > 1.2  # certainty costs log 5 = 1.6: two values have no tail


def test_many_samples_are_taken_in_batches() -> None:
    """Batches have the error bars of samples, and memory is bounded."""
    r = LAWS["gaussian"].draw(1, 3000, 3)[0]
    whole = Frontier([r]).point(0.2)
    curve_units, curve._MOST_UNITS = curve._MOST_UNITS, 300
    try:
        batched = Frontier([r]).point(0.2)
    finally:
        curve._MOST_UNITS = curve_units
    assert batched.gain == pytest.approx(whole.gain, rel=1e-12)
    assert batched.stderr == pytest.approx(whole.stderr, rel=0.3)


def test_a_table_of_temperatures_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    betas = torch.linspace(0.1, 2, 23, dtype=torch.float64)
    r = LAWS["gaussian"].draw(1, 50, 3)[0]
    whole, index = cumulant(r, betas), tail_index([r, 2 * r], betas)
    monkeypatch.setattr("hnkit.frontier.cumulant._ENTRIES", 101)
    parts = cumulant(r, betas)
    for name in ("psi", "gain", "square", "fourth"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    assert torch.equal(tail_index([r, 2 * r], betas), index)
