"""How close the L2 term is to the KL it stands for, measured on a network at any moment of its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from hnkit.internal.stats import mean_and_stderr, ratio_and_stderr
from hnkit.internal.values import finite
from hnkit.kl.divergence import Method, noise_kl
from hnkit.lipschitz.local import local_lipschitz
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
            bound on the Lipschitz constant.
        mean_shift_share: `|E f|^2 / E|f|^2` within prompts, unbiased in the numerator; no unit, nan while f = 0.
        injective: what is known of the injectivity of `x + f(x)`.
        num_jvp: Jacobian-vector products spent on `kl`.
        num_vjp: vector-Jacobian products spent on `kl`.
        gap: distance from the optimum, where the tilted law is known.
        gap_stderr: its standard error.
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
            local norm reaches 1.
        rel_error: the relative error at which a stochastic method stops.
        prompts: one per row; the mean shift is taken within rows of the same prompt. `None`: all rows together.
        problem: its tilted law is the target of the optimality gap.
        generator: of the probes.

    Raises:
        NonFiniteError: the map or one of its products is not finite; the message names the sample.
    """
    delta = _evaluate(f, x)
    dim = delta.shape[1]
    rows = torch.arange(len(x) if dim <= EXACT_UP_TO else min(len(x), _NORM_SAMPLES), device=x.device)
    # three digits are enough for quantiles, and a float32 network may not give many more
    norms = local_lipschitz(select_rows(f, rows), x[rows], tolerance=1e-3).double().cpu()
    if method == "auto":
        method = "exact" if dim <= EXACT_UP_TO else "arnoldi" if float(norms.max()) < 1 else "lanczos"
    moving = bool(delta.any())  # at f = 0 there is no relative error to aim at
    options: dict[str, Any] = {} if method == "exact" or not moving else {"rel_error": rel_error}
    estimate = noise_kl(f, x, method=cast(Method, method), generator=generator, **options)
    half_norms = 0.5 * delta.square().sum(1)
    l2, l2_stderr = mean_and_stderr(half_norms)
    error, error_stderr = mean_and_stderr(estimate.per_sample.to(half_norms) - half_norms)
    relative, relative_stderr = ratio_and_stderr(
        -(estimate.per_sample.to(half_norms) - half_norms), estimate.per_sample
    )
    quantiles = torch.quantile(norms, torch.tensor(_QUANTILES, dtype=norms.dtype)).tolist()
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
        local_norm=dict(zip(map(str, _QUANTILES), quantiles, strict=True)) | {"max": float(norms.max())},
        mean_shift_share=mean_shift_share(delta, prompts),
        injective=estimate.injective,
        num_jvp=estimate.num_jvp,
        num_vjp=estimate.num_vjp,
        gap=None if gap is None else gap.value,
        gap_stderr=None if gap is None else gap.stderr,
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
