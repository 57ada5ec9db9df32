"""Bounds that hold with their stated probability: counted over repetitions on laws whose nats are known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student

from hnkit.errors import InputError
from hnkit.frontier import certified, gap_lower_bound, nats_lower_bound
from hnkit.toy import PROBLEMS

FALSE_ALARM = 1e-6
F64 = torch.float64


def most_failures(repetitions: int, rate: float) -> int:
    """Failures that a bound of this rate exceeds with the file's false-alarm probability at most."""
    return int(binom.isf(FALSE_ALARM, repetitions, rate))


def shifted(prompts: int, samples: int, base: int, shift: float, generator: torch.Generator):
    """A map x -> x + shift on the line under r(x) = x: KL = shift^2 / 2, log Z = 1 / (2 alpha^2), gap known."""
    x = torch.randn(prompts, samples, generator=generator, dtype=F64)
    kl = (x * shift + shift**2 / 2).unbind()  # eq. 53's integrand
    return (
        list(kl),
        list((x + shift).unbind()),
        list(torch.randn(prompts, base, generator=generator, dtype=F64).unbind()),
    )


@pytest.mark.parametrize(("alpha", "confidence"), [(1.0, 0.95), (0.25, 0.95), (2.0, 0.5)])
def test_the_gap_is_not_overstated(alpha, confidence):
    """At alpha = 1/4 the variance of exp(r / alpha) is e^16: the estimate is hopeless and the bound still holds."""
    generator, shift = torch.Generator().manual_seed(0), 0.3
    truth = (shift - 1 / alpha) ** 2 / 2  # KL(N(shift, 1) || N(1 / alpha, 1))
    repetitions = 300
    bounds = [
        gap_lower_bound(*shifted(12, 6, 30, shift, generator), alpha, confidence=confidence) for _ in range(repetitions)
    ]
    failures = sum(bound.lower > truth for bound in bounds)
    assert failures <= most_failures(repetitions, 1 - confidence)
    assert (bounds[0].estimate is None) == (alpha == 0.25)  # of 30 samples the largest has half of the weight
    assert bounds[0].effective < 3 if alpha == 0.25 else bounds[0].effective > 9


def test_kl_and_rewards_may_be_of_independent_samples():
    """Then their errors add; taken as one vector they would be paired, and here cancel."""
    generator, shift, alpha = torch.Generator().manual_seed(0), 1.0, 1.0
    kl, steered, base = shifted(12, 6, 400, shift, generator)
    other, _, _ = shifted(12, 4, 400, shift, generator)
    base = [torch.zeros(400, dtype=F64)] * 12  # whose log Z is known
    paired = gap_lower_bound(kl, steered, base, alpha)
    apart = gap_lower_bound(other, steered, base, alpha, paired=False)
    assert paired.stderr == pytest.approx(0.0, abs=1e-12)  # x shift - x / alpha is constant
    assert apart.stderr == pytest.approx(math.sqrt(1 / 6 + 1 / 4) / math.sqrt(12), rel=0.25)
    assert apart.estimate == pytest.approx(paired.estimate, abs=6 * apart.stderr)
    failures = 0
    for _ in range(200):
        kl, steered, base = shifted(12, 6, 30, shift, generator)
        other, _, _ = shifted(12, 4, 400, shift, generator)
        failures += gap_lower_bound(other, steered, base, alpha, paired=False).lower > 0
    assert failures <= most_failures(200, 0.05)


def test_one_noisy_prompt_leaves_few_degrees_of_freedom():
    """12 prompts of 3 samples, one of them 20 times as noisy: the 24 degrees of freedom of all would be too many."""
    generator, repetitions, truth = torch.Generator().manual_seed(6), 1500, 100.0
    scale = torch.ones(12, 1, dtype=F64)
    scale[0] = 20
    # rewards are 0: log Zhat is 0, and the penalty stands beside the error bar
    zeros, base = [torch.zeros(3, dtype=F64)] * 12, [torch.zeros(8, dtype=F64)] * 12
    wrong = few = 0
    for _ in range(repetitions):
        kl = list(truth + scale * torch.randn(12, 3, generator=generator, dtype=F64))
        bound = gap_lower_bound(kl, zeros, base, 1.0)
        wrong += bound.lower + bound.penalty > truth
        few += bound.estimate - float(student.isf(0.025, 24)) * bound.stderr > truth
    assert wrong <= most_failures(repetitions, 0.025)
    assert few > most_failures(repetitions, 0.025)


