"""The cumulant generating function of a reward at many temperatures, and how far its weights can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hnkit.maps import slices

_ENTRIES = 2**22
"""Entries of a table of samples by temperatures that are held at a time, at most."""

_TAIL_SHARE, _TAIL_ROOT, _TAIL_LEAST = 0.2, 3.0, 3
"""The tail is the largest fifth of the weights, at most 3 roots of their number (arXiv 1507.02646), 3 at least."""


@dataclass(frozen=True)
class Cumulant:
    """What the base samples of one prompt say at every inverse temperature; every field `(betas,)`.

    Attributes:
        psi: `log E exp(beta (r - E r))`, jackknifed.
        gain: its derivative, the gain of the tilted law, jackknifed.
        square: sum over samples of the squared influence on `psi`, `((omega - 1 - beta u) / n)^2`.
        fourth: sum of its fourth powers.
    """

    psi: Tensor
    gain: Tensor
    square: Tensor
    fourth: Tensor


def cumulant(r: Tensor, betas: Tensor) -> Cumulant:
    """The cumulant of the rewards `(n,)` of one prompt at `(betas,)`, n >= 2; memory is bounded, whatever n is."""
    rows = max(1, _ENTRIES // len(r))
    parts = [_cumulant(r, part) for part in _cut(betas, rows)]
    return Cumulant(*(torch.cat(list(column)) for column in zip(*parts, strict=True)))


def _cumulant(r: Tensor, betas: Tensor) -> tuple[Tensor, ...]:
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
    square = (w - (1 + exponents) / n).square()
    return psi, gain, square.sum(1), square.square().sum(1)


def effective_samples(samples: Sequence[Tensor], betas: Tensor) -> Tensor:
    """`(sum w)^2 / sum w^2` of the weights `exp(beta r)`, the harmonic mean over prompts, `(betas,)`."""
    concentration = torch.zeros_like(betas)
    for r in samples:
        u = r - r.max()
        parts = []
        for part in _cut(betas, max(1, _ENTRIES // len(u))):
            w = (part[:, None] * u).exp()
            parts.append(w.square().sum(1) / w.sum(1).square())
        concentration += torch.cat(parts) / len(samples)
    return 1 / concentration


def halved(samples: Sequence[Tensor], betas: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means over prompts of psi and psi' at `(betas,)` from half of the samples of each, the mean of both halves.

    What half of the samples say less or more than all of them is what all of them lack, in size.
    """
    psi = gain = torch.zeros_like(betas)
    for r in samples:
        order = torch.randperm(len(r), generator=generator)
        for half in order.tensor_split(2):
            found = cumulant(r[half], betas)
            psi, gain = psi + found.psi, gain + found.gain
    count = 2 * len(samples)
    return psi / count, gain / count


def tail_index(samples: Sequence[Tensor], betas: Tensor) -> Tensor:
    """Hill's estimate of the Pareto index of the weights `exp(beta u) / E exp(beta u)` of all prompts, `(betas,)`.

    At 1/2 and above their variance is infinite, at 1 and above their mean: exponential rewards of unit scale have the
    index beta. The weights of a reward that is bounded have index 0 in the end, and of a Gaussian one too; what counts
    is the index as far out as the samples reach.
    """
    count = sum(len(r) for r in samples)
    largest = min(count - 1, max(_TAIL_LEAST, math.ceil(min(_TAIL_SHARE * count, _TAIL_ROOT * math.sqrt(count)))))
    centred = [r - r.mean() for r in samples]
    # within a prompt the order of the weights is that of the rewards, so that these are all that can be among the top
    tops = [u.topk(min(len(u), largest + 1)).values for u in centred]
    normalisers = torch.stack([_log_mean(u, betas) for u in centred])
    wide = max(1, _ENTRIES // sum(len(top) for top in tops))
    found = []
    for part, logs_of_means in zip(_cut(betas, wide), _cut(normalisers.mT, wide), strict=True):
        logs = torch.cat([part[:, None] * top - z[:, None] for top, z in zip(tops, logs_of_means.mT, strict=True)], 1)
        top = logs.topk(largest + 1, dim=1).values
        found.append(top[:, :-1].mean(1) - top[:, -1])
    return torch.cat(found)


def _cut(values: Tensor, width: int) -> list[Tensor]:
    """Parts of at most `width` rows."""
    return [values[part] for part in slices(len(values), width)]


def _log_mean(u: Tensor, betas: Tensor) -> Tensor:
    """`log E exp(beta u)` at `(betas,)`."""
    parts = [(part[:, None] * u).logsumexp(1) for part in _cut(betas, max(1, _ENTRIES // len(u)))]
    return torch.cat(parts) - math.log(len(u))
