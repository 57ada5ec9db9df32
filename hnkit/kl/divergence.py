"""The noise-space KL divergence `KL(law of x + f(x) || N(0, I))` of a noise hypernetwork, and its record."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hnkit.errors import InputError, NotCertifiedError
from hnkit.internal.stats import mean_and_stderr
from hnkit.internal.values import number
from hnkit.jacobian import check_batch, check_map, compile_map, reusable_graphs
from hnkit.kl.estimators import PROBES, Probe
from hnkit.kl.moments import (
    Moments,
    ProbeSettings,
    Progress,
    VarianceReduction,
    dense_moments,
    plain_moments,
    probe_moments,
)
from hnkit.kl.plan import Plan, plan_for_budget, plan_for_error
from hnkit.maps import NoiseMap, select_rows

Method = Literal["exact", "arnoldi", "lanczos", "power", "roulette", "second-order", "l2"]
METHODS: tuple[Method, ...] = ("exact", "arnoldi", "lanczos", "power", "roulette", "second-order", "l2")
Form = Literal["stein", "change-of-variables"]
FORMS: tuple[Form, ...] = ("stein", "change-of-variables")


@dataclass(frozen=True)
class KLEstimate:
    """An estimate of the noise-space KL with what is known about its error; nats throughout.

    Attributes:
        value: mean of `per_sample`.
        stderr: its standard error over samples and probes; NaN for a single sample.
        l2: mean of `|f|^2 / 2`.
        error: mean of `E(J)` (NaN for the method l2, which does not look at J).
        per_sample: `(n,)`, the integrand at each sample that was used, float64.
        bias_bound: proved bound of the truncation error of `value`, hence of its bias; `None` where none is known (it
            needs a proved Lipschitz constant below 1); 0 for exact and unbiased methods.
        bias_estimate: estimate of the same, not a bound; 0 for exact and unbiased methods, NaN for l2.
        probe_stderr: the part of `stderr` due to the probes; 0 without probes, NaN for one probe per sample.
        symmetry_index: `sum tr(J^2) / sum |J|_F^2` in [-1, 1]; NaN at J = 0 and for the method l2.
        local_norm: largest `|J(x)|_2` seen, a lower bound of the Lipschitz constant (NaN where not looked at).
        num_jvp: Jacobian-vector products, counted per row.
        num_vjp: vector-Jacobian products, counted per row.
        injective: whether `x + f(x)` is injective, without which the exact value is a lower bound of the KL:
            "certified", "unknown", or "violated" (its orientation changes between samples).
        method: how E(J) was estimated.
        form: which of the two forms of the integrand.
        samples: n.
        probes: probes per sample (0: none).
        steps: longest Krylov space or series (0: none).
    """

    value: float
    stderr: float
    l2: float
    error: float
    per_sample: Tensor
    bias_bound: float | None
    bias_estimate: float
    probe_stderr: float
    symmetry_index: float
    local_norm: float
    num_jvp: int
    num_vjp: int
    injective: Literal["certified", "unknown", "violated"]
    method: Method
    form: Form
    samples: int
    probes: int
    steps: int

    def __str__(self) -> str:
        text = f"{self.value:.6g} +- {self.stderr:.2g} nats"
        if self.bias_bound:
            return f"{text} (bias at most {self.bias_bound:.2g})"
        if self.bias_bound is None and self.bias_estimate > 0:
            return f"{text} (truncation about {self.bias_estimate:.2g})"
        return text


def noise_kl(
    f: NoiseMap,
    x: Tensor,
    *,
    method: Method = "exact",
    form: Form = "stein",
    generator: torch.Generator | None = None,
    probes: int = 1,
    steps: int | None = None,
    tolerance: float = 1e-3,
    rel_error: float | None = None,
    budget: int | None = None,
    probe: Probe = "rademacher",
    variance_reduction: VarianceReduction = "none",
    lipschitz: float | None = None,
    chunk: int | None = None,
    compile: bool | str = False,
    check: bool = True,
    certify: bool = True,
    progress: Progress | None = None,
) -> KLEstimate:
    """Estimate the KL divergence between the law of `x + f(x)`, `x ~ N(0, I_d)`, and `N(0, I_d)`.

    The mean over `x` of the integrand, in the Stein form `|f|^2/2 + E(J)` or the change-of-variables form
    `x . f + |f|^2/2 - log|det(I + J)|`, with `E(J) = tr J - log|det(I + J)|`. It is the KL where `x + f(x)` is
    injective, and a lower bound of it otherwise.

    Args:
        f: batch-first map `(n, *shape) -> (n, *shape)`, rows independent, differentiable.
        x: `(n, *shape)`, draws of `N(0, I_d)`.
        method: "exact" (dense Jacobian, d products per sample, log-det in float64), "arnoldi", "lanczos", "power",
            "roulette", "second-order" (`tr(J^2)/2` for `E(J)`) or "l2" (0 for `E(J)`).
        form: "stein" or "change-of-variables"; the L2 term is the same in both.
        generator: of the probes.
        probes: probes per sample of the stochastic methods.
        steps: Krylov or series length; `None`: adaptive, to `tolerance`.
        tolerance: relative truncation error that adaptive steps aim at.
        rel_error: choose the number of probes, by a pilot run, for this Monte Carlo error relative to the KL (see
            `hnkit.kl.plan.plan_for_error`).
        budget: spend at most about this many products: as many samples as it pays for, then more probes each.
        probe: "rademacher", "gaussian" or "spherical".
        variance_reduction: "none", or "xtrace" with the method "arnoldi" and 2 probes or more: leave-one-out
            estimates, at twice the products, for spectra that decay.
        lipschitz: a *proved* Lipschitz constant of f, from which `bias_bound` follows; `None`: taken from
            `lipschitz_upper` where f can be certified.
        chunk: rows per pass through the network, which bounds the memory; `None`: chosen from d and the device.
        compile: run the map through `torch.compile` (a string names its backend) after a parity check.
        check: try the map first (`check_map`).
        certify: look for a proof, from the weights of f, of its Lipschitz constant and of injectivity.
        progress: called with (done, in all): products for "exact", (sample, probe) rows otherwise.

    Raises:
        InputError: a bad option or map; a local norm >= 1 where the method needs less (it is named).
        NonFiniteError: a non-finite value or product; the sample is named.

    Source: arXiv 2508.09968, eq. 53 and 55; `proofs/kl_two_forms`, `proofs/second_order`, `proofs/non_injective`.
    """
    _check_names(method, form, probe, variance_reduction)
    _check_numbers(probes=probes, steps=steps, budget=budget, chunk=chunk)
    _check_fractions(tolerance=tolerance, rel_error=rel_error)
    if lipschitz is not None and not 0 <= number(lipschitz, f"lipschitz {lipschitz!r}") < math.inf:
        raise InputError(f"lipschitz {lipschitz!r} is no Lipschitz constant: give a finite number, 0 or more")
    if method in ("exact", "l2") and (rel_error is not None or budget is not None):
        raise InputError(f"method {method} uses no probes: rel_error and budget go with the stochastic methods")
    if rel_error is not None and budget is not None:
        raise InputError("rel_error and budget are given both: give the one that decides")
    if variance_reduction == "xtrace" and (method != "arnoldi" or (probes < 2 and rel_error is budget is None)):
        raise InputError(f"xtrace with method {method} and {probes} probes: it needs arnoldi and 2 probes or more")
    check_batch(x)
    if check:
        check_map(f, x)
    if lipschitz is None and method != "exact" and certify:
        lipschitz = _proved_lipschitz(f)
    inner = f
    with reusable_graphs() if compile else nullcontext():
        if compile:
            inner = compile_map(f, x[:8], compile if isinstance(compile, str) else "inductor")
        if method == "l2":
            moments = plain_moments(inner, x, chunk)
        elif method == "exact":
            moments = dense_moments(inner, x, chunk, progress)
        else:
            settings = ProbeSettings(
                method, probes, steps, tolerance, probe, lipschitz, variance_reduction, chunk
            )  # fmt: skip
            x, moments = _probed(inner, x, settings, rel_error, budget, generator, progress)
    per_sample = moments.l2 + moments.error
    if form == "change-of-variables" and method != "l2":
        per_sample = per_sample + moments.alignment - moments.trace
    value, stderr = mean_and_stderr(per_sample)
    frobenius = float(moments.frobenius.sum())
    return KLEstimate(
        value=value,
        stderr=stderr,
        l2=float(moments.l2.mean()),
        error=float(moments.error.mean()) if method != "l2" else math.nan,
        per_sample=per_sample,
        bias_bound=_bias_bound(moments, x[0].numel(), method, lipschitz),
        bias_estimate=float(moments.truncation.mean()),
        probe_stderr=math.sqrt(float(moments.spread.mean()) / max(moments.probes, 1) / x.shape[0]),
        symmetry_index=float(moments.square.sum()) / frobenius if frobenius > 0 else math.nan,
        local_norm=float(moments.norm.max()),
        num_jvp=moments.num_jvp,
        num_vjp=moments.num_vjp,
        injective=_injective(f, moments.sign, certify),
        method=method,
        form=form,
        samples=x.shape[0],
        probes=moments.probes,
        steps=moments.steps,
    )


def _probed(
    f: NoiseMap,
    x: Tensor,
    settings: ProbeSettings,
    rel_error: float | None,
    budget: int | None,
    generator: torch.Generator | None,
    progress: Progress | None,
) -> tuple[Tensor, Moments]:
    """The samples used and their moments, with the products of a pilot added."""
    plan = Plan(settings, x.shape[0])
    if rel_error is not None:
        plan = plan_for_error(f, x, settings, rel_error, generator)
    elif budget is not None:
        plan = plan_for_budget(f, x, settings, budget, generator)
    index = torch.arange(plan.samples, device=x.device)
    used = x[index]
    moments = probe_moments(
        select_rows(f, index), used, plan.settings, generator=generator, progress=progress
    )  # fmt: skip
    total = replace(moments, num_jvp=moments.num_jvp + plan.num_jvp, num_vjp=moments.num_vjp + plan.num_vjp)
    return used, total


def _bias_bound(moments: Moments, dim: int, method: Method, lipschitz: float | None) -> float | None:
    if method in ("exact", "roulette"):
        return 0.0
    if method == "l2":
        if lipschitz is None or lipschitz >= 1:
            return None
        from hnkit.bounds import theorem7_bound

        return float(theorem7_bound(dim, lipschitz))
    bound = float(moments.bound.mean())
    return None if math.isnan(bound) else bound


def _proved_lipschitz(f: NoiseMap) -> float | None:
    """A certified Lipschitz constant of `f`, where `lipschitz_upper` can give one."""
    if not isinstance(f, nn.Module):
        return None
    from hnkit.lipschitz import lipschitz_upper

    try:
        return lipschitz_upper(f).value
    except NotCertifiedError:
        return None


def _injective(f: NoiseMap, sign: Tensor | None, certify: bool) -> Literal["certified", "unknown", "violated"]:
    # An injective continuous map of R^d keeps its orientation; per-row conditions make different maps of the rows.
    if sign is not None and not hasattr(f, "select") and bool((sign > 0).any()) and bool((sign < 0).any()):
        return "violated"
    if not certify:
        return "unknown"
    from hnkit.lipschitz import certify_injective

    return "certified" if certify_injective(f).status == "certified" else "unknown"


def _check_names(method: str, form: str, probe: str, variance_reduction: str) -> None:
    for name, value, accepted in (
        ("method", method, METHODS),
        ("form", form, FORMS),
        ("probe", probe, PROBES),
        ("variance_reduction", variance_reduction, ("none", "xtrace")),
    ):
        if value not in accepted:
            raise InputError(f"unknown {name} {value!r}: accepted are {', '.join(accepted)}")


def _check_numbers(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**40):
            raise InputError(f"{name} {count!r} is not a positive whole number: give 1 or more, below 2^40")


def _check_fractions(**fractions: float | None) -> None:
    for name, value in fractions.items():
        if value is not None and not 0 < value < 1:
            raise InputError(f"{name} {value!r} is not between 0 and 1: give a relative error such as 0.01")
