"""What a budget of KL could buy, from rewards of base samples alone.

Among all laws q within K nats of the base law `p`, the largest expected gain of a reward r is

    R*(K) = max{E_q r - E_p r : KL(q || p) <= K} = min_{beta > 0} (K + psi(beta)) / beta,
    psi(beta) = log E_p exp(beta (r - E_p r)),

attained by the tilted law `exp(beta r) p / Z` (Gibbs variational principle; Donsker and Varadhan). It is the same in
noise and in output space, since the tilted output law is the image of the tilted noise law (Theorem 3 of
arXiv 2508.09968). Over a set of prompts with one mean budget, psi is the mean over prompts and one beta serves all.
Nothing but rewards of base samples enters, so that the frontier exists for any model and any method.

Everything here is an estimate with an error bar; what holds with a stated probability is in `frontier.certified`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.frontier.cumulant import cumulant, effective_samples, halved, tail_index
from hnkit.internal.seeds import generator_for
from hnkit.internal.stats import Estimate, mean_and_stderr, standard_deviation, student_quantile

LEAST_SAMPLES = 8
"""Base samples that a prompt needs, at least."""

LEAST_EFFECTIVE = 5.0
"""The curve ends where the effective sample size, averaged harmonically over prompts, falls below this."""

MOST_TAIL = 0.7
"""The curve ends where the Pareto index of the weights exceeds this (arXiv 1507.02646), unless the spread of the
weights itself is carried by `_CARRYING` samples or more, as with rewards of few values."""

_SEEN = 1e-14
"""Spread of the rewards, as a share of the largest, that float64 does not tell from none."""

_CARRYING = 30.0
_BETAS = 241
_BEYOND = 20
_REPLICATES = 400
_MOST_UNITS = 2048
_GRID_STEP = 1.25
_NORMAL = 1.96
_TAIL_OF_GAIN, _TAIL_OF_SLOPE = 0.5, 1.0
"""By how much the square of the Pareto index enlarges an error; temperatures and nats rest on the tail more than gains.
Fitted by simulation, as the thresholds are."""
_BIAS = 2.0
"""What all samples lack over what half of them lack more: `1 / (2^a - 1)` of a bias that falls as `n^-a`. The factor is
that of a = 0.58, between heavy tails (below 1/2) and light ones (2, after the jackknife)."""


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the frontier.

    Attributes:
        nats: the budget K, the mean over prompts of KL(q || p).
        gain: the estimate of `R*(K)`, in units of the reward.
        stderr: its standard error: that of a bootstrap over prompts (over samples where there is one prompt), widened
            so that 1.96 of it to either side cover the truth with 95 % (see `Frontier`).
        beta: the inverse temperature that attains it, one for all prompts.
        effective: effective sample size at that temperature, the harmonic mean over prompts.
        alpha: the temperature, `1 / beta`, in units of the reward; it is the slope `dR*/dK` too.
        alpha_stderr: its standard error, widened likewise.
        tail: Pareto index of the weights there: above 1/2 their variance would be infinite if their tail went on so.
    """

    nats: float
    gain: float
    stderr: float
    beta: float
    effective: float
    alpha: float
    alpha_stderr: float
    tail: float


@dataclass(frozen=True)
class BestOf:
    """Best-of-N by the same reward.

    Attributes:
        n: candidates an image is chosen from.
        nats: `log n - (n - 1) / n`, which its KL does not exceed (and equals where the reward has no ties).
        gain: unbiased estimate of the mean gain over the base, in units of the reward.
        stderr: its standard error over prompts, with Student's factor where they are few; NaN where there is one.
    """

    n: int
    nats: float
    gain: float
    stderr: float


