"""The report of a comparison: HTML page, CSV tables and plots, all drawn from report.json's document."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load

from hnkit.frontier.page import card as frontier_card
from hnkit.internal.files import atomic_write, read_plain
from hnkit.internal.power import LEVEL, POWER, Components, detectable
from hnkit.internal.stats import Estimate
from hnkit.internal.values import number_of, or_nan
from hnkit.output.page import (
    Card,
    Cell,
    Code,
    Picture,
    Section,
    Table,
    Text,
    format_estimate,
    format_number,
    write_html,
)
from hnkit.output.verdict import figures_of, verdict_card, with_frontier
from hnkit.scaled.compare.frontier import frontier_table
from hnkit.scaled.compare.labels import (
    LOSS_LABELS,
    NAMES,
    Document,
    Row,
    figure_text,
    label_of,
    main_score,
    network_label,
)
from hnkit.scaled.compare.plots import draw_plots


def write_page(folder: Path, document: Document) -> None:
    """Write report.html, the CSV tables and the plots of a finished comparison."""
    plots = draw_plots(document, load(read_plain(folder / "parts" / "grid.safetensors")))
    pictures = {}
    for plot in plots:
        pictures[plot.name] = Picture(plot.png(), plot.caption, samples=plot.name == "grid")
        atomic_write(folder / f"{plot.name}.png", pictures[plot.name].png)
    tables = {title: table for title, table in all_tables(document).items() if table.rows}
    for title, table in tables.items():
        atomic_write(folder / f"{title}.csv", to_csv(table))
    write_html(
        folder / "report.html", document["title"], _sections(document, tables, pictures), lead=lead(document),
        card=card(document),
    )  # fmt: skip


def card(document: Document) -> Card:
    """The answer of a comparison: of its hypernetwork, else of the method that makes most of its nats."""
    frontier = document.get("frontier") or {"methods": {}, "frontier": []}
    if not any(row["method"] == "hypernoise" for row in document["table_1"]):
        methods = {network_label(name): method for name, method in frontier["methods"].items()}
        return frontier_card({**frontier, "methods": methods})
    gains = next(row["gain"] for row in document["table_1"] if row["method"] == "hypernoise")
    scores: dict[str, Any] = {
        key: Estimate(gains[name]["value"], or_nan(gains[name]["stderr"]))
        for key, name in (("gain", "reward"), ("judge", "judge"))
        if name in gains
    }
    known = replace(
        figures_of(document["l2"][0] if document["l2"] else None),
        dim=math.prod(document["noise_shape"]) if "noise_shape" in document else None,
        **scores,
    )
    method = frontier["methods"].get("hypernoise")
    return verdict_card(known if method is None else with_frontier(known, method, frontier["frontier"]))


def printed_table(document: Document) -> Table:
    """Table 1 as a terminal shows it: without the categories, which it is too narrow for."""
    table = _methods_table(document, document["table_1"])
    left_out = document["table_1"][0].get("categories", {})
    kept = [index for index, header in enumerate(table.headers) if header not in left_out]
    rows = tuple(tuple(row[index] for index in kept) for row in table.rows)
    return Table(tuple(table.headers[index] for index in kept), rows, table.caption)


def lead(document: Document) -> str:
    """What came out, as it is, and the advice on the L2 term, in a few sentences."""
    advice = (document["l2"][0].get("l2_verdict") or {}).get("text") if document["l2"] else None
    return " ".join(filter(None, (outcome(document), advice)))


def outcome(document: Document) -> str:
    """What came out, as it is, in a few sentences; nothing of a comparison without a hypernetwork."""
    rows = {row["method"]: row for row in document["table_1"]}
    if "hypernoise" not in rows:
        return ""
    row = rows["hypernoise"]
    score = main_score(document)
    gain = row["gain"][score]
    sentence = (
        f"On {row['prompts']} held-out prompts at one step the hypernetwork moves the {label_of(score)} from "
        f"{format_number(rows['base']['scores'][score]['value'], 3)} to "
        f"{format_number(row['scores'][score]['value'], 3)} (paired gain "
        f"{format_estimate(gain['value'], gain['stderr'])})."
        if "base" in rows
        else ""
    )
    if document["l2"]:
        figures = document["l2"][0]
        share = figures["relative_error"]
        bound = figures.get("injected")
        if bound:
            estimate = format_estimate(bound["nats"], or_nan(bound["nats_stderr"]))
            sentence += (
                f" It is deployed with injected noise: the KL of its law is at most {estimate} nats, a proved bound "
                "whose mean is estimated. Of x + f(x) alone, which is not deployed:"
            )
        sentence += (
            f" At {_noises(figures)} its L2 term is {format_estimate(figures['l2'], figures['l2_stderr'])} nats and "
            f"the KL integrand {format_estimate(figures['kl'], figures['kl_stderr'])} nats ({figures['method']}): the "
            f"L2 term is {100 * abs(share):.0f} % {'below' if share < 0 else 'above'} what it stands for."
            if share is not None
            else ""
        )
    return sentence.strip()


def _noises(figures: Mapping[str, Any]) -> str:
    """What a KL was measured at; records that do not say of how many prompts are of the first ones."""
    prompts = figures.get("prompts")
    of = "the first prompts" if prompts is None else number_of(prompts, "prompt")
    return f"{figures['samples']} noises of {of}"


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
        "frontier": frontier_table(document),
        "power": _power_table(document),
    }


def to_csv(table: Table) -> str:
    """A table as CSV."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.headers)
    writer.writerows(table.rows)
    return buffer.getvalue()


