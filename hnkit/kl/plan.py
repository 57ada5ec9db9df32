"""How many samples and probes: sizes chosen from a pilot run, so that the estimate itself is a fixed-size mean.

A rule that stops when the estimate looks good biases it, because it stops more often on favourable draws. Here a pilot
decides, its probes are thrown away, and the estimate is made from fresh ones; given the samples, it is unbiased up to
the truncation of its Krylov spaces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hnkit.errors import InputError
from hnkit.kl.moments import Moments, ProbeSettings, probe_moments
from hnkit.maps import NoiseMap, select_rows

_PILOT_SAMPLES = 8
_PILOT_PROBES = 4
# The pilot's variance is an estimate of few degrees of freedom: with 24 of them, a chi-square variable is above 0.65 of
# its mean with 90% probability, so the probes planned for 1 / 0.65 of it meet the target about that often.
_SAFETY = 1.5
_MOST_PROBES = 100_000


@dataclass(frozen=True)
class Plan:
    """Sizes of an estimate and what the pilot that chose them cost.

    Attributes:
        settings: with `probes`, `tolerance` and, under a budget, `steps` filled in.
        samples: how many of the samples to use, from the first.
        num_jvp: Jacobian-vector products of the pilot.
        num_vjp: vector-Jacobian products of the pilot.
    """

    settings: ProbeSettings
    samples: int
    num_jvp: int = 0
    num_vjp: int = 0


def _pilot(f: NoiseMap, x: Tensor, settings: ProbeSettings, generator: torch.Generator | None, count: int) -> Moments:
    index = torch.arange(min(count, x.shape[0]), device=x.device)
    return probe_moments(select_rows(f, index), x[index], settings, generator=generator)


def plan_for_error(
    f: NoiseMap, x: Tensor, settings: ProbeSettings, rel_error: float, generator: torch.Generator | None
) -> Plan:
    """Probes per sample that bring the Monte Carlo error to `rel_error` of the KL.

    With n samples and k probes each, `stderr^2 = between / n + within / (n k)`. k is chosen so that the whole is at
    most `(rel_error * KL)^2`; where the samples alone exceed that, which no number of probes can mend, so that the
    probes' part is. Truncation is held below a tenth of the target.

    Raises:
        InputError: the KL is zero, so that no relative error exists; or the target needs absurdly many probes.
    """
    probes = min(
        max(settings.probes, _PILOT_PROBES), x[0].numel() if settings.variance_reduction == "xtrace" else 10**9
    )
    pilot = _pilot(f, x, replace(settings, probes=probes), generator, _PILOT_SAMPLES)
    value = float((pilot.l2 + pilot.error).mean())
    if value == 0:
        raise InputError("rel_error asks for a relative error of a KL that is zero: give probes or budget instead")
    target = (rel_error * value) ** 2
    n = x.shape[0]
    within = float(pilot.spread.mean())
    if pilot.l2.numel() > 1:
        between = float((pilot.l2 + pilot.error).var()) - within / probes
        if between < 0.75 * n * target:
            target -= max(between, 0.0) / n
    needed = max(1, math.ceil(_SAFETY * within / (n * target)))
    if needed > _MOST_PROBES:
        raise InputError(
            f"rel_error {rel_error:g} needs about {needed:,} probes per sample, more than {_MOST_PROBES:,}: "
            "give a larger one, or more samples"
        )
    if settings.variance_reduction == "xtrace":
        needed = min(max(needed, 2), x[0].numel())
    size = float(pilot.frobenius.mean()) / 2
    tolerance = settings.tolerance
    if size > 0:
        tolerance = min(tolerance, max(0.1 * rel_error * abs(value) / size, 1e-12))
    return Plan(replace(settings, probes=needed, tolerance=tolerance), n, pilot.num_jvp, pilot.num_vjp)


def plan_for_budget(
    f: NoiseMap, x: Tensor, settings: ProbeSettings, budget: int, generator: torch.Generator | None
) -> Plan:
    """Samples and probes that a budget of products allows, with the smallest variance.

    N rows of (sample, probe) pairs on n samples have the variance `between / n + within / N`, which falls with n: so
    every row gets its own sample as long as there are samples, and only then a further probe. One pilot row finds the
    number of steps; its products count.

    Raises:
        InputError: the budget does not pay for the pilot and one row.
    """
    group = max(2, settings.probes) if settings.variance_reduction == "xtrace" else 1
    jvp = vjp = 0
    steps = settings.steps
    if settings.method == "second-order":
        cost = 2
    elif settings.method == "roulette":
        pilot = _pilot(f, x, replace(settings, method="power", steps=4), generator, 1)
        jvp, vjp = pilot.num_jvp, pilot.num_vjp
        # Rows run together until the longest ends; N rows of a geometric law of parameter q last log N / -log q.
        q = min(max(float(pilot.norm.max()), 0.1), 0.95)
        cost = 4 + math.ceil(math.log(max(budget // 4, 2)) / -math.log(q))
    else:
        if steps is None:
            pilot = _pilot(f, x, replace(settings, probes=group), generator, 1)
            jvp, vjp, steps = pilot.num_jvp, pilot.num_vjp, pilot.steps
        cost = {"lanczos": 2 * steps + 1, "power": max(2, steps), "arnoldi": steps}[settings.method]
        cost *= 2 if settings.variance_reduction == "xtrace" else 1
    rows = (budget - jvp - vjp) // (cost * group)
    if rows < 1:
        least = jvp + vjp + cost * group
        raise InputError(f"budget {budget} is too small: one sample needs {least} products, the pilot included")
    samples = min(x.shape[0], rows)
    probes = group * (rows // samples)
    if settings.variance_reduction == "xtrace":
        probes = min(probes, x[0].numel())
    return Plan(replace(settings, probes=probes, steps=steps), samples, jvp, vjp)
