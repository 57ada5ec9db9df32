"""The plots of a comparison, drawn from its document."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from hnkit.output.plots import BLUE, GREEN, GREY, INK, ORANGE, VERMILION, Plot, new_figure
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
    or_nan,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plots(document: Document, images: Mapping[str, Tensor]) -> list[Plot]:
    """The plots that the document has figures for."""
    plots = [
        Plot(
            "grid",
            "Columns share prompt and noise; the rule under an image is the judge's verdict, blue if right.",
            partial(_grid, document["grid"], images),
        ),
        Plot(
            "gain-against-cost",
            "Gain over the base against the time an image takes, error bars of one standard error.",
            partial(_gain_against_cost, document),
        ),
    ]
    if (document.get("frontier") or {}).get("frontier"):
        caption = "The most reward that any law can gain for its nats, best-of-N, and what each method gained."
        plots.insert(0, Plot("frontier", caption, partial(_frontier, document["frontier"])))
    if any(len(series) > 1 for series in document["training"].values()):
        caption = "Along training, on held-out prompts: the trained reward against a score nothing is trained on."
        plots.append(Plot("reward-against-quality", caption, partial(_quality, document)))
    if document["losses"]:
        caption = "The KL (solid) and the L2 term that stands for it (dashed) along training, for each loss."
        plots.append(Plot("kl-along-training", caption, partial(_losses, document)))
    return plots


def _grid(grid: Row, images: Mapping[str, Tensor]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MplFigure

    methods, prompts = grid["methods"], grid["prompts"]
    figure = MplFigure(figsize=(1.15 * len(prompts) + 1.4, 1.15 * len(methods) + 0.6), layout="compressed")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(methods), len(prompts), squeeze=False)
    for i, name in enumerate(methods):
        for j, prompt in enumerate(prompts):
            axis = axes[i][j]
            axis.imshow(images[name][j].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for side in axis.spines.values():
                side.set_visible(False)
            if i == 0:
                axis.set_title(_wrapped(prompt), fontsize=8, fontweight="normal", loc="center", pad=6)
            if j == 0:
                axis.set_ylabel(
                    NAMES.get(name, name).replace(" optimisation", "\noptimisation"),
                    fontsize=9,
                    rotation=0,
                    ha="right",
                    va="center",
                )
            if name in grid["correct"]:
                right = bool(grid["correct"][name][j])
                axis.axhline(images[name].shape[-2] - 0.7, color=BLUE if right else VERMILION, linewidth=3)
    return figure


def _wrapped(prompt: str, width: int = 15) -> str:
    lines = [""]
    for word in prompt.split():
        if lines[-1] and len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:4]) + ("…" if len(lines) > 4 else "")


def _gain_against_cost(document: Document) -> Figure:
    from matplotlib.patheffects import withStroke

    score = main_score(document)
    figure, (axes,) = new_figure()
    for row in document["table_1"]:
        figures = row["scores"][score]
        axes.errorbar(
            row["seconds_per_image"],
            figures["value"],
            yerr=figures["stderr"] or 0.0,
            marker="o",
            markersize=7,
            capsize=3,
            color=COLOURS.get(row["method"], INK),
            linestyle="none",
        )
        axes.annotate(
            NAMES.get(row["method"], row["method"]),
            (row["seconds_per_image"], figures["value"]),
            xytext=(8, 6),
            textcoords="offset points",
            fontsize=9,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )
    axes.set(
        xscale="log", xlabel="seconds per image", ylabel=label_of(score), title="What an image costs, and what it gets"
    )
    axes.margins(x=0.18)
    axes.set_xlim(right=2.5 * axes.get_xlim()[1])  # labels stand to the right of their points
    return figure


def _quality(document: Document) -> Figure:
    series = document["training"]
    names = [name for name, points in series.items() if len(points) > 1]
    scores = [key for key in series[names[0]][0]["scores"] if key != "reward"] or ["reward"]
    figure, axes = new_figure(4.0 * len(scores) + 1.0, 4.0, columns=len(scores))
    for axis, score in zip(axes, scores, strict=True):
        for name in names:
            points = [point["scores"] for point in series[name]]
            rewards = np.array([points[0]["reward"]["base"], *(point["reward"]["steered"] for point in points)])
            values = np.array([points[0][score]["base"], *(point[score]["steered"] for point in points)])
            axis.plot(rewards, values, marker="o", markersize=4, color=COLOURS[name], label=NAMES[name])
            axis.plot(rewards[:1], values[:1], marker="s", markersize=8, color=GREY, linestyle="none")
        axis.set(
            xlabel="trained reward", ylabel=score, title=f"{score} ({series[names[0]][0]['scores'][score]['role']})"
        )
    axes[0].legend(loc="best")
    return figure


def _frontier(found: Row) -> Figure:
    drawn = {name: network_label(name) for name in found["methods"] if not name.startswith("best-of-")}
    return draw_frontier(found, drawn, "Reward per nat")


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
