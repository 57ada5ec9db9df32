"""How many prompts and images a difference between two methods needs, from the variance components of a run.

The score of method m on prompt p from noise s of that prompt is taken as `mu_m + P_p + N_ps + (MP)_mp + e_mps`: what a
prompt and a noise do to both methods alike, what a prompt does to one of them, and the rest. A difference on the same
noises has lost the first two, so that its mean over P prompts of S noises has the variance
`(sigma_MP^2 + sigma_e^2 / S) / P`, and noises beyond the first help only where the rest is large.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import chdtri, gammaincinv, ndtr
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.stats import student_quantile

LEVEL, POWER = 0.05, 0.8
"""Two-sided level of the t-test over prompts, and the probability with which a difference is to be found."""

_MOST = 10**9
_NODES, _WEIGHTS = (0.5 * part for part in np.polynomial.legendre.leggauss(200))
_NODES = _NODES + 0.5


@dataclass(frozen=True)
class Components:
    """Variance components of two methods on the same prompts and noises, from a balanced two-way layout.

    Each is unbiased (mean squares of the analysis of variance) and may so come out below 0. Those of the difference
    are of the difference itself, twice what one of two equally noisy methods has.

    Attributes:
        prompts: prompts P of the layout.
        seeds: noises S of each.
        difference: mean difference, method less base.
        prompt: variance over prompts that both methods share.
        noise: variance over the noises of a prompt that both share; `None` where there is one noise a prompt.
        method_prompt: variance over prompts of the difference, the noises' part taken out; with one noise a prompt
            it contains that part.
        residual: variance of the difference over the noises of a prompt; `None` where there is one.
    """

    prompts: int
    seeds: int
    difference: float
    prompt: float
    noise: float | None
    method_prompt: float
    residual: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON; `Components(**document)` reads it."""
        return asdict(self)

    def variance(self, seeds: int) -> float:
        """Variance over prompts of the mean difference of `seeds` noises."""
        if self.residual is None:
            self._require_one(seeds)
            return max(self.method_prompt, 0.0)
        return max(self.method_prompt, 0.0) + self.residual / seeds

    def freedom(self, seeds: int) -> float:
        """Degrees of freedom of that variance (Satterthwaite), of two independent mean squares."""
        if self.residual is None:
            self._require_one(seeds)
            return self.prompts - 1
        between = self.method_prompt + self.residual / self.seeds
        within = self.residual * (1 / seeds - 1 / self.seeds)
        parts = between**2 / (self.prompts - 1) + within**2 / (self.prompts * (self.seeds - 1))
        return max(1.0, (between + within) ** 2 / parts) if parts > 0 else self.prompts - 1

    def _require_one(self, seeds: int) -> None:
        if seeds != 1:
            raise InputError(
                f"{seeds} noises a prompt: the run had one, which does not tell the noise from the prompt; plan for one"
            )


def components(method: Tensor, base: Tensor) -> Components:
    """Variance components of a method beside its base.

    Args:
        method: scores of the method, `(prompts, seeds)`, both 2 or more (or one seed).
        base: scores of the base on the same prompts and noises.

    Raises:
        InputError: shapes that differ, fewer than two prompts, or scores that are not finite.
    """
    one, other = method.double(), base.double()
    if one.shape != other.shape or one.dim() != 2:
        raise InputError(f"scores of shapes {tuple(one.shape)} and {tuple(other.shape)}: give (prompts, seeds) of both")
    prompts, seeds = one.shape
    if prompts < 2:
        raise InputError("one prompt only: how much prompts differ needs 2 prompts or more")
    if not bool(one.isfinite().all() and other.isfinite().all()):
        raise InputError("a score is not finite: its variance is not known")
    # of two scores u, w: E of the mean product between prompts is S cov_P + cov_N, of the one within them cov_N
    shared_between, shared_within = _products(one, other)
    between, within = _products(one - other, one - other)
    if seeds == 1:
        return Components(prompts, 1, float((one - other).mean()), shared_between, None, between, None)
    return Components(
        prompts,
        seeds,
        float((one - other).mean()),
        (shared_between - shared_within) / seeds,
        shared_within,
        (between - within) / seeds,
        within,
    )


