"""Hypernetworks that are deployed with fresh noise, and the KL that is proved for them by construction.

A hypernetwork `f` of any kind, attention included, is deployed as `x_hat = a (x + f(x)) + sqrt(1 - a^2) eps`, `eps` an
independent standard normal. Then `KL(law of x_hat || N(0, I)) <= a^2 E|f|^2 / (2 (1 - a^2))`, without a Jacobian, a
Lipschitz constant or injectivity. At `a^2 = 1/2` that bound is the paper's L2 term.

Source: `proofs/injected_noise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.internal.seeds import check_generator
from hnkit.internal.stats import Estimate, rounded_up
from hnkit.internal.values import number

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for a batch, or one for each of its rows; `None`: the global one."""


@dataclass(frozen=True)
class NoiseInjection:
    """How a hypernetwork is deployed: `x_hat = a (x + f(x)) + sqrt(1 - a^2) eps`.

    Attributes:
        share: `1 - a^2`, the share of the noise's variance that is drawn afresh, above 0 and below 1.
        max_delta: `R`: where `|f(x)|` is larger, f is scaled down to it, so that `|f| <= R` everywhere and the KL is
            at most `a^2 R^2 / (2 (1 - a^2))` whatever was trained; `None`: f as it is.

    Raises:
        InputError: a value is out of range.
    """

    share: float = 0.5
    max_delta: float | None = None

    def __post_init__(self) -> None:
        if not 0 < number(self.share, f"injected share {self.share!r}") < 1:
            raise InputError(f"injected share {self.share!r}: it is 1 - a^2, above 0 and below 1, such as 0.5")
        if self.max_delta is not None and not 0 < number(self.max_delta, f"max_delta {self.max_delta!r}") < math.inf:
            raise InputError(f"max_delta {self.max_delta!r}: it is a bound on |f(x)|, a finite number above 0")

    @property
    def kept(self) -> float:
        """The coefficient `a` of `x + f(x)`."""
        return math.sqrt(1 - self.share)

    @property
    def injected(self) -> float:
        """The coefficient `sqrt(1 - a^2)` of the fresh noise."""
        return math.sqrt(self.share)

    @property
    def nats_per_square(self) -> float:
        """The factor `a^2 / (2 (1 - a^2))` between `E|f|^2` and the bound of the KL, nats."""
        return (1 - self.share) / (2 * self.share)

    def clipped(self, delta: Tensor) -> Tensor:
        """The delta that is deployed: rows longer than `max_delta` are scaled down to it; `(n, *shape)`."""
        if self.max_delta is None:
            return delta
        wide = delta.to(torch.promote_types(delta.dtype, torch.float32))
        length = wide.flatten(1).norm(dim=1).clamp(min=self.max_delta).view(-1, *[1] * (delta.dim() - 1))
        shorter: Tensor = wide * (self.max_delta / length)
        return shorter

    def moved(self, x: Tensor, delta: Tensor, eps: Tensor) -> Tensor:
        """`a (x + f(x)) + sqrt(1 - a^2) eps` of a delta that has been clipped, `(n, *shape)`, in float32 at least."""
        return self.kept * (x + delta) + self.injected * eps

    def nats(self, delta: Tensor) -> Tensor:
        """`a^2 |f(x)|^2 / (2 (1 - a^2))` of every row, whose mean bounds the KL; `(n,)`, in float32 at least."""
        wide = self.clipped(delta).to(torch.promote_types(delta.dtype, torch.float32))
        return self.nats_per_square * wide.flatten(1).square().sum(1)


