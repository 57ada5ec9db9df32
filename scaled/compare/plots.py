"""The plots of a comparison, drawn from its document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hnkit.internal.values import or_nan
from hnkit.output.plots import BLUE, GREEN, GREY, INK, ORANGE, VERMILION, Array, Plot, image_grid, new_figure
from hnkit.output.plots import frontier as draw_frontier
from hnkit.scaled.compare.labels import (
    COLOURS,
    LOSS_LABELS,
    NAMES,
    Document,
    Row,
    label_of,
    main_score,
    network_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_plots(document: Document, images: Mapping[str, Tensor]) -> list[Plot]:
    """The plots that the document has figures for."""
    plots = [
        Plot(
            "grid",
            "Columns share prompt and noise; the rule under an image is the judge's verdict."
            if document["grid"]["correct"]
            else "Columns share prompt and noise.",
            partial(_grid, document["grid"], images),
        ),
        Plot(
            "gain-against-cost",
            f"Paired gain over the base in the {label_of(main_score(document))}, against the time an image takes; "
            "error bars of one standard error over prompts.",
            partial(_gain_against_cost, document),
        ),
    ]
    if (document.get("frontier") or {}).get("frontier"):
        caption = "The most reward that any law can gain for its nats, best-of-N, and what each method gained."
        plots.insert(0, Plot("frontier", caption, partial(_frontier, document["frontier"])))
    if any(len(series) > 1 for series in document["training"].values()):
        caption = (
            "Along training, from the square in the direction of the arrows, on held-out prompts: the trained reward "
            "against a score that nothing is trained on."
        )
        plots.append(Plot("reward-against-quality", caption, partial(_quality, document)))
    if document["losses"]:
        caption = "The KL (solid) and the L2 term that stands for it (dashed) along training, for each loss."
        plots.append(Plot("kl-along-training", caption, partial(_losses, document)))
    return plots


def _grid(grid: Row, images: Mapping[str, Tensor]) -> Figure:
    names = {name: NAMES.get(name, name).replace(" optimisation", "\noptimisation") for name in grid["methods"]}
    rows = {label: list(images[name].permute(0, 2, 3, 1).numpy()) for name, label in names.items()}
    return image_grid(rows, grid["prompts"], {names[name]: found for name, found in grid["correct"].items()})


def _gain_against_cost(document: Document) -> Figure:
    from matplotlib.ticker import LogLocator, NullFormatter

    score = main_score(document)
    figure, (axes,) = new_figure(8.4, 4.4)
    axes.axhline(0, color=GREY, linewidth=0.8)
    markers = iter("osD^vP*Xh<>")
    for row in sorted(document["table_1"], key=lambda row: row["seconds_per_image"]):
        gain = row["gain"][score]
        axes.errorbar(
            row["seconds_per_image"],
            gain["value"],
            yerr=gain["stderr"] or 0.0,
            marker=next(markers, "o"),
            markersize=7,
            capsize=3,
            color=COLOURS.get(row["method"], INK),
            linestyle="none",
            label=NAMES.get(row["method"], row["method"]),
        )
    axes.set(
        xscale="log",
        xlabel="seconds per image",
        ylabel=f"gain in the {label_of(score)}",
        title="What an image costs, and what it gains",
    )
    axes.margins(x=0.1)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right center")  # no label cuts a bar
    return figure


def _quality(document: Document) -> Figure:
    series = document["training"]
    names = [name for name, points in series.items() if len(points) > 1]
    scores = [key for key in series[names[0]][0]["scores"] if key != "reward"] or ["reward"]
    figure, axes = new_figure(4.0 * len(scores) + 1.0, 4.0, columns=len(scores))
    for axis, score in zip(axes, scores, strict=True):
        for name in names:
            points = [point["scores"] for point in series[name]]
            rewards = _along_training(points, "reward")
            values = _along_training(points, score)
            axis.plot(rewards, values, marker="o", markersize=4, color=COLOURS[name], label=NAMES[name])
            axis.plot(rewards[:1], values[:1], marker="s", markersize=8, color=GREY, linestyle="none")
            _along(axis, rewards, values, series[name][-1]["step"], COLOURS[name])
        role = series[names[0]][0]["scores"][score]["role"]
        axis.set(xlabel="trained reward", ylabel=score, title=score if role == score else f"{score} ({role})")
        axis.margins(0.12)
    axes[0].legend(loc="best")
    return figure


def _along_training(points: Sequence[Mapping[str, Any]], score: str) -> Array:
    """A score of the base, and then of every validation; NaN where it was not finite."""
    found = [points[0][score]["base"], *(point[score]["steered"] for point in points)]
    return np.array([or_nan(value) for value in found])


def _along(axis: Axes, x: Array, y: Array, steps: int, colour: str) -> None:
    """The direction of time along a curve: arrows between its points, and where it begins and ends."""
    for before, after in zip(zip(x, y, strict=True), zip(x[1:], y[1:], strict=True), strict=False):
        middle = (before[0] + after[0]) / 2, (before[1] + after[1]) / 2
        if not np.isfinite(middle).all():
            continue
        axis.annotate("", middle, before, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0})
    for text, place in (("step 0", 0), (f"step {steps}", -1)):
        if not (np.isfinite(x[place]) and np.isfinite(y[place])):
            continue
        axis.annotate(text, (x[place], y[place]), xytext=(0, 9), textcoords="offset points", fontsize=8, ha="center")


def _frontier(found: Row) -> Figure:
    drawn = {name: network_label(name) for name in found["methods"] if not name.startswith("best-of-")}
    return draw_frontier(found, drawn, "Reward per nat", COLOURS)


def _losses(document: Document) -> Figure:
    figure, (axes,) = new_figure(8.0, 4.4)
    colours = {"kl-l2": BLUE, "kl-second-order": ORANGE, "kl-arnoldi": GREEN, "kl-exact": VERMILION}
    for row in document["losses"]:
        points = row["along_training"]
        at = [point["step"] for point in points]
        label = LOSS_LABELS[row["method"].removeprefix("kl-")]
        kl = [point["kl"] for point in points]
        errors = [or_nan(point["kl_stderr"]) for point in points]
        axes.errorbar(
            at,
            kl,
            yerr=np.nan_to_num(errors),
            color=colours[row["method"]],
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
        )
        axes.plot(at, [point["l2"] for point in points], color=colours[row["method"]], linestyle="--", linewidth=1.4)
    axes.set(xlabel="step", ylabel="nats", title="KL (solid) and L2 term (dashed) for each loss")
    axes.legend(title="trained with", loc="best")
    return figure
