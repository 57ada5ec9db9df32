"""How many samples and probes: sizes chosen from a pilot run, so that the estimate itself is a fixed-size mean.

A rule that stops when the estimate looks good biases it, because it stops more often on favourable draws. Here a pilot
decides, its probes are thrown away, and the estimate is made from fresh ones; given the samples, it is unbiased up to
the truncation of its Krylov spaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.kl.method import Estimator, Probed, Run, check_counts, check_fractions
from hnkit.kl.moments import Moments
from hnkit.maps import NoiseMap, at_rows

_PILOT_SAMPLES = 8
_PILOT_PROBES = 4
# The pilot's variance is an estimate of few degrees of freedom: with 24 of them, a chi-square variable is above 0.65 of
# its mean with 90 % probability, so the probes planned for 1 / 0.65 of it meet the target about that often.
_SAFETY = 1.5
_MOST_PROBES = 100_000

Pilot = Callable[[Probed, Tensor], Moments]
"""What makes the moments of a pilot, by an estimator, of the samples of these numbers."""


@dataclass(frozen=True)
class Plan:
    """Sizes of an estimate and what the pilots that chose them cost.

    Attributes:
        estimator: the estimator, with its number of probes, its tolerance and, under a budget, its longest space filled
            in.
        samples: how many of the samples to use, from the first.
        num_jvp: Jacobian-vector products of the pilots.
        num_vjp: vector-Jacobian products of the pilots.
    """

    estimator: Probed
    samples: int
    num_jvp: int = 0
    num_vjp: int = 0


def pilot_of(f: NoiseMap, x: Tensor, run: Run) -> Pilot:
    """The pilot that this process makes, of samples taken together."""
    return lambda estimator, index: estimator.moments(*at_rows(f, x, index), replace(run, progress=None))


def planned(
    x: Tensor, estimator: Probed, pilot: Pilot, *, rel_error: float | None = None, budget: int | None = None
) -> Plan:
    """The plan for a relative error or a budget; all samples, and the estimator as it is, where neither is asked for.

    Raises:
        InputError: there is none.
    """
    if rel_error is not None:
        return plan_for_error(x, estimator, rel_error, pilot)
    if budget is not None:
        return plan_for_budget(x, estimator, budget, pilot)
    return Plan(estimator, x.shape[0])


def check_sizes(estimator: Estimator, rel_error: float | None, budget: int | None) -> None:
    """Refuse sizes that do not go together, or not with the method.

    Raises:
        InputError: two of them decide, the method has no probes, or too few are asked for.
    """
    check_counts(budget=budget)
    check_fractions(rel_error=rel_error)
    if not isinstance(estimator, Probed) and (rel_error is not None or budget is not None):
        raise InputError(f"method {estimator.name} uses no probes: rel_error and budget go with the stochastic methods")
    if rel_error is not None and budget is not None:
        raise InputError("rel_error and budget are given both: give the one that decides")
    if isinstance(estimator, Probed) and estimator.probes < estimator.least_probes and rel_error is budget is None:
        raise InputError(f"xtrace with {estimator.probes} probes: it needs {estimator.least_probes} probes or more")


def plan_for_error(x: Tensor, estimator: Probed, rel_error: float, pilot: Pilot) -> Plan:
    """Probes per sample that bring the Monte Carlo error to `rel_error` of the KL.

    With n samples and k probes each, `stderr^2 = between / n + within / (n k)`. k is chosen so that the whole is at
    most `(rel_error * KL)^2`; where the samples alone exceed that, which no number of probes can mend, so that the
    probes' part is. Truncation is held below a tenth of the target.

    Raises:
        InputError: the KL is zero, so that no relative error exists; or the target needs absurdly many probes.
    """
    dim = x[0].numel()
    most = dim if estimator.least_probes > 1 else _MOST_PROBES
    probes = min(max(estimator.probes, _PILOT_PROBES), most)
    first = torch.arange(min(_PILOT_SAMPLES, x.shape[0]), device=x.device)
    found = pilot(replace(estimator, probes=probes), first)
    value = float((found.l2 + found.error).mean())
    if value == 0:
        raise InputError("rel_error asks for a relative error of a KL that is zero: give probes or budget instead")
    target = (rel_error * value) ** 2
    n = x.shape[0]
    within = float(found.spread.mean())
    if found.l2.numel() > 1:
        between = float((found.l2 + found.error).var()) - within / probes
        if between < 0.75 * n * target:
            target -= max(between, 0.0) / n
    needed = max(1, math.ceil(_SAFETY * within / (n * target)))
    if needed > _MOST_PROBES:
        raise InputError(
            f"rel_error {rel_error:g} needs about {needed:,} probes per sample, more than {_MOST_PROBES:,}: "
            "give a larger one, or more samples"
        )
    chosen = replace(estimator, probes=min(max(needed, estimator.least_probes), most))
    size = float(found.frobenius.mean()) / 2
    if size > 0:
        chosen = chosen.finer(max(0.1 * rel_error * abs(value) / size, 1e-12))
    return Plan(chosen, n, found.num_jvp, found.num_vjp)


def plan_for_budget(x: Tensor, estimator: Probed, budget: int, pilot: Pilot) -> Plan:
    """Samples and probes that a budget of products allows, with the smallest variance.

    N rows of (sample, probe) pairs on n samples have the variance `between / n + within / N`, which falls with n: so
    every row gets its own sample as long as there are samples, and only then a further probe. A pilot row finds how
    many products a row needs, and up to seven more samples do, where they cost no more than an eighth of the budget.
    The steps of the estimate itself stay adaptive, to its own tolerance; what the pilots show plus a step is set aside
    for each row, and the longest space that the budget pays for is the limit.

    Raises:
        InputError: the budget does not pay for the pilot and one row.
    """
    group = max(estimator.least_probes, estimator.probes) if estimator.least_probes > 1 else 1
    jvp = vjp = 0
    cost = reserve = estimator.fixed_products
    if cost is None or reserve is None:
        scout = estimator.pilot
        found = pilot(scout, torch.arange(1, device=x.device))
        jvp, vjp = found.num_jvp, found.num_vjp
        rest = torch.arange(1, min(_PILOT_SAMPLES, x.shape[0], 1 + budget // (8 * (jvp + vjp))), device=x.device)
        if len(rest):
            wider = pilot(scout, rest)
            jvp, vjp = jvp + wider.num_jvp, vjp + wider.num_vjp
            found = wider if wider.steps > found.steps else found
        cost = estimator.products(found, budget)
        reserve = max(cost, estimator.products_of(found.steps + 1)) if found.steps < x[0].numel() else cost
    left = budget - jvp - vjp
    rows = left // (reserve * group) or left // (cost * group)
    if rows < 1:
        least = jvp + vjp + cost * group
        raise InputError(f"budget {budget} is too small: one sample needs {least} products, the pilot included")
    samples = min(x.shape[0], rows)
    probes = group * (rows // samples)
    if estimator.least_probes > 1:
        probes = min(probes, x[0].numel())
    limited = estimator.within(left // (samples * probes))
    return Plan(replace(limited, probes=probes), samples, jvp, vjp)
