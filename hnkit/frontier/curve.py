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
from hnkit.internal.stats import Estimate

LEAST_SAMPLES = 8
"""Base samples that a prompt needs, at least."""

LEAST_EFFECTIVE = 5.0
"""The curve ends where the effective sample size, averaged harmonically over prompts, falls below this."""

_BETAS = 241
_REPLICATES = 400
_GRID_STEP = 1.25


@dataclass(frozen=True)
class FrontierPoint:
    """One point of the frontier.

    Attributes:
        nats: the budget K, the mean over prompts of KL(q || p).
        gain: the estimate of `R*(K)`, in units of the reward.
        stderr: its standard error, by a bootstrap over prompts (over samples where there is one prompt).
        beta: the inverse temperature that attains it, one for all prompts.
        effective: effective sample size at that temperature, the harmonic mean over prompts.
    """

    nats: float
    gain: float
    stderr: float
    beta: float
    effective: float


@dataclass(frozen=True)
class BestOf:
    """Best-of-N by the same reward.

    Attributes:
        n: candidates an image is chosen from.
        nats: `log n - (n - 1) / n`, which its KL does not exceed (and equals where the reward has no ties).
        gain: unbiased estimate of the mean gain over the base, in units of the reward.
        stderr: its standard error over prompts; NaN where there is one prompt.
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
    """

    def __init__(self, base: Sequence[Tensor], *, seed: int = 0) -> None:
        self.base = checked_samples(base, "base", LEAST_SAMPLES)
        spread = spread_of(self.base)
        if spread <= 1e-12 * max(float(r.abs().max()) for r in self.base):
            raise InputError("the rewards of the base samples are constant: no law gains anything")
        self._betas = torch.logspace(-3, 2, _BETAS, dtype=torch.float64) / spread
        rows = [_cumulant(r, self._betas) for r in self.base]
        self._psi = torch.stack([row.psi for row in rows])
        self._gains = torch.stack([row.gain for row in rows]).mean(0)
        self._effective = 1 / torch.stack([row.concentration for row in rows]).mean(0)
        below = (self._effective < LEAST_EFFECTIVE).nonzero()
        self._usable = int(below[0]) if len(below) else _BETAS
        if self._usable < 2:
            raise InputError(
                f"the base samples are too few: fewer than {LEAST_EFFECTIVE:g} are effective at any temperature"
            )
        self._least_nats = float(self._betas[1] * self._gains[1] - self._psi.mean(0)[1])
        self._shares = _resampled(len(self.base) if len(self.base) > 1 else len(self.base[0]), seed)
        self._replicated = self._replicates()

    def _replicates(self) -> Tensor:
        """Bootstrap replicates of psi, `(replicates, betas)`: prompts carry the noise of their samples with them."""
        shares = self._shares
        if len(self.base) > 1:
            return shares @ self._psi
        (r,) = self.base
        u = r - r.mean()
        largest = float(u.max())  # subtracted before exp, so that nothing overflows
        means = shares @ (self._betas[:, None] * (u - largest)).exp().T
        return means.log() + self._betas * (largest - shares @ u)[:, None]

    def _minimum(self, psi: Tensor, nats: float) -> tuple[Tensor, Tensor]:
        """`min_beta (K + psi) / beta` over the usable temperatures, and where it is; the last dimension is beta."""
        values = (nats + psi[..., : self._usable]) / self._betas[: self._usable]
        best = values.min(-1)
        return best.values, best.indices

    @property
    def most_nats(self) -> float:
        """The largest budget whose temperature the samples carry."""
        last = self._usable - 1
        return max(0.0, float(self._betas[last] * self._gains[last] - self._psi.mean(0)[last]))

    def carries(self, nats: float) -> bool:
        """Whether the samples carry the frontier at this budget, which is above 0 and below `most_nats`."""
        return nats > 0 and int(self._minimum(self._psi.mean(0), nats)[1]) < self._usable - 1

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
            return FrontierPoint(nats, scale * last.gain, scale * last.stderr, scale * last.beta, last.effective)
        value, index = self._minimum(self._psi.mean(0), nats)
        if not self.carries(nats):
            raise InputError(
                f"a budget of {nats:g} nats: these samples carry the frontier up to {self.most_nats:.3g} nats only; "
                "take more base samples a prompt"
            )
        replicated, _ = self._minimum(self._replicated, nats)
        where = int(index)
        return FrontierPoint(
            nats,
            float(value),
            _spread(replicated, self._shares.shape[1]),
            float(self._betas[where]),
            float(self._effective[where]),
        )

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
        return 1 / self.point(nats).beta

    def nats_at(self, alpha: float) -> float:
        """Nats that the tilted law of temperature `alpha` spends, `beta psi'(beta) - psi(beta)`, mean over prompts.

        Raises:
            InputError: alpha is not positive, or so low that the samples do not carry it.
        """
        if not alpha > 0:
            raise InputError(f"a temperature of {alpha:g}: give a positive number")
        rows = [_cumulant(r, torch.tensor([1 / alpha], dtype=torch.float64)) for r in self.base]
        effective = 1 / (sum(float(row.concentration) for row in rows) / len(rows))
        if effective < LEAST_EFFECTIVE:
            raise InputError(
                f"a temperature of {alpha:g}: {effective:.1f} effective base samples a prompt are too few to say "
                f"what it costs; the lowest that these samples carry is {1 / float(self._betas[self._usable - 1]):.3g}"
            )
        return sum(float(row.gain) / alpha - float(row.psi) for row in rows) / len(rows)

    def best_of(self, n: int) -> BestOf:
        """Best-of-n, from all choices of n of the base samples of each prompt (an unbiased estimate).

        Raises:
            InputError: n is below 1 or above the samples of some prompt.
        """
        least = min(len(r) for r in self.base)
        if not 1 <= n <= least:
            raise InputError(f"best of {n}: give a number from 1 to {least}, the base samples of a prompt")
        gains = torch.stack([_mean_of_best(r, n) - r.mean() for r in self.base])
        error = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        return BestOf(n, math.log(n) - (n - 1) / n, float(gains.mean()), error)

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
        frontiers = scale * self._minimum(self._replicated, max(nats, self._least_nats))[0]
        replicated = (self._shares @ gains.double()) / frontiers
        slope = value / (point.gain * point.beta)
        return Estimate(value, math.hypot(_spread(replicated, self._shares.shape[1]), slope * nats_stderr))


