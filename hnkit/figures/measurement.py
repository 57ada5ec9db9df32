"""How close the L2 term is to the KL it stands for, measured on a network at any moment of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hnkit.errors import ExpansiveMapError, InputError
from hnkit.figures.measured_map import BLOCKS, MeasuredMap
from hnkit.figures.table import FIGURES, QUANTILES, mean_shift_share
from hnkit.injection import InjectedBound, NoiseInjection
from hnkit.internal.kept import Keep, not_kept
from hnkit.internal.stats import Estimate
from hnkit.internal.values import finite
from hnkit.internal.workers import ALONE, Workers
from hnkit.kl.estimate import KLEstimate
from hnkit.kl.moments import Moments
from hnkit.kl.verdict import L2Verdict, VerdictRows
from hnkit.lipschitz.local import RESOLVED
from hnkit.maps import NoiseMap
from hnkit.tilt import TiltedProblem, optimality_gap

EXACT_UP_TO = 512
"""Largest noise dimension at which `method="auto"` takes the exact method: d products per sample, a d x d log-det."""
_NORM_SAMPLES = 32
"""Samples whose local norm is taken above that dimension: each costs tens of products in both directions."""


BLOCK_RECORDS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (KLEstimate, Moments, VerdictRows)}
"""What is kept of a block is made of."""


@dataclass(frozen=True)
class Sharing:
    """How the samples of a measurement are shared out; its figures are the same for any number of processes.

    Attributes:
        seed: every random probe is a function of it and of the block it is for.
        workers: the processes.
        keep: where what was made of a block is kept, and taken from by the run that goes on; any process may ask.
        blocks: how many blocks there are.
    """

    seed: int = 0
    workers: Workers = ALONE
    keep: Keep = not_kept
    blocks: int = BLOCKS


@dataclass(frozen=True)
class Measurement:
    """The KL of a map, its L2 term and what lies between them; nats unless said otherwise.

    Attributes:
        samples: how many noises were used.
        method: the method of `noise_kl`.
        kl: the KL integrand's mean: the KL itself if `injective` is `"certified"`, else a lower bound of it.
        l2: mean of `|f|^2/2`.
        error: mean of `E(J) = tr J - log|det(I + J)|`.
        relative_error: `(l2 - kl) / kl`, no unit, to first order; NaN while `kl` is 0.
        symmetry_index: `E tr(J^2) / E|J|_F^2`, in [-1, 1].
        local_norm: quantiles of `|J(x)|_2`: keys `"0.1"`, `"0.5"`, `"0.9"`, `"max"` of the samples. Estimates, no
            bound on the Lipschitz constant; nan where they are not known.
        mean_shift_share: `|E f|^2 / E|f|^2` within prompts, unbiased in the numerator; no unit, nan while f = 0.
        injective: what is known of the injectivity of `x + f(x)`.
        folds: samples at which it reverses orientation, and samples looked at; `None` where the method cannot tell.
        num_jvp: Jacobian-vector products spent on `kl`.
        num_vjp: vector-Jacobian products spent on `kl`.
        gap: distance from the optimum, where the tilted law is known.
        local_norm_note: how coarsely the local norms are resolved, or why there are none; empty where they converged.
        injected: the bound of the KL of what is deployed, where noise is injected; all else is then of `x + f(x)`,
            which is not deployed.
        l2_verdict: whether the L2 term is good enough, from the first samples; `None` where noise is injected, whose L2
            term bounds the KL, or where that cannot be told.
        per_sample: the integrand of `kl` at each noise, `(samples,)` on the CPU; it stays out of the record.
    """

    samples: int
    method: str
    kl: Estimate
    l2: Estimate
    error: Estimate
    relative_error: Estimate
    symmetry_index: float
    local_norm: dict[str, float]
    mean_shift_share: float
    injective: str
    num_jvp: int
    num_vjp: int
    folds: tuple[int, int] | None = None
    gap: Estimate | None = None
    local_norm_note: str = ""
    injected: InjectedBound | None = None
    l2_verdict: L2Verdict | None = None
    per_sample: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON document, `None` for what is not known; an estimate is a value and its `_stderr`."""
        document: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name == "per_sample" or (name in ("injected", "l2_verdict") and value is None):
                continue
            document[name] = value.value if isinstance(value, Estimate) else value
            if isinstance(value, InjectedBound):
                document[name] = value.to_json()
            if isinstance(value, L2Verdict):
                document[name] = value.to_json()
            if name == "folds" and value is not None:
                document[name] = {"negative": value[0], "samples": value[1]}
            if isinstance(value, Estimate) or name == "gap":
                document[f"{name}_stderr"] = None if value is None else value.stderr
            if name == "kl":
                document["bias_bound"] = self.kl.bias_bound
        record: dict[str, Any] = finite(document)
        return record


