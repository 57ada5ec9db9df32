"""How close the L2 term is to the KL it stands for, measured on a network at any moment of its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hnkit.errors import ExpansiveMapError, InputError
from hnkit.internal.stats import mean_and_stderr, ratio_and_stderr
from hnkit.internal.values import finite
from hnkit.kl.divergence import Method, noise_kl
from hnkit.lipschitz.local import RESOLVED, local_norms
from hnkit.maps import NoiseMap, select_rows
from hnkit.tilt import TiltedProblem, optimality_gap

EXACT_UP_TO = 512
"""Largest noise dimension at which `method="auto"` takes the exact method: d products per sample, a d x d log-det."""
_QUANTILES = (0.1, 0.5, 0.9)
_ROWS_AT_ONCE = 64
_NORM_SAMPLES = 32
"""Samples whose local norm is taken above that dimension: each costs tens of products in both directions."""


@dataclass(frozen=True)
class Measurement:
    """The KL of a map, its L2 term and what lies between them; nats unless said otherwise.

    Attributes:
        samples: how many noises were used.
        method: of `noise_kl`.
        kl: the KL integrand's mean: the KL itself if `injective` is `"certified"`, else a lower bound of it.
        kl_stderr: its standard error.
        bias_bound: bound on the bias of `kl`, if one is known.
        l2: mean of `|f|^2/2`.
        l2_stderr: its standard error.
        error: mean of `E(J) = tr J - log|det(I + J)|`.
        error_stderr: its standard error.
        relative_error: `(l2 - kl) / kl`, no unit; nan while `kl` is 0.
        relative_error_stderr: its standard error (ratio of means, to first order).
        symmetry_index: `E tr(J^2) / E|J|_F^2`, in [-1, 1].
        local_norm: quantiles of `|J(x)|_2`: keys `"0.1"`, `"0.5"`, `"0.9"`, `"max"` of the samples. Estimates, no
            bound on the Lipschitz constant; nan where they are not known.
        mean_shift_share: `|E f|^2 / E|f|^2` within prompts, unbiased in the numerator; no unit, nan while f = 0.
        injective: what is known of the injectivity of `x + f(x)`.
        num_jvp: Jacobian-vector products spent on `kl`.
        num_vjp: vector-Jacobian products spent on `kl`.
        gap: distance from the optimum, where the tilted law is known.
        gap_stderr: its standard error.
        local_norm_note: how coarsely the local norms are resolved, or why there are none; empty where they converged.
    """

    samples: int
    method: str
    kl: float
    kl_stderr: float
    bias_bound: float | None
    l2: float
    l2_stderr: float
    error: float
    error_stderr: float
    relative_error: float
    relative_error_stderr: float
    symmetry_index: float
    local_norm: dict[str, float]
    mean_shift_share: float
    injective: str
    num_jvp: int
    num_vjp: int
    gap: float | None = None
    gap_stderr: float | None = None
    local_norm_note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON document, `None` for what is not known."""
        document: dict[str, Any] = finite(asdict(self))
        return document


