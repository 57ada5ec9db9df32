"""The report of a comparison: HTML page, CSV tables and plots, all drawn from report.json's document."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from hnkit.internal.files import atomic_write
from hnkit.output.page import Cell, Picture, Section, Table, Text, format_estimate, format_number, write_html
from hnkit.output.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, SKY, VERMILION, Plot, new_figure
from hnkit.output.plots import frontier as draw_frontier

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
Row = Mapping[str, Any]
_COLOURS = {
    "base": GREY,
    "hypernoise": BLUE,
    "direct": VERMILION,
    "best-of-2": SKY,
    "best-of-4": INK,
    "best-of-n": GREEN,
    "reno": ORANGE,
    "prompt-optimisation": PURPLE,
}
_NAMES = {
    "base": "base",
    "hypernoise": "+ HyperNoise",
    "direct": "direct LoRA",
    "best-of-2": "+ best-of-2",
    "best-of-4": "+ best-of-4",
    "best-of-n": "+ best-of-N",
    "reno": "+ ReNO",
    "prompt-optimisation": "+ prompt optimisation",
}
LOSS_LABELS = {"l2": "L2 term", "second-order": "second order", "arnoldi": "Arnoldi", "exact": "exact"}


def write_page(folder: Path, document: Document) -> None:
    """Write report.html, the CSV tables and the plots of a finished comparison."""
    plots = draw_plots(document, load_file(folder / "parts" / "grid.safetensors"))
    pictures = {}
    for plot in plots:
        pictures[plot.name] = Picture(plot.png(), plot.caption)
        atomic_write(folder / f"{plot.name}.png", pictures[plot.name].png)
    tables = {title: table for title, table in all_tables(document).items() if table.rows}
    for title, table in tables.items():
        atomic_write(folder / f"{title}.csv", to_csv(table))
    write_html(folder / "report.html", document["title"], _sections(document, tables, pictures), lead=lead(document))


def lead(document: Document) -> str:
    """What came out, in two sentences, as it is."""
    rows = {row["method"]: row for row in document["table_1"]}
    if "hypernoise" not in rows:
        return ""
    row = rows["hypernoise"]
    score = _main_score(document)
    gain = row["gain"][score]
    sentence = (
        f"On {row['prompts']} held-out prompts at one step the hypernetwork moves the {_label(score)} from "
        f"{format_number(rows['base']['scores'][score]['value'], 3)} to "
        f"{format_number(row['scores'][score]['value'], 3)} (paired gain "
        f"{format_estimate(gain['value'], gain['stderr'])})."
        if "base" in rows
        else ""
    )
    if document["l2"]:
        figures = document["l2"][0]
        share = figures["relative_error"]
        sentence += (
            f" Its L2 term is {format_estimate(figures['l2'], figures['l2_stderr'])} nats and the KL integrand "
            f"{format_estimate(figures['kl'], figures['kl_stderr'])} nats ({figures['method']}): the L2 term is "
            f"{100 * abs(share):.0f} % {'below' if share < 0 else 'above'} what it stands for."
            if share is not None
            else ""
        )
    return sentence


def all_tables(document: Document) -> dict[str, Table]:
    """Every table, by the name of its CSV file."""
    return {
        "table-1": _methods_table(document, document["table_1"]),
        "scores": _scores_table(document),
        "steps": _steps_table(document),
        "diversity": _diversity_table(document),
        "ranks": _ranks_table(document),
        "losses": _losses_table(document),
        "l2": _closeness_table(document),
        "frontier": _frontier_table(document),
    }


def to_csv(table: Table) -> str:
    """A table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.headers)
    writer.writerows(table.rows)
    return buffer.getvalue()


def _main_score(document: Document) -> str:
    """The score a table is read by: the independent judge where there is one, else the trained reward."""
    return "judge" if "judge" in document["table_1"][0]["scores"] else "reward"


def _label(score: str) -> str:
    return {"judge": "judge's mean", "reward": "trained reward"}.get(score, score)


def _figure(figure: Mapping[str, float | None]) -> str:
    value, stderr = figure["value"], figure["stderr"]
    assert value is not None
    return format_estimate(value, float("nan") if stderr is None else stderr)


def _methods_table(document: Document, rows: Sequence[Row]) -> Table:
    score = _main_score(document)
    categories = list(rows[0].get("categories", {}))
    body: list[tuple[Cell, ...]] = []
    for row in rows:
        evaluations = row["generator_evaluations_per_image"] + row["hypernetwork_evaluations_per_image"]
        body.append(
            (
                _NAMES.get(row["method"], row["method"]),
                _figure(row["scores"][score]),
                _figure(row["gain"][score]),
                *(format_number(row["categories"][name]["value"], 2) for name in categories),
                row["seconds_per_image"],
                evaluations,
            )
        )
    caption = (
        f"{rows[0]['prompts']} held-out prompts, {rows[0]['images']} images a method, one step, the same noise for "
        "every method. ± is one standard error over prompts; gain is paired with the base. NFE counts forward passes "
        "of generator and hypernetwork; seconds were measured in this run, batched."
    )
    return Table(("method", _label(score), "gain", *categories, "s/image", "NFE"), tuple(body), caption)