class Frontier:
    """The frontier of one set of prompts, estimated from rewards of base samples.

    Args:
        base: for each prompt the rewards of its base samples, `(n_c,)`, independent draws; any order of prompts.
        seed: the seed of the bootstrap.

    Raises:
        InputError: no prompts, fewer than `LEAST_SAMPLES` samples of one, a reward that is not finite, or rewards
            that are constant for every prompt.

    Each `log E exp` is corrected by the jackknife, without which the frontier would come out too low, and a method's
    share of it too high, by a term of order 1/n.

    A standard error here is made for the interval of 1.96 of it to either side, which a bootstrap's own would leave too
    narrow: few prompts, few samples that carry the weight, and a tail that the samples do not reach. To the bootstrap's
    it adds twice what half of the samples come out lower or higher; it takes Student's factor for the prompts and for
    the samples that carry the spread of the weights, and grows with the Pareto index of these; and since a gain is a
    scale, it is taken as a share of the true one. By simulation the interval then covers in 93 to 99 of 100 cases up to
    the end of the curve, for Gaussian, exponential and two-point rewards (`tests/hnkit/frontier/test_coverage.py`).
    """

    def __init__(self, base: Sequence[Tensor], *, seed: int = 0) -> None:
        self.base = checked_samples(base, "base", LEAST_SAMPLES)
        spread = spread_of(self.base)
        if all(bool(r.min() == r.max()) for r in self.base):
            raise InputError("the rewards of the base samples are constant: no law gains anything")
        largest = max(float(r.abs().max()) for r in self.base)
        if spread <= _SEEN * largest:
            raise InputError(
                f"rewards of the base samples differ by {spread:.2g} beside {largest:.2g}, which is their rounding; "
                "if they are not constant, subtract a constant before they are rounded"
            )
        self._seed = seed
        betas = torch.logspace(-3, 2, _BETAS, dtype=torch.float64) / spread
        if not bool(betas.isfinite().all()):
            raise InputError(
                f"the rewards differ by {spread:.2g} only, which has no inverse: multiply them by something"
            )
        few = (effective_samples(self.base, betas) < LEAST_EFFECTIVE).nonzero()
        self._betas = betas[: int(few[0]) + _BEYOND] if len(few) else betas
        self._shares = _resampled(len(self.base) if len(self.base) > 1 else len(self.base[0]), seed)
        self._at = self._levels(self._betas)
        light = (self._at.tail <= MOST_TAIL) | (self._at.carrying >= _CARRYING)
        below = (~(light & (self._at.effective >= LEAST_EFFECTIVE))).nonzero()
        self._usable = int(below[0]) if len(below) else len(self._betas)
        if self._usable < 2:
            raise InputError(
                f"the base samples are too few: fewer than {LEAST_EFFECTIVE:g} are effective, or their tail is too "
                "heavy, at any temperature"
            )
        self._least_nats = float(self._betas[1] * self._at.gain[1] - self._at.psi[1])

    def _levels(self, betas: Tensor) -> _Levels:
        """What the samples say at these inverse temperatures, with bootstrap replicates and from half of them."""
        rows = [cumulant(r, betas) for r in self.base]
        psi = torch.stack([row.psi for row in rows])
        gain = torch.stack([row.gain for row in rows])
        squares = torch.stack([row.square for row in rows]).sum(0)
        fourths = torch.stack([row.fourth for row in rows]).sum(0)
        half, half_gain = halved(self.base, betas, generator_for(self._seed, "frontier/halves"))
        replicated, replicated_gain = (
            (self._shares @ psi, self._shares @ gain) if len(self.base) > 1 else self._of_samples(betas)
        )
        return _Levels(
            psi.mean(0), gain.mean(0), replicated, replicated_gain, half, half_gain,
            effective=effective_samples(self.base, betas),
            tail=tail_index(self.base, betas),
            carrying=squares.square() / fourths.clamp(min=torch.finfo(fourths.dtype).tiny),
        )  # fmt: skip

    def _of_samples(self, betas: Tensor) -> tuple[Tensor, Tensor]:
        """Bootstrap replicates of psi and psi' of the only prompt, `(replicates, betas)`, over its samples.

        Many samples are put into `_MOST_UNITS` batches at random, which are drawn in their place.
        """
        (r,) = self.base
        u = r - r.mean()
        units = self._shares.shape[1]
        unit = torch.randperm(len(u), generator=generator_for(self._seed, "frontier/batches")) % units
        largest = float(u.max())  # subtracted before exp, so that nothing overflows

        def batches(values: Tensor) -> Tensor:
            return torch.zeros(units, dtype=u.dtype).index_add_(0, unit, values)

        counts = self._shares @ batches(torch.ones_like(u))
        means = (self._shares @ batches(u)) / counts
        psi, gain = [], []
        for beta in betas.tolist():
            weights = (beta * (u - largest)).exp()
            total = self._shares @ batches(weights)
            psi.append((total / counts).log() + beta * (largest - means))
            gain.append((self._shares @ batches(weights * u)) / total - means)
        return torch.stack(psi, 1), torch.stack(gain, 1)

    def _minimum(self, psi: Tensor, nats: float) -> tuple[Tensor, Tensor]:
        """`min_beta (K + psi) / beta` over the usable temperatures, and where it is; the last dimension is beta."""
        values = (nats + psi[..., : self._usable]) / self._betas[: self._usable]
        best = values.min(-1)
        return best.values, best.indices

    def _slope(self, psi: Tensor, nats: float) -> Tensor:
        """The temperature of the budget, at the vertex of the parabola in log beta through the best grid points.

        Replicates may lie beyond the usable temperatures, by a factor of 2.6.
        """
        betas = self._betas[: self._usable + _BEYOND]
        values = (nats + psi[..., : len(betas)]) / betas
        best = values.min(-1).indices.clamp(1, len(betas) - 2)
        left, here, right = (values.gather(-1, (best + step)[..., None])[..., 0] for step in (-1, 0, 1))
        bend = left - 2 * here + right
        shift = torch.where(bend > 0, 0.5 * (left - right) / torch.where(bend > 0, bend, 1.0), 0.0).clamp(-1, 1)
        return (-shift * torch.log(betas[1] / betas[0])).exp() / betas[best]

    def _error(self, where: int, spread: float, bias: float, weight: float = _TAIL_OF_GAIN) -> float:
        """A bootstrap's standard error at an inverse temperature, widened (see `_widened`)."""
        tail, carrying = float(self._at.tail[where]), float(self._at.carrying[where])
        return _widened(spread, bias, self._shares.shape[1], weight * tail**2, carrying)

    @property
    def most_nats(self) -> float:
        """The largest budget whose temperature the samples carry."""
        last = self._usable - 1
        return max(0.0, float(self._betas[last] * self._at.gain[last] - self._at.psi[last]))

    def carries(self, nats: float) -> bool:
        """Whether the samples carry the frontier at this budget, which is above 0 and below `most_nats`."""
        return nats > 0 and int(self._minimum(self._at.psi, nats)[1]) < self._usable - 1

    def point(self, nats: float) -> FrontierPoint:
        """The frontier at a budget.

        Args:
            nats: K > 0, the mean over prompts of KL(q || p).

        Raises:
            InputError: the budget is not positive, or larger than the samples carry.
        """
        if not nats > 0:
            raise InputError(f"a budget of {nats:g} nats: give a positive number")
        if nats < self._least_nats:  # below the temperatures that are tried psi is quadratic, and R* a square root
            last, scale = self.point(self._least_nats), math.sqrt(nats / self._least_nats)
            return FrontierPoint(
                nats, scale * last.gain, scale * last.stderr, scale * last.beta, last.effective,
                last.alpha / scale, last.alpha_stderr / scale, last.tail,
            )  # fmt: skip
        value, index = self._minimum(self._at.psi, nats)
        if not self.carries(nats):
            raise InputError(
                f"a budget of {nats:g} nats: these samples carry the frontier up to {self.most_nats:.3g} nats only; "
                "take more base samples a prompt"
            )
        at, where, gain, units = self._at, int(index), float(value), self._shares.shape[1]
        lacking = abs(float(self._minimum(at.half, nats)[0]) - gain)
        stderr = self._error(where, _spread(self._minimum(at.replicated, nats)[0], units), lacking)
        alpha, half, slopes = (self._slope(psi, nats) for psi in (at.psi, at.half, at.replicated))
        alpha_stderr = self._error(where, _spread(slopes, units), abs(float(half - alpha)), _TAIL_OF_SLOPE)
        return FrontierPoint(
            nats, gain, _of_a_scale(stderr, gain), 1 / float(alpha), float(at.effective[where]),
            float(alpha), _of_a_scale(alpha_stderr, float(alpha)), float(at.tail[where]),
        )  # fmt: skip

    def curve(self, least: float = 0.01) -> tuple[FrontierPoint, ...]:
        """Points from `least` nats up, each 1.25 times the one before, to where the samples carry it."""
        points: list[FrontierPoint] = []
        nats = least
        while self.carries(nats):
            points.append(self.point(nats))
            nats *= _GRID_STEP
        return tuple(points)

    def temperature(self, nats: float) -> float:
        """The temperature alpha = 1 / beta whose tilted law spends `nats` on the mean over prompts."""
        return self.point(nats).alpha

    def temperature_estimate(self, nats: float) -> Estimate:
        """The temperature of a budget with its standard error."""
        point = self.point(nats)
        return Estimate(point.alpha, point.alpha_stderr)

    def nats_at(self, alpha: float) -> float:
        """Nats that the tilted law of temperature `alpha` spends, `beta psi'(beta) - psi(beta)`, mean over prompts.

        Raises:
            InputError: alpha is not positive, or so low that the samples do not carry it.
        """
        return self.nats_estimate(alpha).value

    def nats_estimate(self, alpha: float) -> Estimate:
        """The nats of a temperature with their standard error.

        Raises:
            InputError: alpha is not positive, or so low that the samples do not carry it.
        """
        if not alpha > 0:
            raise InputError(f"a temperature of {alpha:g}: give a positive number")
        beta, lowest = 1 / alpha, 1 / float(self._betas[self._usable - 1])
        at = self._levels(torch.tensor([beta], dtype=torch.float64))
        effective = float(at.effective)
        if alpha < lowest * (1 - 1e-9):
            raise InputError(
                f"a temperature of {alpha:g}: {effective:.1f} effective base samples a prompt, of Pareto index "
                f"{float(at.tail):.2g}, are too few to say what it costs; the lowest that these samples carry is "
                f"{lowest:.3g}"
            )
        nats = float(beta * at.gain - at.psi)
        lacking = abs(float(beta * at.half_gain - at.half) - nats)
        spread = _spread((beta * at.replicated_gain - at.replicated)[:, 0], self._shares.shape[1])
        growth = _TAIL_OF_SLOPE * float(at.tail) ** 2
        error = _widened(spread, lacking, self._shares.shape[1], growth, float(at.carrying))
        return Estimate(nats, _of_a_scale(error, nats))

    def best_of(self, n: int) -> BestOf:
        """Best-of-n, from all choices of n of the base samples of each prompt (an unbiased estimate).

        Raises:
            InputError: n is below 1 or above the samples of some prompt.
        """
        least = min(len(r) for r in self.base)
        if not 1 <= n <= least:
            raise InputError(f"best-of-{n}: give a number from 1 to {least}, the base samples of a prompt")
        gain = over_prompts(torch.stack([_mean_of_best(r, n) - r.mean() for r in self.base]))
        return BestOf(n, math.log(n) - (n - 1) / n, gain.value, gain.stderr)

    def efficiency(self, gain: float, nats: float) -> float:
        """A gain as a share of the frontier's at the same nats; 1 is the most that any law can have."""
        return gain / self.point(nats).gain

    def efficiency_estimate(self, gains: Tensor, nats: float, nats_stderr: float = 0.0) -> Estimate:
        """The efficiency of a method with its standard error, by a bootstrap over prompts.

        Gain and frontier are resampled together, since a prompt whose base rewards spread moves both.

        Args:
            gains: the gain at each prompt, `(prompts,)`, in the order of the base samples.
            nats: the method's nats, the mean over prompts.
            nats_stderr: their standard error, which enters through the slope `dR*/dK = 1 / beta`.

        Returns:
            The estimate; its error is NaN where there is one prompt.
        """
        point = self.point(nats)
        value = float(gains.mean()) / point.gain
        if len(self.base) == 1:
            return Estimate(value, math.nan)
        scale = min(1.0, math.sqrt(nats / self._least_nats))
        budget = max(nats, self._least_nats)
        frontiers, index = self._minimum(
            torch.cat([self._at.psi[None], self._at.half[None], self._at.replicated]), budget
        )
        replicated = (self._shares @ gains.double()) / (scale * frontiers[2:])
        lacking = abs(value) * abs(1 - float(frontiers[1] / frontiers[0]))
        error = self._error(int(index[0]), _spread(replicated, self._shares.shape[1]), lacking)
        slope = value / (point.gain * point.beta)
        return Estimate(value, math.hypot(error, slope * nats_stderr))


