"""From scored images to the tables: means with the error that prompts and seeds leave, and paired differences.

Prompts are the independent units: the images of one prompt share its difficulty, so a standard error is taken over
the means of prompts, not over images. A table's mean over categories weighs them equally, as GenEval does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hnkit.errors import InputError
from hnkit.internal.power import components
from hnkit.internal.stats import mean_and_stderr
from hnkit.scaled.compare.evaluation import Evaluation, Row

Figure = dict[str, float | None]


def estimate(rows: Sequence[Row], score: str, baseline: Sequence[Row] | None = None) -> Figure:
    """Mean of a score over prompts, and its standard error; with a baseline, of the paired difference.

    Returns:
        `{"value", "stderr"}`; the error of a single prompt is unknown (`None`).
    """
    by_prompt = _prompt_means(rows, score)
    if baseline is not None:
        other = _prompt_means(baseline, score)
        by_prompt = {prompt: value - other[prompt] for prompt, value in by_prompt.items()}
    value, stderr = mean_and_stderr(torch.tensor(list(by_prompt.values()), dtype=torch.float64))
    return {"value": value, "stderr": None if math.isnan(stderr) else stderr}


def category_mean(rows: Sequence[Row], score: str, baseline: Sequence[Row] | None = None) -> Figure:
    """The unweighted mean over categories of `estimate`, errors added in quadrature."""
    parts = by_category(rows, score, baseline).values()
    count = len(parts)
    value = sum(float(part["value"] or 0.0) for part in parts) / count
    errors = [part["stderr"] for part in parts]
    known = [error for error in errors if error is not None]
    stderr = math.sqrt(sum(error**2 for error in known)) / count if len(known) == count else None
    return {"value": value, "stderr": stderr}


def by_category(rows: Sequence[Row], score: str, baseline: Sequence[Row] | None = None) -> dict[str, Figure]:
    """`estimate` in each category, in order of first appearance."""
    categories = list(dict.fromkeys(row.category for row in rows))
    result = {}
    for category in categories:
        inside = [row for row in rows if row.category == category]
        against = None if baseline is None else [row for row in baseline if row.category == category]
        result[category] = estimate(inside, score, against)
    return result


def method_row(evaluation: Evaluation, base: Evaluation, parameters: int) -> dict[str, Any]:
    """One line of table 1: scores, gains over the base from the same noise, and what an image costs."""
    rows, scores = evaluation.rows, evaluation.rows[0].scores
    images, cost = len(rows), evaluation.cost
    entry: dict[str, Any] = {
        "method": evaluation.method,
        "steps": evaluation.steps,
        "images": images,
        "prompts": len({row.prompt for row in rows}),
        "trained_parameters": parameters,
        "seconds_per_image": evaluation.seconds,
        "generator_evaluations_per_image": cost.generator / images,
        "hypernetwork_evaluations_per_image": cost.hypernetwork / images,
        "gradients_per_image": cost.gradients / images,
        "reward_evaluations_per_image": cost.reward / images,
        "scores": {name: category_mean(rows, name) for name in scores},
        "gain": {name: category_mean(rows, name, base.rows) for name in scores},
    }
    if "judge" in scores:
        entry["categories"] = by_category(rows, "judge")
    return entry


def component_entries(rows: Sequence[Row], base: Sequence[Row]) -> dict[str, Any]:
    """Score -> the variance components of a method beside the base, as `hnkit.internal.power` plans with them.

    A score whose components are not known (one prompt, or a value that is not finite) is left out.
    """
    found = {}
    for score in rows[0].scores:
        one, other = _layout(rows, score), _layout(base, score)
        try:
            found[score] = components(one, other).to_json()
        except InputError:
            continue
    return found


def _layout(rows: Sequence[Row], score: str) -> torch.Tensor:
    """`(prompts, seeds)`, in the order of first appearance."""
    grouped: dict[str, list[float]] = {}
    for row in rows:
        grouped.setdefault(row.prompt, []).append(row.scores[score])
    return torch.tensor(list(grouped.values()), dtype=torch.float64)


def _prompt_means(rows: Sequence[Row], score: str) -> Mapping[str, float]:
    grouped: dict[str, list[float]] = {}
    for row in rows:
        grouped.setdefault(row.prompt, []).append(row.scores[score])
    return {prompt: sum(values) / len(values) for prompt, values in grouped.items()}