def _scores_table(document: Document) -> Table:
    rows = document["table_1"]
    score = _main_score(document)
    others = [name for name in rows[0]["scores"] if name != score]
    body = tuple(
        (
            _NAMES.get(row["method"], row["method"]),
            *(_figure(row["scores"][name]) for name in others),
            row["gradients_per_image"],
            row["reward_evaluations_per_image"],
            row["trained_parameters"],
        )
        for row in rows
    )
    headers = ("method", *map(_label, others), "gradients", "rewards", "trained weights")
    caption = "The other scores of the same images, and gradients and reward evaluations spent per image."
    return Table(headers, body, caption)


def _steps_table(document: Document) -> Table:
    score = _main_score(document)
    methods = list(dict.fromkeys(row["method"] for row in document["steps"]))
    counts = list(dict.fromkeys(row["steps"] for row in document["steps"]))
    found = {(row["method"], row["steps"]): row for row in document["steps"]}
    body = tuple(
        (_NAMES.get(name, name), *(_figure(found[name, count]["scores"][score]) for count in counts))
        for name in methods
    )
    headers = ("method", *(f"{count} step{'s' if count > 1 else ''}" for count in counts))
    return Table(
        headers, body, f"{_label(score).capitalize()} by sampler steps; the networks were trained at one step."
    )


def _diversity_table(document: Document) -> Table:
    rows = document["diversity"]
    metrics = list(rows[0]["metrics"]) if rows else []
    body = tuple(
        (
            _network_label(row["method"]),
            *(
                text
                for metric in metrics
                for text in (
                    _figure(row["metrics"][metric]),
                    format_estimate(row["metrics"][metric]["change"], _nan(row["metrics"][metric]["change_stderr"])),
                )
            ),
        )
        for row in rows
    )
    headers = ("method", *(text for metric in metrics for text in (metric.replace("_", " "), "change")))
    caption = (
        f"{rows[0]['prompts']} prompts, {rows[0]['seeds']} noises each, over all pairs of images of a prompt; "
        "± is over prompts."
        if rows
        else ""
    )
    return Table(headers, body, caption)


def _ranks_table(document: Document) -> Table:
    score = _main_score(document)
    body = []
    for row in document["ranks"]:
        kind, _, rank = row["method"].partition("-rank")
        body.append(
            (
                _NAMES.get(kind, kind),
                int(rank),
                _figure(row["scores"][score]),
                _figure(row["gain"][score]),
                row["trained_parameters"],
            )
        )
    return Table(
        ("method", "LoRA rank", _label(score), "gain", "trained weights"),
        tuple(body),
        "Trained here, alike but for the rank.",
    )


def _losses_table(document: Document) -> Table:
    score = _main_score(document)
    body = []
    for row in document["losses"]:
        last = row["along_training"][-1]
        body.append(
            (
                LOSS_LABELS[row["method"].removeprefix("kl-")],
                _figure(row["scores"][score]),
                _figure(row["scores"]["reward"]),
                format_estimate(last["kl"], _nan(last["kl_stderr"])),
                format_estimate(last["l2"], _nan(last["l2_stderr"])),
                "–" if last["relative_error"] is None else f"{100 * last['relative_error']:+.0f} %",
                last["symmetry_index"],
                last["local_norm"]["max"],
            )
        )
    headers = (
        "loss",
        _label(score),
        "reward",
        "KL, nats",
        "L2 term, nats",
        "L2 off by",
        "symmetry index",
        "largest local norm",
    )
    caption = (
        "Each trained here, alike but for what stands for the KL in the loss; KL and L2 term at the end, the largest "
        "norm is of the samples."
    )
    return Table(headers, tuple(body), caption)


def _closeness_table(document: Document) -> Table:
    body = []
    for figures in document["l2"]:
        body.append(
            (
                figures["method"],
                figures["samples"],
                format_estimate(figures["kl"], _nan(figures["kl_stderr"]), figures["bias_bound"]),
                format_estimate(figures["l2"], _nan(figures["l2_stderr"])),
                format_estimate(figures["error"], _nan(figures["error_stderr"])),
                "–" if figures["relative_error"] is None else f"{100 * figures['relative_error']:+.1f} %",
                figures["symmetry_index"],
                figures["local_norm"]["0.5"],
                figures["local_norm"]["max"],
                figures["num_vjp"] + figures["num_jvp"],
            )
        )
    headers = (
        "method",
        "samples",
        "KL, nats",
        "L2 term",
        "E(J)",
        "L2 off by",
        "symmetry",
        "median norm",
        "largest",
        "products",
    )
    injective = document["l2"][0]["injective"] if document["l2"] else ""
    caption = (
        ""
        if not document["l2"]
        else (
            "The trained hypernetwork on the same noises and prompts by each method. "
            + (
                "x + f(x) is certified injective: this is the KL."
                if injective == "certified"
                else "No certificate of injectivity exists for attention: the figure is the change-of-variables value, "
                "a lower bound of the KL."
            )
        )
    )
    return Table(headers, tuple(body), caption)