def _share(value: float | None) -> str:
    """A share of right images, to two decimals whatever it is."""
    return format_number(value) if value is None or not math.isfinite(value) else f"{value:.2f}"


def _methods_table(document: Document, rows: Sequence[Row]) -> Table:
    score = main_score(document)
    categories = list(rows[0].get("categories", {}))
    body: list[tuple[Cell, ...]] = []
    for row in rows:
        evaluations = row["generator_evaluations_per_image"] + row["hypernetwork_evaluations_per_image"]
        body.append(
            (
                NAMES.get(row["method"], row["method"]),
                figure_text(row["scores"][score]),
                "–" if row["method"] == "base" else figure_text(row["gain"][score]),
                format_number(row["seconds_per_image"], 2),
                evaluations,
                *(_share(row["categories"][name]["value"]) for name in categories),
            )
        )
    caption = (
        f"{rows[0]['prompts']} held-out prompts, {rows[0]['images']} images a method, one step, the same noise for "
        "every method. ± is one standard error over prompts; gain is paired with the base. NFE, the number of "
        "function evaluations, counts forward passes of generator and hypernetwork for an image; seconds were measured "
        "in this run, batched."
    )
    if "train_steps" in document and any(row["method"].startswith("direct") for row in rows):
        caption += f" Direct LoRA was trained here, for {document['train_steps']:,} steps."
    if categories:
        caption += f" {label_of(score).capitalize()} and its gain weigh the {len(categories)} kinds of prompt equally."
    return Table(("method", label_of(score), "gain", "s/image", "NFE", *categories), tuple(body), caption)


def _scores_table(document: Document) -> Table:
    rows = document["table_1"]
    score = main_score(document)
    others = [name for name in rows[0]["scores"] if name != score]
    body = tuple(
        (
            NAMES.get(row["method"], row["method"]),
            *(figure_text(row["scores"][name]) for name in others),
            row["gradients_per_image"],
            row["reward_evaluations_per_image"],
            row["trained_parameters"],
        )
        for row in rows
    )
    headers = ("method", *map(label_of, others), "gradients", "rewards", "trained weights")
    caption = "The other scores of the same images, and gradients and reward evaluations spent per image."
    return Table(headers, body, caption)


def _steps_table(document: Document) -> Table:
    score = main_score(document)
    methods = list(dict.fromkeys(row["method"] for row in document["steps"]))
    counts = list(dict.fromkeys(row["steps"] for row in document["steps"]))
    found = {(row["method"], row["steps"]): row for row in document["steps"]}
    body = tuple(
        (NAMES.get(name, name), *(figure_text(found[name, count]["scores"][score]) for count in counts))
        for name in methods
    )
    headers = ("method", *(f"{count} step{'s' if count > 1 else ''}" for count in counts))
    return Table(
        headers,
        body,
        f"{label_of(score).capitalize()} by sampler steps (the paper's tables 2 and 8); the networks were trained at "
        "one step.",
    )


def _diversity_table(document: Document) -> Table:
    rows = document["diversity"]
    metrics = list(rows[0]["metrics"]) if rows else []
    body = tuple(
        (
            network_label(row["method"]),
            *(
                text
                for metric in metrics
                for text in (
                    figure_text(row["metrics"][metric]),
                    format_estimate(row["metrics"][metric]["change"], or_nan(row["metrics"][metric]["change_stderr"])),
                )
            ),
        )
        for row in rows
    )
    headers = ("method", *(text for metric in metrics for text in (metric.replace("_", " "), "change")))
    caption = (
        f"{rows[0]['prompts']} prompts, {rows[0]['seeds']} noises each, over all pairs of images of a prompt (as the "
        "paper's table 7); ± is over prompts."
        if rows
        else ""
    )
    return Table(headers, body, caption)