def _resampled(count: int, seed: int) -> Tensor:
    """Bootstrap draws of `count` units as the share of each, `(replicates, count)`."""
    drawn = torch.randint(count, (_REPLICATES, count), generator=torch.Generator().manual_seed(seed))
    shares = torch.zeros(_REPLICATES, count, dtype=torch.float64)
    return shares.scatter_add_(1, drawn, torch.full(drawn.shape, 1 / count, dtype=torch.float64))


def _spread(replicated: Tensor, units: int) -> float:
    """Standard error from bootstrap replicates; of few units it is too small by the root of `(n - 1) / n`."""
    return float(replicated.std()) * math.sqrt(units / (units - 1))


@dataclass(frozen=True)
class _Cumulant:
    """Jackknifed psi and psi', and the sum of squared weights, of one prompt at every beta."""

    psi: Tensor
    gain: Tensor
    concentration: Tensor


def _cumulant(r: Tensor, betas: Tensor) -> _Cumulant:
    n = len(r)
    u = r - r.mean()
    exponents = betas[:, None] * u
    total = exponents.logsumexp(1)
    w = (exponents - total[:, None]).exp()
    # Leaving out sample i changes log S to log S + log(1 - w_i); where a weight is one, the beta is unusable anyway.
    left = torch.log1p(-w.clamp(max=1 - 1e-15))
    psi = total - n * math.log(n) + (n - 1) * math.log(n - 1) - (n - 1) * left.mean(1)
    tilted = (w * u).sum(1, keepdim=True)
    without = (tilted - w * u) / left.exp() + u / (n - 1)
    gain = n * tilted[:, 0] - (n - 1) * without.mean(1)
    return _Cumulant(psi, gain, w.square().sum(1))


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
