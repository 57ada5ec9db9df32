"""What the document of a frontier says: sentences, a table and a plot, for every report that has one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hnkit.internal.stats import Estimate, rounded_down, rounded_up
from hnkit.internal.values import number_of, or_nan
from hnkit.output.page import Card, CardLine, Picture, Section, Table, Text, format_estimate, format_number
from hnkit.output.plots import frontier as draw
from hnkit.output.plots import style, to_png
from hnkit.output.verdict import LEAST_EFFICIENCY, figures_of, fitting_temperature, verdict_card, with_frontier

_HOW = (
    "The frontier is the most that any law can gain whose KL from the base is so many nats, on the mean over prompts "
    "(Gibbs variational principle), and its temperature that of the law that attains it. It is estimated from rewards "
    "of base images alone, and ends where too few of them carry the weight, or where their tail is too heavy "
    "for an error bar. Efficiency is a method's gain as a share of the frontier's at the same nats. Nats that are said "
    "to be 'at least' come from rewards alone (Donsker and Varadhan) and hold with 95 % probability."
)


def card(document: Mapping[str, Any]) -> Card:
    """The answer of a document: of its network where it has one, else of the method that makes most of its nats."""
    methods, points = document["methods"], document["frontier"]
    network = document.get("network")
    if network is not None:
        known = figures_of(network)
        if (at_most := network.get("kl_at_most")) is not None:
            known = replace(known, bound=Estimate(at_most, or_nan(network["kl_at_most_stderr"])))
        (method,) = methods.values()
        return verdict_card(with_frontier(known, method, points))
    ranked = sorted(methods.items(), key=lambda item: -(item[1]["efficiency"] or -math.inf))
    lines: list[CardLine] = []
    for name, method in ranked[:_SHOWN]:
        gain = format_estimate(method["gain"], or_nan(method["stderr"]))
        value = f"gain {gain} for {nats_text(method)} nats"
        if method["efficiency"] is not None:
            value += f", {share(method)} of what they buy" if _told(method) else f"; efficiency {_UNTOLD}"
        note = "" if lines else "the share is of the most that any law of so many nats can gain"
        lines.append(CardLine(name, value, note))
    if len(ranked) > _SHOWN:
        lines.append(CardLine("", f"and {len(ranked) - _SHOWN} more, in the table"))
    return Card(tuple(lines), _sentence(document, ranked))


_SHOWN = 5


def _sentence(document: Mapping[str, Any], ranked: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """What a table of rewards says, and what to do: one sentence."""
    if "remark" in document:
        return str(document["remark"])
    if not document["frontier"]:
        return "The base samples are too few for any point of the frontier: take more a prompt."
    if not ranked:
        return "There is no method beside the base: add its rows to the table."
    if told := [name for name, method in ranked if contradiction(name, method)]:
        return f"The nats of {told[0]} cannot be right: mend them before you weigh its gain."
    name, best = ranked[0]
    if best["efficiency"] is None:
        return (
            f"What {name} spends is not known, or beyond what these base samples carry, so that its gain cannot be "
            "weighed: give its nats (the column nats), or more base samples."
        )
    low = best["efficiency"] < LEAST_EFFICIENCY
    found = f"{name} gains {share(best)} of what its nats buy"
    if len(ranked) > 1:
        found = f"{name} makes the most of its nats"
    alpha = fitting_temperature(best["nats"], document["frontier"])
    fits = "" if alpha is None else f"; its nats are those of the temperature alpha = {format_number(alpha, 2)}"
    do = "there is more to have at the same price, so train longer" if low else "the gain is worth its nats"
    return f"{found}: {do}{fits}."


def sentences(document: Mapping[str, Any], *, beside_card: bool = False) -> list[str]:
    """What the figures say, a sentence each: the answer first; beside the card only what it leaves out."""
    found = [document["remark"]] if "remark" in document else []
    for name, method in document["methods"].items():
        gain = f"{_subject(name)} gains {format_estimate(method['gain'], method['stderr'])}"
        nats = nats_text(method)
        if method["efficiency"] is not None:
            bought = f", {share(method)} of what they could buy" if _told(method) else f"; its efficiency is {_UNTOLD}"
            found += [] if beside_card else [f"{gain} for {nats} nats{bought}."]
        elif method["nats"] is None:
            found.append(
                f"{gain} and spends {nats} nats (95 %). Its nats are not known, and so neither is its efficiency."
            )
        elif method["nats"] <= 0:
            found.append(f"{gain} for {nats} nats: there is no budget whose worth could be told.")
        else:
            found.append(
                f"{gain} for {nats} nats; these base samples carry the frontier from 0 to "
                f"{document['most_nats']:.3g} nats only."
            )
        if against := contradiction(name, method):
            found.append(against)
        if method.get("gap") is not None:
            found.append(gap_sentence(name, method["gap"]))
    if document.get("prompts") == 1:
        found.append(
            "One prompt only: gains have no error bar over prompts, and the distance from a target has no certificate."
        )
    if not document["frontier"] and "remark" not in document:
        found.append("The base samples are too few for any point of the frontier: take more a prompt.")
    return found


def _subject(name: str, article: str = "The") -> str:
    """A method's name in a sentence: hnkit's own are words with an article, others are kept as they were given."""
    return f"{article} {name}" if name in ("hypernetwork", "fine-tuned generator") else name


def contradiction(name: str, method: Mapping[str, Any]) -> str:
    """What says that a method has more nats than were given, by more than error bars allow; nothing where all agrees.

    Nats of which only a lower bound is known, those of a map that folds, may be contradicted too.
    """
    nats, room = method["nats"], 1.96 * (method["nats_stderr"] or 0.0)
    if nats is None:
        return ""
    if method["nats_lower_bound"] > nats + room:
        shown = rounded_down(method["nats_lower_bound"], 3)
        return f"The rewards of {name} alone show at least {shown} nats (95 %), more than its {nats_text(method)}."
    efficiency, error = method["efficiency"], method["efficiency_stderr"]
    if efficiency is not None and error is not None and efficiency - 3 * error > 1:
        return f"No law of the nats of {name} gains that much: it has more, or its base is another."
    return ""


def gap_sentence(name: str, gap: Mapping[str, Any]) -> str:
    """The certified distance from the target, and the estimate where the temperature lets there be one."""
    law, confidence = f"the law that its temperature {gap['alpha']:.3g} names", f"{100 * gap['confidence']:.0f} %"
    bound = f"{_subject(name)} is at least {rounded_down(gap['lower'], 3)} nats ({confidence}) from {law}"
    if gap["lower"] <= 0:
        bound = f"These images do not show ({confidence}) that {_subject(name, 'the')} is away from {law}"
    if gap["estimate"] is None:
        return (
            f"{bound}; how far exactly cannot be told, since {gap['effective']:.2g} base samples a prompt are "
            "effective at that temperature."
        )
    return f"{bound}; {format_estimate(gap['estimate'], or_nan(gap['stderr']))} is the estimate."


def nats_text(method: Mapping[str, Any]) -> str:
    """Nats as they are known: measured with an error bar, given, or bounded from above or below."""
    if method["nats"] is None:
        return f"at least {rounded_down(method['nats_lower_bound'], 3)}"
    known = rounded_up(method["nats"], 3) if method.get("nats_at_most") else f"{method['nats']:.3g}"
    if method["nats_stderr"]:
        known = format_estimate(method["nats"], method["nats_stderr"])
    return f"at most {known}" if method.get("nats_at_most") else known


def share(method: Mapping[str, Any]) -> str:
    """The efficiency with its error bar, in percent; nothing where it is not known."""
    if method["efficiency"] is None:
        return ""
    least = "at least " if method.get("nats_at_most") else ""
    return f"{least}{format_estimate(100 * method['efficiency'], 100 * or_nan(method['efficiency_stderr']))} %"


_UNTOLD = "not known to 100 %"


def _told(method: Mapping[str, Any]) -> bool:
    """Whether the digits of an efficiency say something: of tiny nats and few prompts they do not."""
    return not (method["efficiency_stderr"] or 0.0) > 1


def _worth(method: Mapping[str, Any]) -> str:
    """The efficiency as a cell of a table."""
    return share(method) if method["efficiency"] is None or _told(method) else _UNTOLD


def table(document: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and rows: the methods, best-of-N, and some points of the frontier.

    Best-of-N is computed from the base, and says so where a method of that name has a row of its own.
    """
    rows: list[tuple[str, ...]] = [
        (name, nats_text(method), format_estimate(method["gain"], or_nan(method["stderr"])), _worth(method))
        for name, method in document["methods"].items()
    ]
    rows += [
        (
            _computed(f"best-of-{entry['n']}", document),
            f"at most {rounded_up(entry['nats'], 3)}",
            format_estimate(entry["gain"], or_nan(entry["stderr"])),
            "",
        )
        for entry in document["best_of"]
    ]
    for point in document["frontier"][::4]:
        rows.append(("frontier", f"{point['nats']:.3g}", format_estimate(point["gain"], point["stderr"]), "100 %"))
    return ("method", "nats a prompt", "gain in reward", "efficiency"), rows