def measure(
    f: NoiseMap,
    x: Tensor,
    *,
    method: str = "auto",
    rel_error: float = 0.05,
    prompts: Sequence[str] | None = None,
    problem: TiltedProblem | None = None,
    generator: torch.Generator | None = None,
    injection: NoiseInjection | None = None,
    sharing: Sharing | None = None,
) -> Measurement:
    """Measure the KL of a map both ways, and how they differ.

    Args:
        f: batch-first map.
        x: `(n, *shape)` samples of `N(0, I)`, n >= 2.
        method: the method of `noise_kl`, or `"auto"`: exact up to d = 512, above it Arnoldi, or Golub-Kahan ("lanczos")
            where a local norm reaches 1 (also one met on the way, beyond the rows whose norms are taken).
        rel_error: the relative error at which a stochastic method stops.
        prompts: one per row; the mean shift is taken within rows of the same prompt. `None`: all rows together.
        problem: its tilted law is the target of the optimality gap.
        generator: the generator of the probes.
        injection: how the map is deployed; with injected noise there is a bound of the KL, and no gap.
        sharing: how the samples are shared out over processes, instead of `generator`; `None`: they are taken together.

    Raises:
        ExpansiveMapError: the method that was asked for needs local norms below 1.
        NonFiniteError: the map or one of its products is not finite; the message names the sample.
    """
    measured = MeasuredMap("network", f, x, prompts=prompts, probes=generator, injection=injection)
    if sharing is not None:
        measured = replace(
            measured, probes=None, seed=sharing.seed, workers=sharing.workers, keep_block=sharing.keep,
            blocks=sharing.blocks,
        )  # fmt: skip
    measured.validate()
    small = measured.dim <= EXACT_UP_TO
    norms, note = _local_norms(measured, len(x) if small else min(len(x), _NORM_SAMPLES))
    automatic = method == "auto"
    if automatic:  # an unknown norm counts as one below 1 until Arnoldi finds otherwise
        expansive = norms is not None and float(norms.max()) >= 1
        method = "exact" if small else "lanczos" if expansive else "arnoldi"
    measured.method = method
    if method != "exact" and bool(measured.value.any()):  # at f = 0 there is no relative error to aim at
        measured.options = {"rel_error": rel_error}
    try:
        estimate = measured.estimate
    except ExpansiveMapError:  # at a row whose local norm was not taken
        if not automatic:
            raise
        measured.method = "lanczos"
        estimate = measured.estimate
    read = {key: FIGURES[key].read(measured) for key in ("kl", "l2", "error", "relative_error")}
    estimates = {key: value for key, value in read.items() if isinstance(value, Estimate)}
    gap = None
    if problem is not None and injection is None:
        found = optimality_gap(problem, f, x.double(), method="exact")
        gap = Estimate(found.value, found.stderr)
    return Measurement(
        samples=len(x),
        method=measured.method,
        symmetry_index=estimate.symmetry_index,
        local_norm=_quantiles(norms),
        local_norm_note=note,
        mean_shift_share=mean_shift_share(measured.value.double().flatten(1).cpu(), prompts),
        injective=estimate.injective,
        folds=None if estimate.folds is None else (estimate.folds.negative, estimate.folds.samples),
        num_jvp=estimate.num_jvp,
        num_vjp=estimate.num_vjp,
        gap=gap,
        injected=None if injection is None else measured.injected,
        l2_verdict=_verdict(measured),
        per_sample=estimate.per_sample.detach().double().cpu(),
        **estimates,
    )


def _verdict(measured: MeasuredMap) -> L2Verdict | None:
    """A statistic beside the KL never costs the KL."""
    if measured.injection is not None:
        return None
    try:
        return measured.l2_verdict
    except InputError:
        return None


def _local_norms(measured: MeasuredMap, count: int) -> tuple[Tensor | None, str]:
    """`|J(x)|_2` of the first rows in float64 on the CPU, and a remark: what they lack, or why there are none.

    A statistic beside the KL never costs the KL.
    """
    try:
        value, residual, products, goal = measured.coarse_norms(count)
    except InputError as reason:
        return None, f"no local norms: {reason}"
    worst = float(residual.max())
    if worst <= goal:
        return value.cpu(), ""
    if worst <= RESOLVED:
        return value.cpu(), f"local norms to a relative {worst:.1g}: the products of the network resolve no more"
    return None, f"local norms not converged: relative residual {worst:.1g} after {products} products"


def _quantiles(norms: Tensor | None) -> dict[str, float]:
    keys, levels = [*QUANTILES, "max"], [*map(float, QUANTILES), 1.0]
    if norms is None:
        return dict.fromkeys(keys, math.nan)
    return dict(zip(keys, torch.quantile(norms, torch.tensor(levels, dtype=norms.dtype)).tolist(), strict=True))
