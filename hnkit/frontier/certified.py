"""Bounds that hold with a stated probability whatever the law of the reward: nats from a target, and nats spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.frontier.curve import LEAST_EFFECTIVE, LEAST_SAMPLES, checked_samples, spread_of
from hnkit.internal.stats import student_quantile

_SCALES = (0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0)
_CLIPS = (0.5, 1.0, 2.0, 3.0)
_COMPUTED = 2
_NORMAL = 4.0
"""Standard errors of a bet that just pays, about: it ranks what is tried, and decides nothing."""
_BETS = (0.01, 0.03, 0.08, 0.16, 0.3, 0.6, 0.99)
_HALVINGS = 20


@dataclass(frozen=True)
class GapBound:
    """How far a steered law is from the tilted law of a temperature, in nats, from below.

    Attributes:
        lower: with probability `confidence` the mean over these prompts of `KL(p0^phi || p0*)` is at least this.
        estimate: what the same samples suggest it is; `None` where fewer than `LEAST_EFFECTIVE` base samples a prompt
            are effective at the temperature, so that nothing but the bound can be said.
        stderr: standard error of the estimate: that of the mean of `ell - r / alpha` under the steered law, and that of
            log Z*, each from the spread of samples within prompts, as of independent samples: too large where steered
            and base ones share their noise. NaN where a prompt has one base sample.
        penalty: what the bound of log Z* costs, `log(2 / (1 - confidence)) / C` nats for C prompts.
        confidence: the confidence of the bound.
        prompts: how many prompts there are, C.
        alpha: the temperature of the target, in units of the reward.
        effective: effective base samples at that temperature, the harmonic mean over prompts.
    """

    lower: float
    estimate: float | None
    stderr: float
    penalty: float
    confidence: float
    prompts: int
    alpha: float
    effective: float


def gap_lower_bound(
    kl: Sequence[Tensor],
    steered: Sequence[Tensor],
    base: Sequence[Tensor],
    alpha: float,
    *,
    confidence: float = 0.95,
    paired: bool = True,
) -> GapBound:
    """Nats between the law of a map and the tilted law of a temperature, from below, on any model.

    `KL(p0^phi || p0*) = KL(p0^phi || p0) - E[r] / alpha + log Z*`. The first is at least the mean of the integrand of
    eq. 53 or 55; the last is bounded by Markov's inequality: with `Zhat_c` the mean of `exp(r / alpha)` over
    independent base samples of prompt c, `E prod_c Zhat_c / Z_c = 1`, so that with probability `1 - delta`
    `mean_c log Z_c >= mean_c log Zhat_c - log(1 / delta) / C`, whatever the variance of `exp(r / alpha)`. Half of
    delta goes there and half to the mean of `ell - r / alpha`, whose error is Student's t: asymptotic, as every error
    bar of a mean of an unbounded variable is.

    Args:
        kl: for each prompt the integrand `ell` of the KL at its samples, `(m_c,)`, nats.
        steered: for each prompt the rewards of its steered samples, `(m_c,)`.
        base: for each prompt the rewards of base samples that are independent of each other, `(n_c,)`.
        alpha: the temperature of the target, in units of the reward.
        confidence: the confidence of the bound.
        paired: whether `kl` and `steered` are of the same samples; else they are of independent ones, of any number.

    Raises:
        InputError: fewer than two prompts, lists that do not match, values that are not finite, or a temperature or
            confidence out of range.
    """
    if not alpha > 0:
        raise InputError(f"a temperature of {alpha:g}: give a positive number")
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence:g}: give a number between 0 and 1")
    rewards, values, bases = (
        checked_samples(steered, "steered", 1),
        checked_samples(kl, "KL", 1),
        checked_samples(base, "base", 1),
    )
    count = len(bases)
    if count < 2:
        raise InputError(
            "one prompt only: a certificate needs 2 prompts or more, for it costs log(2 / delta) nats over their number"
        )
    if len(values) != count or len(rewards) != count:
        raise InputError("kl, steered and base need one entry a prompt")
    if not paired:
        mean = _mean(values) + _mean([-r / alpha for r in rewards])
    elif [len(r) for r in rewards] == [len(k) for k in values]:
        mean = _mean([k - r / alpha for k, r in zip(values, rewards, strict=True)])
    else:
        raise InputError("kl and steered need one value a sample each, or paired=False")
    log_z = torch.stack([(r / alpha).logsumexp(0) - math.log(len(r)) for r in bases])
    delta = (1 - confidence) / 2
    penalty = math.log(1 / delta) / count
    lower = mean.value + float(log_z.mean()) - penalty + student_quantile(delta, mean.freedom) * mean.stderr
    normaliser, variance = _normaliser([r / alpha for r in bases])
    weights = [(r / alpha).softmax(0).square().sum() for r in bases]
    effective = 1 / float(torch.stack(weights).mean())
    estimate = mean.value + normaliser if effective >= LEAST_EFFECTIVE else None
    stderr = math.sqrt(mean.variance + variance)
    return GapBound(max(0.0, lower), estimate, stderr, penalty, confidence, count, alpha, effective)


def _normaliser(exponents: Sequence[Tensor]) -> tuple[float, float]:
    """Mean over prompts of `log E exp`, without its bias of order 1/n, and the variance of its error: the jackknife's.

    The log of a mean of n samples is too low in the mean (Jensen), by half the variance of its error.
    """
    values, variances = [], []
    for u in exponents:
        n, total = len(u), u.logsumexp(0)
        if n == 1:
            return math.nan, math.nan
        # Without sample i the sum is less by its share; where a share is one, no estimate is given.
        left = total + torch.log1p(-(u - total).exp().clamp(max=1 - 1e-15)) - math.log(n - 1)
        pseudo = n * (total - math.log(n)) - (n - 1) * left
        values.append(pseudo.mean())
        variances.append(pseudo.var() / n)
    return float(torch.stack(values).mean()), float(torch.stack(variances).sum()) / len(exponents) ** 2


@dataclass(frozen=True)
class _Mean:
    """A mean over fixed prompts, with the variance of its error and the degrees of freedom of that variance."""

    value: float
    variance: float
    freedom: float

    def __add__(self, other: _Mean) -> _Mean:
        """The sum of two independent means (Welch and Satterthwaite)."""
        variance = self.variance + other.variance
        weights = self.variance**2 / self.freedom + other.variance**2 / other.freedom
        freedom = variance**2 / weights if weights else min(self.freedom, other.freedom)
        return _Mean(self.value + other.value, variance, freedom)

    @property
    def stderr(self) -> float:
        return math.sqrt(self.variance)


def _mean(terms: Sequence[Tensor]) -> _Mean:
    """Mean over prompts of the means of samples, from the spread of samples within prompts.

    The degrees of freedom are Satterthwaite's: one noisy prompt among quiet ones leaves few. Where a prompt has one
    sample, the spread between prompts is taken, which contains that within them.
    """
    count = len(terms)
    means = torch.stack([term.mean() for term in terms])
    if any(len(term) == 1 for term in terms):
        return _Mean(float(means.mean()), float(means.var()) / count, count - 1)
    parts = torch.stack([term.var() / len(term) for term in terms]) / count**2
    freedoms = torch.tensor([len(term) - 1.0 for term in terms], dtype=parts.dtype)
    fourth = float((parts.square() / (freedoms + 2)).sum())  # unbiased: E s^4 = sigma^4 (1 + 2 / freedom)
    variance = float(parts.sum())
    found = variance**2 / fourth - 2 if fourth else float(freedoms.sum())
    return _Mean(float(means.mean()), variance, max(found, float(freedoms.min())))


def nats_lower_bound(base: Sequence[Tensor], method: Sequence[Tensor], *, confidence: float = 0.95) -> float:
    """Nats between the outputs of a method and those of the base, from below, by their rewards alone.

    For every function T, `KL(q || p) >= E_q T - log E_p exp T` (Donsker and Varadhan). T is the reward, centred by base
    samples that are used for nothing else, scaled and clipped, so that both means are of bounded variables; either is
    bounded by betting, at any sample size and whatever the law, for all tried scales and clips at once. Over prompts
    the mean of the log is at most the log of the mean.

    Args:
        base: for each prompt the rewards of its base samples, `(n_c,)`, `LEAST_SAMPLES` at least.
        method: for each prompt the rewards of the method's samples, `(m_c,)`; prompts in the order of `base`.
        confidence: the confidence of the bound.

    Returns:
        A number that the mean over prompts of `KL(q_c || p_c)` exceeds with that probability; at least 0.

    Raises:
        InputError: lists that do not match, too few samples, or non-finite values.
    """
    bases, found = checked_samples(base, "base", LEAST_SAMPLES), checked_samples(method, "method's", 1)
    if len(bases) != len(found):
        raise InputError(f"{len(bases)} prompts of base samples and {len(found)} of the method: give the same prompts")
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence:g}: give a number between 0 and 1")
    half, rows = min(len(r) for r in bases) // 2, min(len(r) for r in found)
    centres = torch.stack([r[half:].mean() for r in bases])
    spread = spread_of([r[half:] for r in bases])
    if spread == 0 or rows * len(found) < 2:
        return 0.0
    p = torch.stack([r[:half] for r in bases]) - centres[:, None]
    q = torch.stack([r[:rows] for r in found]) - centres[:, None]
    tried = [(beta / spread, clip) for beta in _SCALES for clip in _CLIPS]
    delta = (1 - confidence) / (2 * len(tried))
    # the union bound covers every scale and clip, so that the promising ones alone need be computed
    tried.sort(key=lambda one: -_promise(p, q, *one))
    best = 0.0
    for beta, clip in tried[:_COMPUTED]:
        t_q, z = (beta * q).clamp(-clip, clip).flatten(), (beta * p).clamp(-clip, clip).exp().flatten()
        gain = _mean_at_least(t_q + clip, delta) - clip
        cost = math.log(math.exp(clip) - _mean_at_least(math.exp(clip) - z, delta))
        best = max(best, gain - cost)
    return best


def _promise(p: Tensor, q: Tensor, beta: float, clip: float) -> float:
    """What the bound would be with normal error bars: which scale and clip to try."""
    t_q, z = (beta * q).clamp(-clip, clip), (beta * p).clamp(-clip, clip).exp()
    radii = [_NORMAL * float(values.std()) / math.sqrt(values.numel()) for values in (t_q, z)]
    return float(t_q.mean()) - radii[0] - math.log(float(z.mean()) + radii[1])


def _mean_at_least(values: Tensor, delta: float) -> float:
    """What the mean of the expectations of independent non-negative variables exceeds but for `delta`, at any size.

    If that mean is m at most, `E prod_i (1 - c + c Y_i / m) <= 1` for every c in [0, 1], by independence and the
    inequality of arithmetic and geometric means; so does the average over some c, and Markov's inequality refuses
    every m at which it reaches `1 / delta` (betting, arXiv 2010.09686, for variables that are not alike).
    """
    mean = float(values.mean())
    if not mean > 0:
        return 0.0
    bets = torch.tensor(_BETS, dtype=torch.float64)[:, None]
    ratios = values[None] / mean
    threshold = -math.log(delta) + math.log(len(_BETS))
    low, high = 0.0, 1.0  # of m as a share of the mean
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        evidence = float(torch.log1p(bets * (ratios / middle - 1)).sum(1).logsumexp(0))
        low, high = (middle, high) if evidence >= threshold else (low, middle)
    return low * mean