@pytest.mark.parametrize(("prompts", "samples", "shift", "alpha"), [(30, 32, 0.2, 1.0), (10, 100, 0.5, 0.8)])
def test_the_estimate_of_the_gap_has_its_error_bar(prompts, samples, shift, alpha):
    """The log of a mean is too low by half the variance of its error, which is most of the estimate's own error."""
    generator, repetitions = torch.Generator().manual_seed(1), 250
    found = [gap_lower_bound(*shifted(prompts, 8, samples, shift, generator), alpha) for _ in range(repetitions)]
    values = torch.tensor([gap.estimate for gap in found], dtype=F64)
    errors = torch.tensor([gap.stderr for gap in found], dtype=F64)
    off = values - (shift - 1 / alpha) ** 2 / 2
    assert abs(float(off.mean())) < 4.9 * float(off.std()) / math.sqrt(repetitions)  # 1e-6
    assert 0.75 < float(off.std() / errors.mean()) < 1.3
    missed = int((off.abs() > 1.96 * errors).sum())
    assert binom.ppf(FALSE_ALARM, repetitions, 0.02) <= missed <= most_failures(repetitions, 0.07)


def test_a_gap_from_one_base_sample_has_no_estimate():
    gap = gap_lower_bound(*shifted(4, 5, 1, 0.1, torch.Generator().manual_seed(0)), 1.0)
    assert gap.estimate is None
    assert math.isnan(gap.stderr)


@pytest.mark.parametrize("alpha", [1.2, 2.5])
def test_the_gap_of_heavy_tails_is_not_overstated(alpha):
    """Exponential rewards: exp(r / alpha) is a Pareto variable of index alpha, whose variance is infinite below 2."""
    generator, repetitions, failures = torch.Generator().manual_seed(9), 200, 0
    truth = -1 / alpha - math.log(1 - 1 / alpha)  # of f = 0: log Z - E r / alpha
    for _ in range(repetitions):
        steered, base = (list(-torch.rand(8, n, generator=generator, dtype=F64).log()) for n in (2, 16))
        failures += gap_lower_bound([torch.zeros(2, dtype=F64)] * 8, steered, base, alpha).lower > truth
    assert failures <= most_failures(repetitions, 0.05)


def test_the_gap_is_found_where_there_is_one():
    bound = gap_lower_bound(*shifted(60, 40, 400, 0.0, torch.Generator().manual_seed(1)), 0.7)
    truth = 1 / 0.7**2 / 2
    assert 0.7 * truth < bound.lower < truth
    assert bound.estimate == pytest.approx(truth, abs=0.1)
    assert bound.penalty == pytest.approx(math.log(40) / 60)
    assert bound.prompts == 60


def test_the_gap_of_the_linear_gaussian_toy():
    """Prompts are repetitions of one toy; its exact gap at the L2 optimum is known in closed form."""
    problem = PROBLEMS["linear-gaussian"]()
    f, generator = problem.l2_map(), torch.Generator().manual_seed(2)
    kl, steered, base = [], [], []
    J = torch.func.jacrev(lambda z: f(z[None])[0])(torch.zeros(problem.noise_shape, dtype=F64))
    error = J.trace() - torch.linalg.slogdet(torch.eye(len(J), dtype=F64) + J).logabsdet
    for _ in range(40):
        x = torch.randn(50, *problem.noise_shape, generator=generator, dtype=F64)
        delta = f(x)
        kl.append(delta.square().sum(1) / 2 + error)
        steered.append(problem.reward(problem.generate(x + delta)))
        y = torch.randn(400, *problem.noise_shape, generator=generator, dtype=F64)
        base.append(problem.reward(problem.generate(y)))
    bound = gap_lower_bound(kl, steered, base, problem.alpha)
    assert bound.lower < problem.l2_gap()
    assert bound.estimate == pytest.approx(problem.l2_gap(), abs=0.5)