@dataclass(frozen=True)
class _Levels:
    """What base samples say at inverse temperatures, on the mean over prompts; `(betas,)` unless said otherwise."""

    psi: Tensor
    gain: Tensor
    replicated: Tensor
    """Bootstrap replicates of psi, `(replicates, betas)`: prompts carry the noise of their samples with them."""
    replicated_gain: Tensor
    half: Tensor
    """psi from half of the samples."""
    half_gain: Tensor
    effective: Tensor
    tail: Tensor
    carrying: Tensor
    """How many samples carry the spread of the weights, hence its own error."""


def _widened(spread: float, bias: float, units: int, growth: float, carrying: float) -> float:
    """A standard error of which 1.96 to either side cover with 95 % (see `Frontier`).

    Args:
        spread: the bootstrap's standard error.
        bias: what half of the samples say less or more.
        units: how many units were resampled.
        growth: by what share the tail of the weights makes it larger.
        carrying: how many samples carry the spread of the weights.
    """
    freedom = 1 / (1 / (units - 1) + 1 / (2 * carrying))
    factor = student_quantile(0.975, freedom) / _NORMAL * (1 + growth)
    return factor * math.hypot(spread, _BIAS * bias)


def over_prompts(gains: Tensor) -> Estimate:
    """The mean over prompts `(prompts,)` with a standard error of which 1.96 to either side cover with 95 %.

    Of few prompts it is the standard error with Student's factor; of one it is not known, NaN.
    """
    mean, stderr = mean_and_stderr(gains)
    return Estimate(mean, stderr * student_quantile(0.975, len(gains) - 1) / _NORMAL if len(gains) > 1 else stderr)