def measure(
    f: NoiseMap,
    x: Tensor,
    *,
    method: str = "auto",
    rel_error: float = 0.05,
    prompts: Sequence[str] | None = None,
    problem: TiltedProblem | None = None,
    generator: torch.Generator | None = None,
) -> Measurement:
    """Measure the KL of a map both ways, and how they differ.

    Args:
        f: batch-first map.
        x: `(n, *shape)` samples of `N(0, I)`, n >= 2.
        method: of `noise_kl`, or `"auto"`: exact up to d = 512, above it Arnoldi, or Golub-Kahan ("lanczos") where a
            local norm reaches 1 (also one met on the way, beyond the rows whose norms are taken).
        rel_error: the relative error at which a stochastic method stops.
        prompts: one per row; the mean shift is taken within rows of the same prompt. `None`: all rows together.
        problem: its tilted law is the target of the optimality gap.
        generator: of the probes.

    Raises:
        NonFiniteError: the map or one of its products is not finite; the message names the sample.
    """
    delta = _evaluate(f, x)
    dim = delta.shape[1]
    norms, note = _local_norms(f, x[: len(x) if dim <= EXACT_UP_TO else _NORM_SAMPLES])
    automatic = method == "auto"
    if automatic:  # an unknown norm counts as one below 1 until Arnoldi finds otherwise
        expansive = norms is not None and float(norms.max()) >= 1
        method = "exact" if dim <= EXACT_UP_TO else "lanczos" if expansive else "arnoldi"
    moving = bool(delta.any())  # at f = 0 there is no relative error to aim at
    options: dict[str, Any] = {} if method == "exact" or not moving else {"rel_error": rel_error}
    try:
        estimate = noise_kl(f, x, method=cast(Method, method), generator=generator, **options)
    except ExpansiveMapError:  # at a row whose local norm was not taken
        if not automatic:
            raise
        method = "lanczos"
        estimate = noise_kl(f, x, method="lanczos", generator=generator, **options)
    half_norms = 0.5 * delta.square().sum(1)
    l2, l2_stderr = mean_and_stderr(half_norms)
    error, error_stderr = mean_and_stderr(estimate.per_sample.to(half_norms) - half_norms)
    relative, relative_stderr = ratio_and_stderr(
        -(estimate.per_sample.to(half_norms) - half_norms), estimate.per_sample
    )
    gap = optimality_gap(problem, f, x.double(), method="exact") if problem is not None else None
    return Measurement(
        samples=len(x),
        method=method,
        kl=estimate.value,
        kl_stderr=estimate.stderr,
        bias_bound=estimate.bias_bound,
        l2=l2,
        l2_stderr=l2_stderr,
        error=error,
        error_stderr=error_stderr,
        relative_error=relative,
        relative_error_stderr=relative_stderr,
        symmetry_index=estimate.symmetry_index,
        local_norm=_quantiles(norms),
        local_norm_note=note,
        mean_shift_share=mean_shift_share(delta, prompts),
        injective=estimate.injective,
        num_jvp=estimate.num_jvp,
        num_vjp=estimate.num_vjp,
        gap=None if gap is None else gap.value,
        gap_stderr=None if gap is None else gap.stderr,
    )


def _local_norms(f: NoiseMap, x: Tensor) -> tuple[Tensor | None, str]:
    """`|J(x)|_2` per row in float64 on the CPU, and a remark: what they lack, or why there are none.

    A statistic beside the KL never costs the KL. Three digits are enough for quantiles; a network in bfloat16 does not
    give as many.
    """
    try:
        found = local_norms(select_rows(f, torch.arange(len(x), device=x.device)), x, tolerance=1e-3)
    except InputError as reason:
        return None, f"no local norms: {reason}"
    worst = float(found.residual.max())
    if bool(found.converged.all()):
        return found.value.cpu(), ""
    if worst <= RESOLVED:
        return found.value.cpu(), f"local norms to a relative {worst:.1g}: the products of the network resolve no more"
    return None, f"local norms not converged: relative residual {worst:.1g} after {found.products} products"


def _quantiles(norms: Tensor | None) -> dict[str, float]:
    keys = [*map(str, _QUANTILES), "max"]
    if norms is None:
        return dict.fromkeys(keys, math.nan)
    return dict(
        zip(keys, torch.quantile(norms, torch.tensor([*_QUANTILES, 1.0], dtype=norms.dtype)).tolist(), strict=True)
    )


def mean_shift_share(delta: Tensor, prompts: Sequence[str] | None = None) -> float:
    """Share of `E|f|^2` that is a constant shift of the noise, `|E f|^2 / E|f|^2`, averaged over prompts.

    For the rows of one prompt `(|sum f_i|^2 - sum |f_i|^2) / (m (m - 1))` is unbiased for `|E f|^2`; prompts with a
    single row say nothing and are left out. The share can come out slightly below 0.

    Args:
        delta: `(n, d)` values of f.
        prompts: one per row; `None`: one prompt.

    Returns:
        The share, no unit; nan if f is 0 or no prompt has two rows.
    """
    groups: dict[str, list[int]] = {}
    for row in range(len(delta)):
        groups.setdefault("" if prompts is None else prompts[row], []).append(row)
    shift = total = 0.0
    for rows in groups.values():
        count = len(rows)
        if count < 2:
            continue
        part = delta[rows].double()
        squares = float(part.square().sum())
        shift += (float(part.sum(0).square().sum()) - squares) / (count - 1)
        total += squares
    return shift / total if total > 0 else math.nan


@torch.no_grad()
def _evaluate(f: NoiseMap, x: Tensor) -> Tensor:
    """`f(x)` as `(n, d)` in float64, some rows at a time."""
    parts = []
    for start in range(0, len(x), _ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + _ROWS_AT_ONCE, len(x)), device=x.device)
        parts.append(select_rows(f, rows)(x[rows]).flatten(1).double())
    return torch.cat(parts)