def test_the_penalty_is_needed():
    """Without it, the plain mean of log Zhat exceeds the mean of log Z more often than the confidence allows."""
    generator = torch.Generator().manual_seed(3)
    bounds = [gap_lower_bound(*shifted(3, 400, 3, 1.0, generator), 1.0) for _ in range(300)]
    assert sum(bound.lower > 0 for bound in bounds) <= most_failures(300, 0.05)
    assert sum(bound.lower + bound.penalty > 0 for bound in bounds) > most_failures(300, 0.05)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.0])
def test_nats_by_rewards_alone_are_not_overstated(shift):
    generator = torch.Generator().manual_seed(4)
    repetitions = 200
    failures = 0
    for _ in range(repetitions):
        base = torch.randn(10, 60, generator=generator, dtype=F64)
        method = shift + torch.randn(10, 20, generator=generator, dtype=F64)
        failures += nats_lower_bound(list(base), list(method)) > shift**2 / 2
    assert failures <= most_failures(repetitions, 0.05)


def test_rewards_that_seldom_fail_are_no_nats():
    """20 samples of the base's own law often succeed all: their spread is 0, and so would be an error bar of it."""
    generator, failures, spreadless, repetitions = torch.Generator().manual_seed(7), 0, 0, 60
    for _ in range(repetitions):
        base = (torch.rand(5, 4000, generator=generator) > 0.05).to(F64)
        method = (torch.rand(5, 4, generator=generator) > 0.05).to(F64)
        spreadless += not bool(method.std())
        failures += nats_lower_bound(list(base), list(method)) > 0
    assert failures <= most_failures(repetitions, 0.05)
    assert spreadless > most_failures(repetitions, 0.05)


def test_a_mean_is_not_overstated_by_betting():
    """Skewed, unlike variables; and the bound is within a few standard errors of the truth where there are many."""
    generator, failures = torch.Generator().manual_seed(8), 0
    scale = torch.arange(1, 21, dtype=F64)
    for _ in range(400):
        values = scale * (torch.rand(20, generator=generator, dtype=F64) < 0.1)
        failures += certified._mean_at_least(values, 0.05) > 0.1 * float(scale.mean())
    assert failures <= most_failures(400, 0.05)
    many = 1 + torch.rand(20000, generator=generator, dtype=F64)
    assert 1.5 - 6 * 0.2887 / math.sqrt(20000) < certified._mean_at_least(many, 0.001) < 1.5


def test_nats_by_rewards_alone_are_found():
    generator = torch.Generator().manual_seed(5)
    base = list(7 + torch.randn(40, 400, generator=generator, dtype=F64))
    method = list(8 + torch.randn(40, 50, generator=generator, dtype=F64))
    assert 0.25 < nats_lower_bound(base, method) < 0.5
    assert nats_lower_bound(base, base) == 0.0
    # heavy tails: exp of the reward has no mean, and the bound still says something true
    heavy = [r.tan() for r in base]
    assert nats_lower_bound(heavy, heavy) == 0.0


def test_bad_input_is_one_line():
    kl, steered, base = shifted(4, 5, 30, 0.1, torch.Generator().manual_seed(0))
    for call, message in (
        (lambda: gap_lower_bound(kl[:1], steered[:1], base[:1], 1.0), "one prompt only"),
        (lambda: gap_lower_bound(kl, steered, base, 0.0), "positive"),
        (lambda: gap_lower_bound(kl, steered, base, 1.0, confidence=1.0), "between 0 and 1"),
        (lambda: gap_lower_bound(kl[:3], steered, base, 1.0), "one entry a prompt"),
        (lambda: gap_lower_bound([k[:2] for k in kl], steered, base, 1.0), "one value a sample each, or paired=False"),
        (lambda: gap_lower_bound([k[:2] for k in kl[:3]], steered, base, 1.0, paired=False), "one entry a prompt"),
        (lambda: gap_lower_bound(kl, [r * math.inf for r in steered], base, 1.0), "not finite"),
        (lambda: nats_lower_bound(base, steered[:2]), "the same prompts"),
        (lambda: nats_lower_bound([b[:3] for b in base], steered), "8 or more"),
    ):
        with pytest.raises(InputError, match=message):
            call()
