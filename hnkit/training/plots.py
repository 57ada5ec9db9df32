"""The plots of a training run, in hnkit's look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hnkit.config import TrainConfig
from hnkit.figures import FIGURES
from hnkit.output.page import format_number
from hnkit.output.plots import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILION, Plot, new_figure, step_axis
from hnkit.tilt import TiltedProblem
from hnkit.training.validate import prompts_of
from hnkit.training.view import loss_term

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Records = Sequence[Mapping[str, Any]]


def training_plots(records: Records, problem: TiltedProblem | None, settings: TrainConfig) -> list[Plot]:
    """What the records of metrics.jsonl can show.

    Args:
        records: the records, in the order of the run.
        problem: the closed-form problem that was trained on, if there is one.
        settings: the settings of the run, which say what its loss was made of.
    """
    steps = [record for record in records if "loss" in record]
    measured = [record for record in records if record.get("measurement")]
    validated = [record for record in records if "validation" in record]
    term = loss_term(settings)
    caption = f"Loss, {term[1]} and reward" if term else "Loss and reward"
    plots = [Plot("training", f"{caption} of every step, and their running means.", partial(_curves, steps, term))]
    if len(measured) > 1:
        caption = "The KL and the L2 term that stands for it, along training; bars are standard errors."
        plots.append(Plot("kl-along-training", caption, partial(_kl, measured)))
    if len(measured) > 1 and problem is not None and measured[-1]["measurement"]["gap"] is not None:
        caption = "Distance of the learned noise law from the tilted law, beside the optimum of each loss."
        plots.append(Plot("gap-along-training", caption, partial(_gap, measured, problem)))
    if len(validated) > 1:
        prompts = prompts_of(validated[-1]["validation"])
        caption = f"Gain of steered over base outputs on {prompts}; held-out scores are dashed, the judge dotted."
        plots.append(Plot("gain-along-training", caption, partial(_gains, validated)))
    return plots


def _column(records: Records, *keys: str) -> Array:
    values = []
    for record in records:
        value: Any = record
        for key in keys:
            value = value[key]
        values.append(_number(value))
    return np.asarray(values)


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


def _running_mean(values: Array) -> Array:
    """Mean of the last 5 % of the run at every step, over the finite values."""
    width = max(1, len(values) // 20)
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    start = np.maximum(np.arange(1, len(values) + 1) - width, 0)
    end = np.arange(1, len(values) + 1)
    seen = count[end] - count[start]
    return np.where(seen > 0, (total[end] - total[start]) / np.maximum(seen, 1), np.nan)


def _curves(steps: Records, term: tuple[str, str] | None) -> Figure:
    looks = {"loss": ("Loss, nats" if term else "Loss", INK), "reward": ("Reward", GREEN)}
    if term:
        looks = {"loss": looks["loss"], term[0]: (f"{term[1]}, nats", BLUE), "reward": looks["reward"]}
    figure, axes = new_figure(11.0, 3.4, columns=len(looks))
    at = _column(steps, "step")
    for axis, (key, (title, colour)) in zip(axes, looks.items(), strict=True):
        # runs of earlier versions have every term under "kl"
        values = np.asarray([_number(record.get(key, record.get("kl"))) for record in steps])
        axis.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        axis.plot(at, _running_mean(values), color=colour)
        axis.set_title(title)
        step_axis(axis)
    return figure


def _kl(measured: Records) -> Figure:
    figure, (axes,) = new_figure()
    at = _column(measured, "step")
    for key, colour, marker in (("kl", INK, "o"), ("l2", BLUE, "s"), ("error", VERMILION, "^")):
        label = FIGURES[key].name
        values, errors = (_column(measured, "measurement", name) for name in (key, f"{key}_stderr"))
        axes.errorbar(
            at, values, yerr=np.nan_to_num(errors), label=label, color=colour, marker=marker, markersize=4, capsize=2
        )
    axes.axhline(0, color=GREY, linewidth=0.8)
    last = measured[-1]["measurement"]["relative_error"]
    title = (
        "KL and L2 term along training"
        if last is None
        else (f"The L2 term ends {100 * abs(last):.0f} % {'below' if last < 0 else 'above'} the KL")
    )
    axes.set(ylabel="nats", title=title)
    step_axis(axes)
    if axes.has_data():
        axes.legend(loc="best")
    return figure


def _gap(measured: Records, problem: TiltedProblem) -> Figure:
    figure, (axes,) = new_figure()
    at = _column(measured, "step")
    gap, stderr = (_column(measured, "measurement", name) for name in ("gap", "gap_stderr"))
    axes.errorbar(at, gap, yerr=np.nan_to_num(stderr), color=INK, marker="o", markersize=4, capsize=2, label="learned")
    references = (("l2_gap", "optimum of L2", ORANGE, "--"), ("second_order_gap", "of second order", SKY, "-."))
    for name, label, colour, line in references:
        if name in problem.unavailable or not hasattr(problem, name):  # no such optimum in closed form
            continue
        value = getattr(problem, name)()
        axes.axhline(value, color=colour, linestyle=line, label=f"{label}:  {value:.3g}")
    axes.axhline(0, color=GREEN, linestyle=":", label="of the exact KL:  0")
    axes.set(ylabel="nats from the tilted law", title=f"{gap[-1]:.3g} nats from the optimum")
    step_axis(axes)
    axes.set_yscale("symlog", linthresh=1e-2)
    if axes.has_data():
        axes.legend(loc="best")
    return figure


def _gains(validated: Records) -> Figure:
    figure, (axes,) = new_figure()
    at = _column(validated, "step")
    lines = {"trained": "-", "held out": "--", "judge": ":"}
    for name, score in validated[-1]["validation"]["scores"].items():
        gains, errors = (_column(validated, "validation", "scores", name, key) for key in ("gain", "gain_stderr"))
        if not np.isfinite(gains).any():
            continue
        scale = np.nanmax(np.abs(gains)) or 1.0
        called = name if name == score["role"] else f"{name} ({score['role']})"
        axes.errorbar(
            at, gains / scale, yerr=np.nan_to_num(errors) / scale, linestyle=lines[score["role"]], capsize=2,
            label=f"{called}, largest {format_number(scale, 3)}",
        )  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(ylabel="gain, share of its largest", title="Held-out prompts: steered minus base")
    step_axis(axes)
    if axes.has_data():
        axes.legend(loc="best")
    return figure