def _frontier_table(document: Document) -> Table:
    """Nats, gain in the trained reward, and efficiency of every method; empty where there is no frontier."""
    found = document.get("frontier") or {"methods": {}}
    body = []
    for name, method in found["methods"].items():
        known = method["nats"] is not None
        body.append(
            (
                _network_label(name),
                f"{method['nats']:.3g}" if known else f"at least {method['nats_lower_bound']:.3g}",
                format_estimate(method["gain"], _nan(method["stderr"])),
                "–" if method["efficiency"] is None else f"{100 * method['efficiency']:.0f} %",
            )
        )
    caption = (
        "Gain in the trained reward, which the methods maximise. Efficiency is the gain as a share of the most that "
        "any law of so many nats can gain, estimated from rewards of base images alone. Nats of best-of-N are an upper "
        "bound, nats of networks the KL integrand, and 'at least' is a 95% bound by the rewards alone."
    )
    return Table(("method", "nats", "gain in reward", "efficiency"), tuple(body), caption)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _network_label(name: str) -> str:
    if name.startswith("kl-"):
        return f"trained with {LOSS_LABELS[name.removeprefix('kl-')]}"
    return _NAMES.get(name, name)


def _sections(document: Document, tables: Mapping[str, Table], pictures: Mapping[str, Picture]) -> list[Section]:
    titles = (
        ("Reward per nat: what was bought, and what could have been", ("frontier",), ("frontier",)),
        ("Table 1: what a noise hypernetwork buys", ("table-1", "scores"), ("grid", "gain-against-cost")),
        ("Tables 2 and 8: more sampler steps", ("steps",), ()),
        ("Figure 4: reward against independent quality", (), ("reward-against-quality",)),
        ("Table 7: diversity", ("diversity",), ()),
        ("Tables 9 and 10: LoRA rank", ("ranks",), ()),
        ("How close the L2 term stays", ("l2",), ()),
        ("What each loss learns", ("losses",), ("kl-along-training",)),
    )
    sections = []
    for title, wanted, names in titles:
        blocks: list[Any] = [tables[table] for table in wanted if table in tables]
        blocks += [pictures[name] for name in names if name in pictures]
        if blocks:
            sections.append(Section(title, tuple(blocks)))
        elif document["settings"]["quick"]:
            sections.append(
                Section(title, (Text("Not part of the quick setting: run hnkit compare without --quick."),))
            )
    settings = document["settings"]
    command = f"hnkit compare --backend {settings['backend']}{' --quick' if settings['quick'] else ''}"
    how = f"Reproduce: {command}, seed {settings['plan']['seed']}; every setting is in plan.json and report.json."
    return [*sections, Section("How this was made", (Text(how),))]


# --- plots -----------------------------------------------------------------------------------------------------


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
                    _NAMES.get(name, name).replace(" optimisation", "\noptimisation"),
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

    score = _main_score(document)
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
            color=_COLOURS.get(row["method"], INK),
            linestyle="none",
        )
        axes.annotate(
            _NAMES.get(row["method"], row["method"]),
            (row["seconds_per_image"], figures["value"]),
            xytext=(8, 6),
            textcoords="offset points",
            fontsize=9,
            path_effects=[withStroke(linewidth=3, foreground="white")],
            zorder=5,
        )
    axes.set(
        xscale="log", xlabel="seconds per image", ylabel=_label(score), title="What an image costs, and what it gets"
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
            axis.plot(rewards, values, marker="o", markersize=4, color=_COLOURS[name], label=_NAMES[name])
            axis.plot(rewards[:1], values[:1], marker="s", markersize=8, color=GREY, linestyle="none")
        axis.set(
            xlabel="trained reward", ylabel=score, title=f"{score} ({series[names[0]][0]['scores'][score]['role']})"
        )
    axes[0].legend(loc="best")
    return figure


def _frontier(found: Row) -> Figure:
    drawn = {name: _network_label(name) for name in found["methods"] if not name.startswith("best-of-")}
    return draw_frontier(found, drawn, "Reward per nat")


def _losses(document: Document) -> Figure:
    figure, (axes,) = new_figure(8.0, 4.4)
    colours = {"kl-l2": BLUE, "kl-second-order": ORANGE, "kl-arnoldi": GREEN, "kl-exact": VERMILION}
    for row in document["losses"]:
        points = row["along_training"]
        at = [point["step"] for point in points]
        label = LOSS_LABELS[row["method"].removeprefix("kl-")]
        kl = [point["kl"] for point in points]
        errors = [_nan(point["kl_stderr"]) for point in points]
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