def _of_a_scale(stderr: float, value: float) -> float:
    """The standard error of a scale, which is a share of what is estimated: the upper end is `value / (1 - share)`."""
    share = _NORMAL * stderr / abs(value) if value else math.inf
    return stderr / (1 - min(share, 0.5))


def _resampled(count: int, seed: int) -> Tensor:
    """Bootstrap draws of `count` units, or of as many batches as are kept, as the share of each."""
    count = min(count, _MOST_UNITS)
    drawn = torch.randint(count, (_REPLICATES, count), generator=torch.Generator().manual_seed(seed))
    shares = torch.zeros(_REPLICATES, count, dtype=torch.float64)
    return shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64))


def _spread(replicated: Tensor, units: int) -> float:
    """Standard error from bootstrap replicates; of few units it is too small by the root of `(n - 1) / n`."""
    return standard_deviation(replicated) * math.sqrt(units / (units - 1))


def _mean_of_best(r: Tensor, n: int) -> Tensor:
    """Mean of the largest of n over all choices of n samples: the k-th smallest has the share C(k-1, n-1) / C(N, n)."""
    count = len(r)
    k = torch.arange(1, count + 1, dtype=torch.float64)
    log_choose = torch.lgamma(k) - torch.lgamma((k - n + 1).clamp(min=1)) - math.lgamma(n)
    log_all = math.lgamma(count + 1) - math.lgamma(count - n + 1) - math.lgamma(n + 1)
    share = torch.where(k >= n, (log_choose - log_all).exp(), torch.zeros_like(k))
    return (share * r.sort().values).sum()


def spread_of(samples: Sequence[Tensor]) -> float:
    """Root of the mean over prompts of the variance within them, of rewards of any size that has differences."""
    centred = [r - r.mean() for r in samples]
    scale = max(float(u.abs().max()) for u in centred)
    if scale == 0:
        return 0.0
    if not math.isfinite(scale):
        raise InputError("the rewards are so large that their differences are not finite: divide them by something")
    return scale * math.sqrt(sum(float((u / scale).var()) for u in centred) / len(centred))


def checked_samples(samples: Sequence[Tensor], name: str, least: int) -> list[Tensor]:
    """The samples as float64 vectors on the CPU, one a prompt."""
    if not samples:
        raise InputError(f"no prompts: give the {name} samples of one prompt at least")
    found = []
    for index, values in enumerate(samples):
        vector = torch.as_tensor(values).detach().to("cpu", torch.float64)
        if vector.dim() != 1 or len(vector) < least:
            raise InputError(
                f"prompt {index}: {name} samples of shape {tuple(vector.shape)}; give a vector of {least} or more"
            )
        if not bool(vector.isfinite().all()):
            raise InputError(f"prompt {index}: a {name} value is not finite; leave such samples out, and say so")
        found.append(vector)
    return found