def _computed(name: str, document: Mapping[str, Any]) -> str:
    """The name of a figure that is computed from base samples, told from a method's own of the same name."""
    return f"{name} of the base" if name in document["methods"] else name


def plot(document: Mapping[str, Any]) -> bytes:
    """The plot as PNG."""
    with style():
        return to_png(draw(document, {name: name for name in document["methods"]}, "Reward per nat"))


def sections(document: Mapping[str, Any], picture: bytes | None) -> list[Section]:
    """The sections of a page that is about nothing else."""
    points = [
        (
            f"{point['nats']:.4g}",
            format_estimate(point["gain"], point["stderr"]),
            format_estimate(point["alpha"], point["alpha_stderr"]),
            f"{point['effective']:.4g}",
        )
        for point in document["frontier"]
    ]
    return [
        section(document, picture),
        Section("The frontier", (Table(("nats", "gain", "temperature", "effective samples"), tuple(points)),)),
        Section("How to read this", (Text(_HOW),)),
    ]


def section(document: Mapping[str, Any], picture: bytes | None, *, say: Sequence[str] = ()) -> Section:
    """The plot and the table, with sentences above them."""
    blocks: list[Any] = [Text(text) for text in say]
    if document["methods"] or document["best_of"]:
        caption = (
            f"{number_of(document['prompts'], 'prompt')}, {number_of(document['base_samples'], 'base image')}. ± is "
            "one standard error over prompts."
        )
        headers, rows = table(document)
        blocks += [] if picture is None else [Picture(picture, "The frontier, and where each method lies under it.")]
        blocks.append(Table(headers, tuple(rows), caption))
    return Section("Reward per nat", tuple(blocks))
