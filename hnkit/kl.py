"""The noise-space KL divergence `KL(law of x + f(x) || N(0, I))` of a noise hypernetwork, and its record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hnkit._errors import InputError
from hnkit._stats import mean_and_stderr
from hnkit.backend import NoiseMap
from hnkit.estimators import PROBES, Probe
from hnkit.jacobian import check_batch, check_map
from hnkit.moments import dense_moments, plain_moments, probe_moments

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
        per_sample: `(n,)`, the integrand at each sample, float64.
        bias_bound: proved bound of the bias of `value` against the exact integrand's mean, `None` where none is known;
            0 for exact and unbiased methods.
        bias_estimate: estimated truncation error, not a bound; 0 for exact and unbiased methods.
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
    probe: Probe = "rademacher",
    lipschitz: float | None = None,
    chunk: int | None = None,
    check: bool = True,
    progress: Callable[[int, int], None] | None = None,
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
        steps: Krylov steps; `None`: adaptive, to `tolerance`.
        tolerance: relative truncation error that adaptive steps aim at.
        probe: law of the probes.
        lipschitz: a *proved* Lipschitz constant of f, from which `bias_bound` follows; `None`: taken from
            `lipschitz_upper` where f can be certified.
        chunk: rows per pass through the network, which bounds the memory; `None`: chosen from d and the device.
        check: try the map first (`check_map`).
        progress: called with (products done, products in all).

    Raises:
        InputError: a bad option or map; a local norm >= 1 where the method needs less (it is named).
        NonFiniteError: a non-finite value or product; the sample is named.

    Source: arXiv 2508.09968, eq. 53 and 55; items c, d and g of `proofs/`.
    """
    _check_options(method, form, probes, steps, tolerance, probe, lipschitz, chunk)
    check_batch(x)
    if check:
        check_map(f, x)
    if method == "l2":
        moments = plain_moments(f, x, chunk)
    elif method == "exact":
        moments = dense_moments(f, x, chunk, progress)
    else:
        moments = probe_moments(
            f, x, method, generator=generator, probes=probes, steps=steps, tolerance=tolerance, probe=probe, chunk=chunk,
            progress=progress,
        )  # fmt: skip
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
        bias_bound=_bias_bound(f, x[0].numel(), method, lipschitz),
        bias_estimate=float(moments.truncation.mean()),
        probe_stderr=math.sqrt(float(moments.spread.mean()) / max(moments.probes, 1) / x.shape[0]),
        symmetry_index=float(moments.square.sum()) / frobenius if frobenius > 0 else math.nan,
        local_norm=float(moments.norm.max()),
        num_jvp=moments.num_jvp,
        num_vjp=moments.num_vjp,
        injective=_injective(f, moments.sign),
        method=method,
        form=form,
        samples=x.shape[0],
        probes=moments.probes,
    )


def _bias_bound(f: NoiseMap, dim: int, method: Method, lipschitz: float | None) -> float | None:
    if method in ("exact", "roulette"):
        return 0.0
    constant = lipschitz if lipschitz is not None else _proved_lipschitz(f)
    if constant is None or constant >= 1:
        return None
    from hnkit.bounds import second_order_remainder_bound, theorem7_bound

    if method == "l2":
        return float(theorem7_bound(dim, constant))
    return float(second_order_remainder_bound(math.sqrt(dim) * constant, constant))


def _proved_lipschitz(f: NoiseMap) -> float | None:
    """A certified Lipschitz constant of `f`, where `lipschitz_upper` can give one."""
    if not isinstance(f, nn.Module):
        return None
    from hnkit.lipschitz import lipschitz_upper

    try:
        return lipschitz_upper(f).value
    except InputError:
        return None


def _injective(f: NoiseMap, sign: Tensor | None) -> Literal["certified", "unknown", "violated"]:
    # An injective continuous map of R^d keeps its orientation; per-row conditions make different maps of the rows.
    if sign is not None and not hasattr(f, "select") and bool((sign > 0).any()) and bool((sign < 0).any()):
        return "violated"
    from hnkit.lipschitz import certify_injective

    return "certified" if certify_injective(f).status == "certified" else "unknown"


def _check_options(
    method: str,
    form: str,
    probes: int,
    steps: int | None,
    tolerance: float,
    probe: str,
    lipschitz: float | None,
    chunk: int | None,
) -> None:
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: accepted are {', '.join(METHODS)}")
    if form not in FORMS:
        raise InputError(f"unknown form {form!r}: accepted are {', '.join(FORMS)}")
    if probe not in PROBES:
        raise InputError(f"unknown probe {probe!r}: accepted are {', '.join(PROBES)}")
    for name, count in (("probes", probes), ("steps", steps), ("chunk", chunk)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InputError(f"{name} {count!r} is not a positive whole number: give 1 or more")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance {tolerance!r} is not in (0, 1): give a relative error such as 1e-3")
    if lipschitz is not None and not 0 <= lipschitz < math.inf:
        raise InputError(f"lipschitz {lipschitz!r} is no Lipschitz constant: give a finite number, 0 or more")
