"""The one table of the figures of a map: name, unit, what it means, and how it is read from the measured map.

Reports, headlines, plots, prompts of a trained network, model cards and the record of training read from here. A new
figure is one function with the decorator `figure`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hnkit.bounds import BOUNDS, frobenius_bound, local_theorem7_bound, theorem7_bound
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.internal.stats import Estimate, ratio_and_stderr

Side = Literal["upper", "lower", ""]
Reading = Callable[[MeasuredMap], "Estimate | float"]


@dataclass(frozen=True)
class Figure:
    """One figure of a map.

    Attributes:
        key: its short name in code and in JSON records.
        name: what reports call it.
        unit: "nats", "%" (of a value that is a ratio) or nothing.
        note: what it is, in a few words.
        read: the value, an `Estimate` where it has a Monte Carlo error; raises `NotApplicable` where a map has none.
        side: "upper" or "lower" where it is a bound from that side, which print rounds that way; nothing elsewhere.
        headline: its heading where several maps are compared at a glance; empty: it has no column there and is kept in
            the record alone; `None`: reports on several maps leave it out.
    """

    key: str
    name: str
    unit: str
    note: str
    read: Callable[[Any], Estimate | float]
    headline: str | None = None
    side: Side = ""


FIGURES: dict[str, Figure] = {}
"""Every figure by its key, in the order of the report."""


def figure(
    key: str, name: str, note: str = "", *, unit: str = "nats", headline: str | None = None, side: Side = ""
) -> Callable[[Reading], Reading]:
    """Decorator: list the function that reads a figure."""

    def register(read: Reading) -> Reading:
        if key in FIGURES:
            raise ValueError(f"two figures have the key {key!r}")
        FIGURES[key] = Figure(key, name, unit, note, read, headline, side)
        return read

    return register


# --- the KL and its parts ---------------------------------------------------------------------------------------


@figure("kl", "KL (Stein form)", "E[|f|²/2 + E(J)]: the KL if T is injective, else a lower bound of it", headline="KL")
def kl(measured: MeasuredMap) -> Estimate:
    """The mean integrand of `noise_kl`, with its bias bound where one is known."""
    return Estimate(measured.stein.value, measured.stein.stderr, measured.stein.bias_bound)


@figure("kl_change_of_variables", "KL (change of variables)", "E[x·f + |f|²/2 - log|det(I+J)|], eq. 53 of the paper")
def kl_change_of_variables(measured: MeasuredMap) -> Estimate:
    """The other form, on the samples of the first."""
    return Estimate.of(measured.change_from_stein)


@figure("l2", "L2 term", "E|f|²/2", headline="L2 term")
def l2(measured: MeasuredMap) -> Estimate:
    """What the L2 loss takes for the KL."""
    return Estimate.of(measured.half_square)


@figure("error", "E(J)", "E[tr J - log|det(I+J)|], what the L2 term leaves out")
def error(measured: MeasuredMap) -> Estimate:
    """KL less L2 term."""
    return Estimate.of(measured.error)


@figure("relative_error", "relative error of L2", "(L2 - KL) / KL", unit="%", headline="L2 error, %")
def relative_error(measured: MeasuredMap) -> Estimate:
    """The ratio; its standard error is of first order. NaN while the KL is 0."""
    return Estimate(*ratio_and_stderr(-measured.error, measured.stein.per_sample))


@figure(
    "symmetry_index",
    "symmetry index",
    "E tr(J²) / E|J|_F², in [-1, 1]: 1 for gradient fields, 0: L2 is right",
    unit="",
    headline="",
)
def symmetry_index(measured: MeasuredMap) -> float:
    """Decides whether the L2 term is accurate."""
    return measured.stein.symmetry_index


@figure("stein_residual", "Stein residual z", "E[x·f - tr J] over its standard error", unit="")
def stein_residual(measured: MeasuredMap) -> float:
    """NaN where all samples agree."""
    residual = Estimate.of(measured.alignment - measured.traces)
    return residual.value / residual.stderr if residual.stderr else math.nan


@figure(
    "mean_shift_share",
    "mean shift's share",
    "|E f|² / E|f|² within prompts: a constant shift costs no diversity",
    unit="",
)
def mean_shift(measured: MeasuredMap) -> float:
    """Of the L2 term."""
    return mean_shift_share(measured.value.double().flatten(1).cpu(), measured.prompts)


# --- with injected noise ----------------------------------------------------------------------------------------


@figure(
    "injected_bound", "KL of the deployed law, at most", "a² E|f|² / 2(1-a²), proved for any f; its mean is estimated"
)
def injected_bound(measured: MeasuredMap) -> Estimate:
    """The law of `a (x + f(x)) + sqrt(1 - a^2) eps`, without a Jacobian."""
    return measured.injected.nats


@figure(
    "injected_certified",
    "the same, certified at 95 %",
    "f is clipped, or its Lipschitz constant certified",
    side="upper",
)
def injected_certified(measured: MeasuredMap) -> float:
    """One-sided, over the samples."""
    if measured.injected.certified is None:
        raise NotApplicable(measured.injected.how)
    return measured.injected.certified


@figure("injected_ceiling", "the same, for certain", "a² R² / 2(1-a²), |f| being clipped at R", side="upper")
def injected_ceiling(measured: MeasuredMap) -> float:
    """Whatever was trained."""
    if measured.injected.ceiling is None:
        raise NotApplicable("f is not clipped")
    return measured.injected.ceiling


# --- norms ------------------------------------------------------------------------------------------------------

QUANTILES = {"0.1": "10 %", "0.5": "median", "0.9": "90 %"}
"""Quantiles of the local norms that are reported: level and name."""


def _norm_quantile(level: str) -> Reading:
    return lambda measured: float(measured.norms.double().quantile(float(level)))


for _level, _name in QUANTILES.items():
    figure(f"local_norm_{_level}", f"local norm, {_name}", "|J(x)|₂", unit="")(_norm_quantile(_level))


@figure("local_norm_max", "local norm, largest", "sampled, no bound of L", unit="")
def local_norm_max(measured: MeasuredMap) -> float:
    """Of the samples."""
    return float(measured.norms.max())


@figure("lipschitz_lower", "Lipschitz, ascended", "a lower bound of L", unit="", side="lower")
def lipschitz_lower(measured: MeasuredMap) -> float:
    """After gradient ascent on x."""
    value: float = measured.lower.value
    return value


@figure("lipschitz_certified", "Lipschitz, certified", "an upper bound of L", unit="", side="upper")
def lipschitz_certified(measured: MeasuredMap) -> float:
    """From the weights."""
    return _certified(measured)


# --- bounds on E|E(J)|; one that rests on an estimated constant is called an estimate ------------------------------


@figure("theorem7_bound", "Theorem 7 bound", "d h(L), certified L", headline="Theorem 7", side="upper")
def theorem7(measured: MeasuredMap) -> float:
    """With the certified constant."""
    return _theorem7(measured, _certified(measured))


@figure("theorem7_estimate", "Theorem 7 estimate", "d h(L); L is estimated, not certified")
def theorem7_estimate(measured: MeasuredMap) -> float:
    """With the ascended estimate of a constant that is not certified."""
    if measured.certified_constant is not None:
        raise NotApplicable("the constant is certified")
    return _theorem7(measured, measured.lower.value)


@figure("local_theorem7_bound", "local Theorem 7 bound", "E[d h(|J(x)|₂)]")
def local_theorem7(measured: MeasuredMap) -> Estimate:
    """With the norm at each sample."""
    return Estimate.of(local_theorem7_bound(measured.dim, _norms_below_one(measured)))


@figure("frobenius_estimate", "Frobenius estimate", "|J|_F² from probes")
def frobenius_estimate(measured: MeasuredMap) -> Estimate:
    """In so many dimensions that there are no dense Jacobians."""
    if measured.rows_or_none is not None:
        raise NotApplicable("dense Jacobians give the bound itself")
    return Estimate.of(frobenius_bound(1.0, _norms_below_one(measured)) * measured.probed_frobenius)


def _bound_mean(name: str) -> Reading:
    return lambda measured: Estimate.of(_where_it_holds(measured, name))


for _key, _bound in BOUNDS.items():
    if _bound.figure:
        figure(_bound.figure, _bound.label, _bound.note)(_bound_mean(_key))


@figure("second_order", "second-order term", "E tr(J²)/2")
def second_order(measured: MeasuredMap) -> Estimate:
    """The leading part of E(J)."""
    return Estimate.of(measured.rows.trace_square / 2)


@figure("field_of_values_lower", "field of values, lower", "E(J) is above it")
def field_of_values_lower(measured: MeasuredMap) -> Estimate:
    """From the symmetric and skew parts of dense Jacobians."""
    upper, slack = (_where_it_holds(measured, f"field of values, {side}") for side in ("upper", "lower"))
    return Estimate.of(upper - slack)


@figure("field_of_values_upper", "field of values, upper", "E(J) is below it")
def field_of_values_upper(measured: MeasuredMap) -> Estimate:
    """From the symmetric parts of dense Jacobians."""
    return Estimate.of(_where_it_holds(measured, "field of values, upper"))


# --- hypotheses -------------------------------------------------------------------------------------------------


def _certified(measured: MeasuredMap) -> float:
    constant = measured.certified_constant
    if constant is None:
        raise NotApplicable("no certified constant")
    return constant


def _theorem7(measured: MeasuredMap, constant: float) -> float:
    if constant >= 1:
        raise NotApplicable(f"L = {constant:.4g} is not below 1")
    return float(theorem7_bound(measured.dim, constant))


def _norms_below_one(measured: MeasuredMap) -> Tensor:
    norms: Tensor = measured.norms
    if float(norms.max()) >= 1:
        raise NotApplicable("a local norm is not below 1")
    return norms


def _where_it_holds(measured: MeasuredMap, name: str) -> Tensor:
    """A bound of `BOUNDS` at every row, where its hypothesis holds at every row."""
    if BOUNDS[name].hypothesis == "norm" and bool((measured.rows.norm >= 1).any()):
        raise NotApplicable("a local norm is not below 1")
    if BOUNDS[name].hypothesis == "cone" and bool((measured.rows.least_symmetric <= -1).any()):
        raise NotApplicable("λ_min(S) is not above -1 at every sample")
    return measured.rows.right[name]


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