def _products(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Mean products between and within the prompts: mean squares where both are the same."""
    prompts, seeds = one.shape
    means = [scores - scores.mean() for scores in (one.mean(1), other.mean(1))]
    between = seeds * float((means[0] * means[1]).sum()) / (prompts - 1)
    inner = [scores - scores.mean(1, keepdim=True) for scores in (one, other)]
    within = float((inner[0] * inner[1]).sum()) / (prompts * (seeds - 1)) if seeds > 1 else math.nan
    return between, within


def power(difference: float, variance: float, prompts: int, *, level: float = LEVEL) -> float:
    """Probability that a t-test over `prompts` prompts finds a difference, exactly for Gaussian differences.

    Args:
        difference: the true mean difference.
        variance: variance over prompts of a prompt's mean difference.
        prompts: prompts, 2 or more.
        level: two-sided level of the test.
    """
    if variance <= 0:
        return 1.0
    freedom = prompts - 1
    shift = abs(difference) * math.sqrt(prompts / variance)
    # given the sample's standard deviation s sigma the statistic is Gaussian; scipy's nct is NaN at shifts of 36 or so
    critical = -student_quantile(level / 2, freedom) * np.sqrt(2 * gammaincinv(freedom / 2, _NODES) / freedom)
    return float(_WEIGHTS @ (ndtr(shift - critical) + ndtr(-shift - critical)))


def needed_prompts(difference: float, variance: float, *, wanted: float = POWER, level: float = LEVEL) -> int:
    """The fewest prompts with which a t-test over prompts finds a difference with probability `wanted`.

    Args:
        difference: the true mean difference, not 0.
        variance: variance over prompts of a prompt's mean difference.
        wanted: the probability.
        level: two-sided level of the test.

    Raises:
        InputError: the difference is 0 or not finite, or so small that it needs more than 10^9 prompts.
    """
    if not 0 < abs(difference) < math.inf:
        raise InputError(f"a difference of {difference:g}: give a finite number other than 0")
    high = 2
    while power(difference, variance, high, level=level) < wanted:
        high *= 2
        if high > _MOST:
            raise InputError(f"a difference of {difference:g} needs more than {_MOST:,} prompts: give a larger one")
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        if power(difference, variance, middle, level=level) >= wanted:
            high = middle
        else:
            low = middle + 1
    return high


def detectable(variance: float, prompts: int, *, wanted: float = POWER, level: float = LEVEL) -> float:
    """The smallest difference that `prompts` prompts find with probability `wanted`."""
    from scipy.optimize import brentq

    if variance <= 0:
        return 0.0
    unit = math.sqrt(variance / prompts)
    top = -student_quantile(level / 2, prompts - 1) + 10
    return unit * float(brentq(lambda z: power(z * unit, variance, prompts, level=level) - wanted, 0.0, 3 * top))


@dataclass(frozen=True)
class Need:
    """What a difference needs at a number of noises a prompt.

    Attributes:
        seeds: noises a prompt.
        prompts: prompts needed.
        least: the lower end of the 95 % interval of that number, for the variance was estimated.
        most: the upper end; `None` beyond 10^9.
        images: images of both methods together.
    """

    seeds: int
    prompts: int
    least: int
    most: int | None
    images: int


def needs(found: Components, difference: float, seeds: tuple[int, ...] = (1, 2, 4, 8, 16)) -> tuple[Need, ...]:
    """Prompts and images that a difference needs, at each number of noises a prompt that the run can speak of."""
    result = []
    for count in (1,) if found.residual is None else seeds:
        variance, freedom = found.variance(count), found.freedom(count)
        low, high = (variance * freedom / float(chdtri(freedom, tail)) for tail in (0.025, 0.975))
        prompts, least = (needed_prompts(difference, value) for value in (variance, low))
        most = needed_prompts(difference, high) if power(difference, high, _MOST) >= POWER else None
        result.append(Need(count, prompts, least, most, 2 * prompts * count))
    return tuple(result)
