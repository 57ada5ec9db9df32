"""Power and variance components: simulated layouts of known components, closed forms, and a t-test run many times."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import binom, chi2, f_oneway, nct, norm, ttest_1samp
from scipy.stats import t as student

from hnkit.errors import InputError
from hnkit.internal.power import Components, components, detectable, needed_prompts, needs, power

FALSE_ALARM = 1e-6
F64 = torch.float64
TRUE = {"prompt": 1.0, "noise": 0.49, "method_prompt": 0.16, "residual": 0.36}


def layout(prompts: int, seeds: int, generator: torch.Generator, difference: float = 0.3):
    """Scores of two methods, the components of `TRUE` of their difference and of what they share."""

    def draw(variance: float, *shape: int) -> torch.Tensor:
        return math.sqrt(variance) * torch.randn(*shape, generator=generator, dtype=F64)

    shared = draw(TRUE["prompt"], prompts, 1) + draw(TRUE["noise"], prompts, seeds)
    both = []
    for mean in (difference, 0.0):  # half of the difference's variance comes from either
        own = draw(TRUE["method_prompt"] / 2, prompts, 1) + draw(TRUE["residual"] / 2, prompts, seeds)
        both.append(mean + shared + own)
    return both


@pytest.mark.parametrize(("prompts", "seeds"), [(30, 2), (12, 5)])
def test_the_components_are_unbiased(prompts, seeds):
    generator, repetitions = torch.Generator().manual_seed(0), 400
    found = [components(*layout(prompts, seeds, generator)) for _ in range(repetitions)]
    for name, truth in {**TRUE, "difference": 0.3}.items():
        values = torch.tensor([getattr(one, name) for one in found], dtype=F64)
        radius = norm.isf(FALSE_ALARM / 2) * float(values.std()) / math.sqrt(repetitions)
        assert abs(float(values.mean()) - truth) < radius, name


def test_the_mean_squares_are_those_of_the_analysis_of_variance():
    """F = MS between / MS within of the differences, as scipy has it; and the closed form of a 2 x 2 layout."""
    one, other = layout(9, 4, torch.Generator().manual_seed(1))
    found = components(one, other)
    between = found.method_prompt * 4 + found.residual
    assert between / found.residual == pytest.approx(f_oneway(*(one - other).tolist()).statistic)
    small = components(torch.tensor([[1.0, 3.0], [6.0, 10.0]]), torch.zeros(2, 2))
    # prompt means 2 and 8: MSB = 2 x 18 = 36; within 2 and 8: MSW = (2 + 8) / 2 = 5
    assert small == Components(2, 2, 5.0, 0.0, 0.0, 15.5, 5.0)


def test_the_error_of_the_mean_difference_is_that_of_the_components():
    generator, repetitions = torch.Generator().manual_seed(2), 2000
    means = torch.tensor([components(*layout(8, 3, generator)).difference for _ in range(repetitions)], dtype=F64)
    truth = (TRUE["method_prompt"] + TRUE["residual"] / 3) / 8
    low, high = chi2.isf([1 - FALSE_ALARM / 2, FALSE_ALARM / 2], repetitions - 1) / (repetitions - 1)
    assert low < float(means.var()) / truth < high


@pytest.mark.parametrize(("prompts", "seeds", "difference"), [(12, 1, 0.5), (25, 2, 0.3), (6, 4, 0.6)])
def test_the_power_is_the_share_of_t_tests_that_find_it(prompts, seeds, difference):
    generator, repetitions = torch.Generator().manual_seed(3), 4000
    truth = Components(prompts, max(seeds, 2), 0.0, 1.0, 0.49, TRUE["method_prompt"], TRUE["residual"])
    expected = power(difference, truth.variance(seeds), prompts)
    one, other = (
        torch.stack(parts)
        for parts in zip(*(layout(prompts, seeds, generator, difference) for _ in range(repetitions)), strict=True)
    )
    p_values = ttest_1samp((one - other).mean(2).numpy(), 0, axis=1).pvalue
    share = float((p_values < 0.05).mean())
    radius = norm.isf(FALSE_ALARM / 2) * math.sqrt(expected * (1 - expected) / repetitions)
    assert abs(share - expected) < radius


@pytest.mark.parametrize("prompts", [2, 5, 40, 1000])
@pytest.mark.parametrize("shift", [0.0, 0.5, 2.8, 6.0])
def test_the_power_is_that_of_the_non_central_t(prompts, shift):
    critical = student.isf(0.025, prompts - 1)
    exact = nct.sf(critical, prompts - 1, shift) + nct.cdf(-critical, prompts - 1, shift)
    assert power(shift / math.sqrt(prompts), 1.0, prompts) == pytest.approx(exact, abs=2e-6)


@pytest.mark.parametrize("difference", [0.02, 0.1, 0.5, -0.1, 3.0])
@pytest.mark.parametrize("variance", [0.01, 0.2])
def test_the_fewest_prompts_are_enough_and_one_less_is_not(difference, variance):
    found = needed_prompts(difference, variance)
    assert power(difference, variance, found) >= 0.8
    assert found == 2 or power(difference, variance, found - 1) < 0.8
    # the textbook's (z_0.975 + z_0.8)^2 variance / difference^2, which the t-test exceeds by two or so
    textbook = (norm.isf(0.025) + norm.isf(0.2)) ** 2 * variance / difference**2
    assert textbook <= found <= textbook + 5
    assert detectable(variance, found) <= abs(difference)
    assert found == 2 or detectable(variance, found - 1) > abs(difference)


def test_needs_fall_with_seeds_and_images_rise():
    found = components(*layout(40, 4, torch.Generator().manual_seed(4)))
    asked = needs(found, 0.1)
    assert [need.seeds for need in asked] == [1, 2, 4, 8, 16]
    assert all(a.prompts >= b.prompts and a.images <= b.images for a, b in itertools.pairwise(asked))
    assert all(need.least <= need.prompts <= need.most for need in asked)
    assert asked[2].prompts == needed_prompts(0.1, found.variance(4))
    assert all(need.images == 2 * need.prompts * need.seeds for need in asked)


@pytest.mark.parametrize("seeds", [1, 4, 16])
def test_the_interval_of_the_prompts_covers(seeds):
    generator, repetitions, inside = torch.Generator().manual_seed(5), 80, 0
    truth = needed_prompts(0.2, TRUE["method_prompt"] + TRUE["residual"] / seeds)
    for _ in range(repetitions):
        (need,) = needs(components(*layout(25, 3, generator)), 0.2, (seeds,))
        inside += need.least <= truth <= need.most
    # Satterthwaite approximates the law of a sum of mean squares: 95 % may be 92 %
    assert inside >= binom.isf(1 - FALSE_ALARM, repetitions, 0.92)


def test_one_seed_tells_no_noise_from_prompts():
    one, other = layout(20, 1, torch.Generator().manual_seed(6))
    found = components(one, other)
    assert (found.noise, found.residual) == (None, None)
    assert found.method_prompt == pytest.approx(float((one - other).var()))
    assert [need.seeds for need in needs(found, 0.1)] == [1]
    with pytest.raises(InputError, match="does not tell the noise from the prompt"):
        found.variance(2)
    with pytest.raises(InputError, match="does not tell the noise from the prompt"):
        found.freedom(4)


def test_equal_scores_need_two_prompts():
    same = torch.arange(12, dtype=F64).view(4, 3)
    found = components(same + 1, same)
    assert [need.prompts for need in needs(found, 0.1)] == [2] * 5
    assert detectable(found.variance(1), 4) == 0


def test_bad_input():
    one = torch.zeros(3, 2)
    for call, message in (
        (lambda: components(one, one[:2]), "shapes"),
        (lambda: components(one[:1], one[:1]), "one prompt only"),
        (lambda: components(one * math.nan, one), "not finite"),
        (lambda: needed_prompts(0.0, 1.0), "other than 0"),
        (lambda: needed_prompts(math.inf, 1.0), "finite"),
        (lambda: needed_prompts(1e-9, 1.0), "more than 1,000,000,000 prompts"),
    ):
        with pytest.raises(InputError, match=message):
            call()