def read_injection(recorded: Any, where: Path) -> NoiseInjection | None:
    """What an adapter records of its deployment: a table `share`, `max_delta`, or nothing.

    Args:
        recorded: the entry of the adapter's configuration, as it was parsed.
        where: that file, for messages.

    Raises:
        InputError: it is another thing, or a value is out of range.
    """
    if recorded is None:
        return None
    if not isinstance(recorded, dict) or set(recorded) != {"share", "max_delta"}:
        raise InputError(f"{where} has injection {recorded!r}: it is a table of share and max_delta")
    try:
        return NoiseInjection(**recorded)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def fresh_noise(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of the shape and device of `x`, in float32 at least.

    Args:
        x: `(n, *shape)`.
        generator: one for the batch, or one for each row, so that a row does not depend on its place in a batch.

    Raises:
        InputError: the generators are not as many as the rows, or are none.
    """
    kind = torch.promote_types(x.dtype, torch.float32)
    if not isinstance(generator, Sequence):
        check_generator(generator)
        home = x.device if generator is None else generator.device
        return torch.randn(x.shape, dtype=kind, device=home, generator=generator).to(x.device)
    if len(generator) != len(x):
        raise InputError(f"{len(generator)} generators for {len(x)} rows of noise: give one for each row")
    rows = []
    for each in generator:
        if not isinstance(each, torch.Generator):
            raise InputError(
                f"generator {each!r} of a row is no torch.Generator: give torch.Generator().manual_seed(n)"
            )
        rows.append(torch.randn(x.shape[1:], dtype=kind, device=each.device, generator=each).to(x.device))
    return torch.stack(rows)


def deployed_noise(
    injection: NoiseInjection | None, x: Tensor, delta: Tensor, generators: Generators
) -> tuple[Tensor, Tensor]:
    """What the generator is given in place of `x`, and the delta in it; both `(n, *shape)`.

    Args:
        injection: how the hypernetwork is deployed; `None`: as `x + f(x)`, and nothing is drawn.
        x: `(n, *shape)` base noise.
        delta: `f(x)`.
        generators: what the fresh noise is drawn from, one generator for each row.
    """
    if injection is None:
        return x + delta.to(x.dtype), delta
    eps = fresh_noise(x, generators)
    delta = injection.clipped(delta)
    return injection.moved(x, delta.to(eps.dtype), eps).to(x.dtype), delta


# --- what is known of the KL ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InjectedBound:
    """The proved bound of the KL of a deployed hypernetwork, as far as samples tell it; nats.

    Attributes:
        nats: mean of `a^2 |f|^2 / (2 (1 - a^2))`: the KL is at most the true mean, of which this is an estimate.
        certified: the KL is at most this, with probability `confidence` over the samples; `None` where f is not known
            to be bounded or Lipschitz.
        confidence: that probability.
        how: what the certificate rests on, or why there is none.
        ceiling: the KL is at most this, without any sampling; `None` where f is not clipped.
    """

    nats: Estimate
    certified: float | None
    confidence: float
    how: str
    ceiling: float | None

    def to_json(self) -> dict[str, Any]:
        """The record as plain values, the estimate as `nats` and `nats_stderr`."""
        return {**vars(self), "nats": self.nats.value, "nats_stderr": self.nats.stderr}

    def sentence(self) -> str:
        """What is known, in words that name what is proved and what is estimated."""
        parts = [f"KL of the deployed law: at most {self.nats} nats (proved for any f; the mean is estimated)"]
        if self.certified is not None:
            parts.append(
                f"at most {rounded_up(self.certified)} nats with {100 * self.confidence:.0f} % confidence ({self.how})"
            )
        if self.ceiling is not None:
            parts.append(f"at most {rounded_up(self.ceiling)} nats for certain, |f| being clipped")
        if self.certified is None and self.ceiling is None:
            parts.append(f"no certificate of that mean: {self.how}")
        return "; ".join(parts)


def injected_bound(
    delta: Tensor, injection: NoiseInjection, *, lipschitz: float | None = None, confidence: float = 0.95
) -> InjectedBound:
    """The bound of the KL of a deployed hypernetwork from `f` at independent base noises.

    A certificate needs to know how large `|f|` can be where it was not looked at: from clipping (`max_delta`), else
    from a certified Lipschitz constant of any size. Which of the two is used does not depend on the samples.

    Args:
        delta: `(n, *shape)` values of `f` at independent draws of `N(0, I)`, clipped or not.
        injection: how it is deployed.
        lipschitz: a certified Lipschitz constant of `f`; `None`: none is known.
        confidence: one-sided level of the certificate.

    Raises:
        InputError: no samples, or a level outside (0, 1).
    """
    if len(delta) == 0:
        raise InputError("a bound from no samples: give at least one")
    if not 0 < confidence < 1:
        raise InputError(f"confidence {confidence!r}: give a probability between 0 and 1, such as 0.95")
    nats = injection.nats(delta.double()).cpu()
    certified = ceiling = None
    how = "f is neither clipped nor of a certified Lipschitz constant"
    if injection.max_delta is not None:
        ceiling = injection.nats_per_square * injection.max_delta**2
        certified = bounded_mean_upper(nats, ceiling, confidence)
        how = f"|f| is clipped at {injection.max_delta:g}; Hoeffding's inequality, n = {len(nats)}"
    elif lipschitz is not None:
        squares = nats / injection.nats_per_square
        certified = injection.nats_per_square * lipschitz_mean_square_upper(squares, lipschitz, confidence)
        how = f"certified Lipschitz constant {rounded_up(lipschitz)}; Gaussian concentration, n = {len(nats)}"
    return InjectedBound(Estimate.of(nats), certified, confidence, how, ceiling)


def bounded_mean_upper(values: Tensor, upper: float, confidence: float = 0.95) -> float:
    """An upper confidence bound of the mean of independent values in `[0, upper]`, of whatever laws.

    With `m` their mean over `upper`, it is the largest `q` with `n kl(m || q) <= log(1 / (1 - confidence))`, `kl` the
    divergence of two coins: the means of the values need not be equal, their average is what is bounded.

    Args:
        values: `(n,)`.
        upper: what no value can exceed.
        confidence: one-sided level.

    Raises:
        InputError: a value is not in `[0, upper]`.

    Source: Hoeffding 1963, theorem 1, doi 10.1080/01621459.1963.10500830; `proofs/mean_certificate`.
    """
    shares = values.double().flatten() / upper
    if not bool(((shares >= 0) & (shares <= 1 + 1e-9)).all()):
        raise InputError(f"a value is outside [0, {upper:g}], where all of them are said to be: give their true bound")
    mean, room = min(1.0, float(shares.mean())), math.log(1 / (1 - confidence)) / shares.numel()
    low, high = mean, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _coin_divergence(mean, middle) <= room else (low, middle)
    return upper * high


def _coin_divergence(p: float, q: float) -> float:
    """`KL(coin p || coin q)`, nats, for `p <= q`."""
    heads = p * math.log(p / q) if p > 0 else 0.0
    tails = (1 - p) * (math.log1p(-p) - math.log1p(-q)) if p < 1 and q < 1 else 0.0 if p == 1 else math.inf
    return heads + tails


def lipschitz_mean_square_upper(squares: Tensor, lipschitz: float, confidence: float = 0.95) -> float:
    """An upper confidence bound of `E|f(x)|^2`, `x ~ N(0, I)`, for an `L`-Lipschitz `f`.

    The root mean square of n values is `L / sqrt(n)`-Lipschitz in all their noises together. So it is rarely more than
    `L sqrt(2 log(1/(1-c)) / n)` below its mean (Gaussian concentration), which is at least
    `sqrt(E|f|^2 - L^2 / n)` (Poincare).

    Args:
        squares: `(n,)` values of `|f(x)|^2` at independent draws; f may be another Lipschitz map in each row, and the
            bound is then of the average.
        lipschitz: a certified `L`, of any size.
        confidence: one-sided level.

    Source: `proofs/mean_certificate`.
    """
    count = squares.numel()
    root = math.sqrt(float(squares.double().mean()))
    return (root + lipschitz * math.sqrt(2 * math.log(1 / (1 - confidence)) / count)) ** 2 + lipschitz**2 / count
