"""The record of an estimated KL: the value with its error, and the per-sample figures it was made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from scipy.special import betaincinv
from torch import Tensor

from hnkit.internal.stats import Estimate, mean_and_stderr, rounded_up
from hnkit.kl.control import controlled_mean
from hnkit.kl.moments import Moments

Form = Literal["stein", "change-of-variables"]
FORMS: tuple[Form, ...] = ("stein", "change-of-variables")
Injectivity = Literal["certified", "no fold seen", "unknown", "violated"]


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class KLEstimate(Estimate):
    """An estimate of the noise-space KL with what is known about its error; nats throughout.

    `value`, `stderr` and `bias_bound` are those of `Estimate`: the mean of `per_sample`; its standard error over
    samples and probes, NaN for a single sample; a proved bound of the truncation error, hence of the bias, `None` where
    none is known (it needs a proved Lipschitz constant below 1) and 0 for exact and unbiased methods.

    Attributes:
        per_sample: `(n,)`, the integrand at each sample that was used, float64.
        parts: what it is made of, per sample: `|f|^2/2`, `x . f`, `E(J)`, `tr J`, `tr J^2`, `|J|_F^2` and more.
        method: how E(J) was estimated.
        form: which of the two forms of the integrand.
        injective: whether `x + f(x)` is injective, without which the exact value is a lower bound of the KL:
            "certified" (almost everywhere at least), "unknown", or "violated" (its orientation changes between
            samples). `injectivity` tells two kinds of "unknown" apart.
        finite_variance: whether `stderr` is known to describe the spread: `False` for the roulette without a proved
            Lipschitz constant, whose variance is finite only if the local norms not seen are small enough.
    """

    per_sample: Tensor
    parts: Moments
    method: str
    form: Form
    injective: Literal["certified", "unknown", "violated"]
    finite_variance: bool = True

    @property
    def l2(self) -> float:
        """Mean of `|f|^2 / 2`."""
        return float(self.parts.l2.mean())

    @property
    def error(self) -> float:
        """Mean of `E(J)`; NaN for the method l2, which does not look at J."""
        return float(self.parts.error.mean())

    @property
    def bias_estimate(self) -> float:
        """Estimate of the truncation error of `value`, no bound; 0 for exact and unbiased methods, NaN for l2."""
        return float(self.parts.truncation.mean())

    @property
    def probe_stderr(self) -> float:
        """The part of `stderr` due to the probes; 0 without probes, NaN for one probe per sample."""
        return math.sqrt(float(self.parts.spread.mean()) / max(self.probes, 1) / self.samples)

    @property
    def symmetry_index(self) -> float:
        """`sum tr(J^2) / sum |J|_F^2` in [-1, 1]; NaN at J = 0 and for the method l2."""
        frobenius = float(self.parts.frobenius.sum())
        return float(self.parts.square.sum()) / frobenius if frobenius > 0 else math.nan

    @property
    def local_norm(self) -> float:
        """Largest `|J(x)|_2` seen, a lower bound of the Lipschitz constant; NaN where not looked at."""
        return float(self.parts.norm.max())

    @property
    def controlled(self) -> Estimate:
        """The same mean with the control variate `x . f - tr J`, whose mean is 0 by Stein's identity: free.

        Each sample is corrected by the coefficient of the others, so that no bias enters. Both forms of the integrand
        are members of the family, and this is as good as the better one. The plain value for the method l2 and for
        fewer than 8 samples.

        Source: `proofs/stein_control_variate`.
        """
        if not bool(self.parts.trace.isfinite().all()):
            return Estimate(self.value, self.stderr, self.bias_bound)
        found = controlled_mean(self.per_sample, self.parts.alignment - self.parts.trace)
        return Estimate(found.value, found.stderr, self.bias_bound)

    @property
    def num_jvp(self) -> int:
        """Jacobian-vector products, counted per row, those of a pilot included."""
        return self.parts.num_jvp

    @property
    def num_vjp(self) -> int:
        """Vector-Jacobian products, counted per row, those of a pilot included."""
        return self.parts.num_vjp

    @property
    def samples(self) -> int:
        """Samples used, n."""
        return len(self.per_sample)

    @property
    def probes(self) -> int:
        """Probes per sample (0: none)."""
        return self.parts.probes

    @property
    def steps(self) -> int:
        """Longest Krylov space or series (0: none)."""
        return self.parts.steps

    @property
    def folds(self) -> Folds | None:
        """What the signs of `det(I + J)` say of folds; `None` where the method does not know them."""
        if self.parts.sign is None:
            return None
        density = self.parts.l2 + self.parts.error + self.parts.alignment - self.parts.trace
        return Folds.of(self.parts.sign, density)

    @property
    def injectivity(self) -> Injectivity:
        """`injective` with one word more: "no fold seen", for "unknown" where all signs were looked at and positive.

        That is evidence and no proof; `folds.upper` is its measure, the 95 % bound of the mass under `N(0, I)` of the
        points where orientation is reversed. (Prompts that differ in that mass only make the bound safer.)
        """
        if self.injective == "unknown" and self.folds is not None and self.folds.negative == 0:
            return "no fold seen"
        return self.injective

    def __str__(self) -> str:
        text = str(Estimate(self.value, self.stderr))
        text = f"{text} nats"
        if self.bias_bound:
            text += f" (bias at most {rounded_up(self.bias_bound, 2)})"
        elif self.bias_bound is None and self.bias_estimate > 0:
            text += f" (truncation about {self.bias_estimate:.2g})"
        return text if self.finite_variance else f"{text} (finite variance not proved)"

    def __repr__(self) -> str:
        return f"KLEstimate({self}, {self.method}, {self.samples} samples, injective: {self.injective})"


@dataclass(frozen=True)
class Folds:
    """Where `x + f(x)` reverses orientation, and whether its degree is 1.

    With `ell = x . f + |f|^2/2 - log|det(I + J)|` and bounded f, `E[sgn det(I + J) exp(-ell)] = 1` (the degree of T),
    and `E[1{det < 0} exp(-ell)]` bounds the mass under `N(0, I)` of the points that folds cover more than once.

    Attributes:
        samples: n.
        negative: samples with `det(I + J) < 0`.
        upper: 95 % upper confidence bound of the probability of such a sample (Clopper and Pearson).
        degree: estimate of `E[sgn det(I + J) exp(-ell)]`; the variance of `exp(-ell)` may be large.
        folded: estimate of `E[1{det < 0} exp(-ell)]`.

    Source: `proofs/folding_entropy`.
    """

    samples: int
    negative: int
    upper: float
    degree: Estimate
    folded: Estimate

    @classmethod
    def of(cls, sign: Tensor, density: Tensor) -> Folds:
        """From the signs of `det(I + J)` and the change-of-variables integrand, each `(n,)`."""
        n, negative = len(sign), int((sign < 0).sum())
        upper = 1.0 if negative == n else float(betaincinv(negative + 1, n - negative, 0.95))
        weight = torch.exp(-density)
        return cls(n, negative, upper, Estimate.of(sign * weight), Estimate.of((sign < 0) * weight))

    def __str__(self) -> str:
        if self.negative == 0:
            return f"no fold in {self.samples} samples (at most {rounded_up(100 * self.upper, 2)} % of the noise, 95 %)"
        return f"orientation reversed at {self.negative} of {self.samples} samples; folded mass at most {self.folded}"


def turns_over(sign: Tensor, maps: Tensor) -> bool:
    """Whether a map changes its orientation, which an injective continuous map of R^d does not.

    Args:
        sign: `(n,)`, sign of `det(I + J)`.
        maps: `(n,)`, which map each sample is of: per-row conditions make different maps of the rows.
    """
    where = maps.to(sign.device)
    return bool(torch.isin(where[sign < 0], where[sign > 0]).any())


def joined_moments(parts: Sequence[Moments]) -> Moments:
    """The moments of successive samples as one; products add up."""
    sums, largest = ("num_jvp", "num_vjp"), ("probes", "steps")
    found: dict[str, Any] = {}
    for name in (field.name for field in fields(Moments)):
        values = [getattr(part, name) for part in parts]
        if name in sums or name in largest:
            found[name] = sum(values) if name in sums else max(values)
        else:
            found[name] = None if any(value is None for value in values) else torch.cat(values)
    return Moments(**found)


def joined_estimates(parts: Sequence[KLEstimate], maps: Tensor) -> KLEstimate:
    """One estimate from those of successive samples, made by one method.

    Args:
        parts: at least one.
        maps: `(n,)`, which map each sample is of.
    """
    moments = joined_moments([part.parts for part in parts])
    per_sample = torch.cat([part.per_sample for part in parts])
    value, stderr = mean_and_stderr(per_sample)
    bound = None if any(part.bias_bound is None for part in parts) else float(moments.bound.mean())
    sign, injective = moments.sign, parts[0].injective
    folds = sign is not None and turns_over(sign, maps[: len(sign)])
    if folds or any(part.injective == "violated" for part in parts):
        injective = "violated"
    return replace(
        parts[0], value=value, stderr=stderr, bias_bound=bound, per_sample=per_sample, parts=moments,
        injective=injective, finite_variance=all(part.finite_variance for part in parts),
    )  # fmt: skip
