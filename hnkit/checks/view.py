"""A verification report on the terminal."""

from __future__ import annotations

import math
import string
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hnkit.internal.stats import rounded_down, rounded_up
from hnkit.output.page import VERDICT_MARKS, format_number
from hnkit.output.terminal import Words, card_view, simple_table

if TYPE_CHECKING:
    from hnkit.checks.check import Check
    from hnkit.checks.report import Report

_LETTERS = string.ascii_uppercase


_COLOURS = {"holds": "green", "fails": "bold red", "not applicable": "dim", "not certified": "yellow"}


def report_view(report: Report, *, verbose: bool) -> Group:
    """A verification report: figures, failing checks in full, how many reached which verdict, and the card.

    Args:
        report: what was measured.
        verbose: print every check, of several toys as a table and then each in full.
    """
    parts: list[RenderableType] = [Text(report.title, style="bold"), Text("")]
    several = len(report.groups) > 1 and len({check.group for check in report.checks}) > 1
    if several:
        parts += [_legend(report), *([Text(""), _matrix(report)] if verbose else []), _overview(report)]
    for group in report.groups:
        checks = [check for check in report.checks if check.group == group]
        shown = checks if verbose else [check for check in checks if check.verdict == "fails"]
        figures = [] if several else [figure for figure in report.figures if figure.group == group]
        if not (shown or figures) or (report.by_prompt is not None and not checks):
            continue
        parts += [Text(""), Text(group, style="bold")] if several else []
        parts += [check_lines(check) for check in shown]
        if not several:
            parts += [Words(text) for owner, text in report.notes if owner == group]
        if figures:
            rows = [(figure.name, figure.text, figure.unit) for figure in figures]
            parts.append(simple_table(("figure", "value ± standard error", "unit"), rows))
    if report.by_prompt is not None:
        parts.append(simple_table(*report.by_prompt))
    if verbose:
        marks = "   ".join(f"{mark} {verdict}" for verdict, mark in VERDICT_MARKS.items())
        parts += [Text(""), Text(marks, style="dim")]
    if report.card is None:
        parts += [Text(""), Text(report.summary(), style="bold green" if report.ok else "bold red")]
    else:
        parts += [Text(""), card_view(report.card)]
    return Group(*parts)


def _legend(report: Report) -> RenderableType:
    """The letter of each group, its name, and what it is."""
    said = dict(report.notes)
    table = Table.grid(padding=(0, 2, 0, 0))
    for letter, group in zip(_LETTERS, report.groups, strict=False):
        table.add_row(Text(letter, style="bold"), Text(group), Words(said.get(group, ""), "dim"))
    return table


def _overview(report: Report) -> RenderableType:
    """The headline figures of every group, one line each, in nats."""
    from hnkit.checks.report import HEADLINES

    found = {(figure.group, figure.name): figure.text for figure in report.figures}
    rows = [
        (letter, *(found.get((group, name), "–") for name in HEADLINES.values()))
        for letter, group in zip(_LETTERS, report.groups, strict=False)
    ]
    return simple_table(("", *HEADLINES), rows)


def check_lines(check: Check) -> Group:
    """One check in full: verdict, name and statement, then the numbers, then the note."""
    head = Text(f"{VERDICT_MARKS[check.verdict]} {check.name}", style=_COLOURS[check.verdict])
    lines: list[RenderableType] = [head, Padding(Text(check.statement), (0, 0, 0, 4))]
    if check.measured is not None:
        from hnkit.checks.check import RELATIONS

        # of what is bounded by it an upper bound is rounded up and a lower one down
        roundings: dict[str, Callable[[float], str]] = {"<=": rounded_up, ">=": rounded_down}
        directed = roundings.get(check.relation)
        expected = format_number(check.expected)
        if directed is not None and check.expected is not None and math.isfinite(check.expected):
            expected = directed(check.expected)
        room = f" ± {format_number(check.tolerance, 2)}" if check.tolerance else ""
        numbers = (
            f"measured {format_number(check.measured)}, exactly"
            if check.exactly
            else f"measured {format_number(check.measured)} {RELATIONS[check.relation]} {expected}"
            f"{room} ({check.kind}), slack {format_number(check.slack, 3)}"
        )
        lines.append(Padding(Text(f"{numbers}: {check.verdict}"), (0, 0, 0, 4)))
    if check.note:
        lead = "" if check.measured is not None else f"{check.verdict}: "
        lines.append(Padding(Text(lead + check.note, style="dim"), (0, 0, 0, 4)))
    return Group(*lines)


def _matrix(report: Report) -> RenderableType:
    """Checks down, groups across, one mark each: the whole run on one screen."""
    names = list(dict.fromkeys(check.name for check in report.checks))
    verdicts = {(check.name, check.group): check.verdict for check in report.checks}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("check", no_wrap=True)
    for letter, _ in zip(_LETTERS, report.groups, strict=False):
        table.add_column(letter, justify="center")
    for name in names:
        marks = []
        for group in report.groups:
            verdict = verdicts.get((name, group))
            marks.append(Text(VERDICT_MARKS[verdict], style=_COLOURS[verdict]) if verdict else Text(""))
        table.add_row(name, *marks)
    return table