def _ranks_table(document: Document) -> Table:
    score = main_score(document)
    body = []
    for row in document["ranks"]:
        kind, _, rank = row["method"].partition("-rank")
        body.append(
            (
                NAMES.get(kind, kind),
                int(rank),
                figure_text(row["scores"][score]),
                figure_text(row["gain"][score]),
                row["trained_parameters"],
            )
        )
    return Table(
        ("method", "LoRA rank", label_of(score), "gain", "trained weights"),
        tuple(body),
        "Trained here, alike but for the rank (the paper's tables 9 and 10).",
    )


def _losses_table(document: Document) -> Table:
    score = main_score(document)
    body = []
    for row in document["losses"]:
        last = row["along_training"][-1]
        body.append(
            (
                LOSS_LABELS[row["method"].removeprefix("kl-")],
                figure_text(row["scores"][score]),
                figure_text(row["scores"]["reward"]),
                format_estimate(last["kl"], or_nan(last["kl_stderr"])),
                format_estimate(last["l2"], or_nan(last["l2_stderr"])),
                "–" if last["relative_error"] is None else f"{100 * last['relative_error']:+.0f} %",
                last["symmetry_index"],
                last["local_norm"]["max"],
            )
        )
    headers = (
        "loss",
        label_of(score),
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
                format_estimate(figures["kl"], or_nan(figures["kl_stderr"]), figures["bias_bound"]),
                format_estimate(figures["l2"], or_nan(figures["l2_stderr"])),
                format_estimate(figures["error"], or_nan(figures["error_stderr"])),
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
            f"The trained hypernetwork at {_noises(document['l2'][0])} by each method. "
            + (
                "x + f(x) is certified injective: this is the KL."
                if injective == "certified"
                else "No certificate of injectivity exists for attention: the figure is the change-of-variables value, "
                "a lower bound of the KL."
            )
        )
    )
    return Table(headers, tuple(body), caption)


def _power_table(document: Document) -> Table:
    """Variance components of every method's difference from the base, and the smallest that this run could find."""
    score = main_score(document)
    body: list[tuple[Cell, ...]] = []
    for row in document["table_1"]:
        if score not in row.get("components", {}):
            continue
        found = Components(**row["components"][score])
        shared = [found.prompt, found.noise, found.method_prompt, found.residual]
        body.append(
            (
                NAMES.get(row["method"], row["method"]),
                *(None if value is None else math.sqrt(max(value, 0.0)) for value in shared),
                detectable(found.variance(found.seeds), found.prompts),
            )
        )
    caption = (
        f"Standard deviations of the {label_of(score)}: what a prompt and a noise do to base and method alike, which "
        "pairing takes out; what a prompt does to their difference, and a noise to that. The last column is the "
        f"smallest difference that a t-test over these prompts finds with {100 * POWER:.0f} % probability at the level "
        f"{100 * LEVEL:.0f} %; hnkit compare --resume DIR --power D says what another needs."
    )
    headers = ("method", "prompt", "noise", "method x prompt", "rest", "found with 80 %")
    return Table(headers, tuple(body), caption)


def _sections(document: Document, tables: Mapping[str, Table], pictures: Mapping[str, Picture]) -> list[Section]:
    titles = (
        ("Reward per nat", (), ("frontier",), ("frontier",)),
        ("What a noise hypernetwork buys", ("table-1",), ("gain-against-cost", "grid"), ("scores", "power")),
        ("More sampler steps", ("steps",), (), ()),
        ("Reward against quality", (), ("reward-against-quality",), ()),
        ("Diversity", ("diversity",), (), ()),
        ("LoRA rank", ("ranks",), (), ()),
        ("How close the L2 term stays", ("l2",), (), ()),
        ("What each loss learns", ("losses",), ("kl-along-training",), ()),
    )
    sections = []
    for title, wanted, names, below in titles:
        blocks: list[Any] = [tables[table] for table in wanted if table in tables]
        blocks += [pictures[name] for name in names if name in pictures]
        blocks += [tables[table] for table in below if table in tables]
        if "frontier" in below and "remark" in (document.get("frontier") or {}):
            blocks.append(Text(document["frontier"]["remark"]))
        if blocks:
            sections.append(Section(title, tuple(blocks)))
    how = [Text("Every setting is in plan.json, every figure in report.json and the CSV files beside this page.")]
    blocks = [*how, *([Code(document["command"])] if "command" in document else [])]
    return [*sections, Section("Reproduce", tuple(blocks))]
