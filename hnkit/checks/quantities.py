"""The figures that a report shows beside its checks, each with its error bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hnkit.checks.check import Check, reported
from hnkit.checks.measured_problem import MeasuredProblem
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.figures.table import FIGURES, Figure, Side, mean_shift_share
from hnkit.internal.stats import Estimate, ratio_and_stderr, rounded_down, rounded_up
from hnkit.output.page import format_estimate

_PROMPTS_SHOWN = 12


@dataclass(frozen=True)
class Quantity:
    """A figure that is reported, not judged: value, standard error and bias bound where they are known."""

    name: str
    value: float
    group: str
    stderr: float | None = None
    bias_bound: float | None = None
    unit: str = "nats"
    note: str = ""
    side: Side = ""

    @property
    def text(self) -> str:
        """`value +- stderr (+ bias bound)`; a bound is rounded to its own side."""
        if self.side and self.stderr is None and math.isfinite(self.value):
            return (rounded_up if self.side == "upper" else rounded_down)(self.value)
        return format_estimate(self.value, self.stderr, self.bias_bound)

    @classmethod
    def of(cls, figure: Figure, reading: Estimate | float, group: str) -> Quantity:
        """A reading of a figure; percentages are of ratios."""
        scale = 100 if figure.unit == "%" else 1
        if isinstance(reading, Estimate):
            value, stderr, bias = scale * reading.value, scale * reading.stderr, reading.bias_bound
            return cls(figure.name, value, group, stderr, bias, figure.unit, figure.note)
        return cls(figure.name, scale * reading, group, unit=figure.unit, note=figure.note, side=figure.side)


def map_quantities(measured: MeasuredMap, *, headlines: bool = False) -> tuple[list[Quantity], list[Check]]:
    """Every figure that applies to a map, and a failing check for each that cannot be read.

    Args:
        measured: the map.
        headlines: only the figures by which several maps are compared.
    """
    chosen = [figure for figure in FIGURES.values() if figure.headline is not None or not headlines]
    return _read(measured, chosen, measured.name)


PROBLEM_FIGURES = (
    Figure("log_z", "log Z*", "nats", "", lambda known: known.problem.log_z()),
    Figure("kl_optimal", "KL(p0* || p0)", "nats", "closed form or quadrature", lambda known: known.ask("kl_optimal")),
    Figure(
        "l2_gap", "gap of the L2 optimum", "nats", "KL(law of the proximal map || p0*)",
        lambda known: known.ask("l2_gap"), "L2 gap",
    ),
    Figure(
        "second_order_gap", "gap of the second-order optimum", "nats", "", lambda known: known.ask("second_order_gap")
    ),
)  # fmt: skip
"""The figures of a closed-form problem, in the order of the report."""


def problem_quantities(known: MeasuredProblem) -> tuple[list[Quantity], list[Check]]:
    """Every figure of a closed-form problem that it has."""
    return _read(known, PROBLEM_FIGURES, known.problem.name)


def _read(source: Any, figures: Sequence[Figure], group: str) -> tuple[list[Quantity], list[Check]]:
    found: list[Quantity] = []
    failed: list[Check] = []
    for figure in figures:
        made, checks = reported(f"figure: {figure.name}", group, _one(figure, source, group))
        found += made
        failed += checks
    return found, failed


def _one(figure: Figure, source: Any, group: str) -> Callable[[], list[Quantity]]:
    return lambda: [Quantity.of(figure, figure.read(source), group)]


def prompt_quantities(measured: MeasuredMap, prompts: Sequence[str], per_prompt: int) -> list[Quantity]:
    """The KL, the L2 term and its error for each of the first prompts, whose rows follow one another.

    Nothing where a prompt has one sample, which tells nothing of its own error.
    """
    figures: list[Quantity] = []
    if per_prompt < 2:
        return figures
    try:
        per_sample = measured.stein.per_sample
    except NotApplicable:
        return figures
    for index, prompt in enumerate(prompts[:_PROMPTS_SHOWN]):
        rows = slice(index * per_prompt, (index + 1) * per_prompt)
        name = f"{measured.name}: {prompt}"
        integrand, half = per_sample[rows], measured.half_square[rows]
        if len(integrand) < per_prompt:  # a budget has stopped the estimate before this prompt
            break
        readings: dict[str, Estimate | float] = {
            "kl": Estimate.of(integrand),
            "l2": Estimate.of(half),
            "relative_error": Estimate(*ratio_and_stderr(half - integrand, integrand)),
            "mean_shift_share": mean_shift_share(measured.value[rows].double().flatten(1).cpu()),
        }
        figures += [Quantity.of(FIGURES[key], reading, name) for key, reading in readings.items()]
    return figures
