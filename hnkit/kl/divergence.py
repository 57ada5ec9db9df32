"""The noise-space KL divergence `KL(law of x + f(x) || N(0, I))` of a noise hypernetwork, and its record."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hnkit.errors import InputError, NotCertifiedError
from hnkit.internal.seeds import check_generator
from hnkit.internal.stats import mean_and_stderr
from hnkit.jacobian import check_batch, check_map, compile_map, reusable_graphs
from hnkit.kl.estimate import FORMS, Form, KLEstimate, turns_over
from hnkit.kl.method import (
    Estimator,
    Probed,
    Run,
    check_counts,
    check_lipschitz,
    estimator_for,
    method_names,
)
from hnkit.kl.moments import Moments, Progress
from hnkit.kl.plan import check_sizes, pilot_of, planned
from hnkit.maps import NoiseMap, at_rows, map_numbers

__all__ = ["FORMS", "METHODS", "Form", "KLEstimate", "Method", "noise_kl"]

Method = str | Estimator
METHODS = method_names()


def noise_kl(
    f: NoiseMap,
    x: Tensor,
    *,
    method: Method = "exact",
    form: Form = "stein",
    generator: torch.Generator | None = None,
    rel_error: float | None = None,
    budget: int | None = None,
    lipschitz: float | None = None,
    chunk: int | None = None,
    compile: bool | str = False,
    check: bool = True,
    certify: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> KLEstimate:
    """Estimate the KL divergence between the law of `x + f(x)`, `x ~ N(0, I_d)`, and `N(0, I_d)`.

    The mean over `x` of the integrand, in the Stein form `|f|^2/2 + E(J)` or the change-of-variables form
    `x . f + |f|^2/2 - log|det(I + J)|`, with `E(J) = tr J - log|det(I + J)|`. It is the KL where `x + f(x)` is
    injective, and a lower bound of it otherwise.

    Args:
        f: batch-first map `(n, *shape) -> (n, *shape)`, rows independent, differentiable.
        x: `(n, *shape)`, draws of `N(0, I_d)`.
        method: "exact" (dense Jacobian, d products per sample, log-det in float64), "arnoldi", "lanczos", "power",
            "roulette", "second-order" (`tr(J^2)/2` for `E(J)`) or "l2" (0 for `E(J)`); or an estimator that owns its
            options, such as `hnkit.kl.Arnoldi(probes=4, tolerance=1e-5)`.
        form: "stein" or "change-of-variables"; the L2 term is the same in both.
        generator: the generator of the probes.
        rel_error: choose the number of probes, by a pilot run, for this Monte Carlo error relative to the KL (see
            `hnkit.kl.plan.plan_for_error`).
        budget: spend at most about this many products: as many samples as it pays for, then more probes each.
        lipschitz: a *proved* Lipschitz constant of f, from which `bias_bound` follows; `None`: taken from
            `lipschitz_upper` where f can be certified.
        chunk: rows per pass through the network, which bounds the memory; `None`: chosen from d and the device.
        compile: run the map through `torch.compile` (a string names its backend) after a parity check.
        check: try the map first (`check_map`).
        certify: look for a proof, from the weights of f, of its Lipschitz constant and of injectivity.
        progress: a function that is called with (done, in all): products for "exact", (sample, probe) rows otherwise.

        **options: options of the method, where it is named: `probes` (per sample), `steps` (Krylov or series length;
            `None`: adaptive), `tolerance` (relative truncation error that adaptive steps aim at), `probe`
            ("rademacher", "gaussian" or "spherical"), `variance_reduction` ("xtrace" with "arnoldi" and 2 probes or
            more) and what its class in `hnkit.kl.methods` says.

    Raises:
        InputError: a bad option or map; a local norm >= 1 where the method needs less (it is named).
        NonFiniteError: a non-finite value or product; the sample is named.

    Source: arXiv 2508.09968, eq. 53 and 55; `proofs/kl_two_forms`, `proofs/second_order`, `proofs/non_injective`.
    """
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}: accepted are {', '.join(FORMS)}")
    check_counts(chunk=chunk)
    check_lipschitz(lipschitz)
    check_generator(generator)
    estimator = estimator_for(method, options)
    check_sizes(estimator, rel_error, budget)
    check_batch(x)
    if check:
        check_map(f, x, jvp=estimator.name == "lanczos")
    if lipschitz is None and certify and estimator.name != "exact":
        lipschitz = proved_lipschitz(f)
    run = Run(generator, lipschitz, chunk, progress)
    inner = f
    with reusable_graphs() if compile else nullcontext():
        if compile:
            inner = compile_map(f, x[:8], compile if isinstance(compile, str) else "inductor")
        if isinstance(estimator, Probed):
            moments = _probed(inner, x, estimator, rel_error, budget, run)
        else:
            moments = estimator.moments(inner, x, run)
    per_sample = moments.l2
    if estimator.sees_jacobian:
        per_sample = per_sample + moments.error
        if form == "change-of-variables":
            per_sample = per_sample + moments.alignment - moments.trace
    value, stderr = mean_and_stderr(per_sample)
    bound = float(moments.bound.mean())
    return KLEstimate(
        value,
        stderr,
        None if math.isnan(bound) else bound,
        per_sample=per_sample,
        parts=moments,
        method=estimator.name,
        form=form,
        injective=_injective(f, moments.sign, certify),
        finite_variance=estimator.finite_variance(lipschitz),
    )


def _probed(
    f: NoiseMap, x: Tensor, estimator: Probed, rel_error: float | None, budget: int | None, run: Run
) -> Moments:
    """The moments of the samples used, with the products of a pilot added."""
    plan = planned(x, estimator, pilot_of(f, x, run), rel_error=rel_error, budget=budget)
    moments = plan.estimator.moments(*at_rows(f, x, plan.samples), run)
    return replace(moments, num_jvp=moments.num_jvp + plan.num_jvp, num_vjp=moments.num_vjp + plan.num_vjp)


def proved_lipschitz(f: NoiseMap) -> float | None:
    """A certified Lipschitz constant of `f`, where `lipschitz_upper` can give one."""
    if not isinstance(f, nn.Module):
        return None
    from hnkit.lipschitz import lipschitz_upper

    try:
        return lipschitz_upper(f).value
    except NotCertifiedError:
        return None


def _injective(f: NoiseMap, sign: Tensor | None, certify: bool) -> Literal["certified", "unknown", "violated"]:
    if sign is not None and turns_over(sign, map_numbers(f, len(sign))[: len(sign)]):
        return "violated"
    if not certify:
        return "unknown"
    from hnkit.lipschitz import certify_injective

    return "certified" if certify_injective(f).status == "certified" else "unknown"
