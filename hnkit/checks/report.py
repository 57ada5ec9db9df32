"""The report of a run of `hnkit verify-bound`: its checks, figures, sentences and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hnkit.checks.check import (
    FALSE_ALARM,
    FAMILY,
    RELATIONS,
    Check,
)
from hnkit.checks.quantities import PROBLEM_FIGURES, Quantity
from hnkit.figures.table import FIGURES
from hnkit.internal.files import atomic_write, write_json
from hnkit.internal.versions import versions
from hnkit.output.page import (
    Card,
    Cell,
    Code,
    Picture,
    Section,
    Table,
    Text,
    write_html,
)
from hnkit.output.plots import Plot

HEADLINES = {
    figure.headline: figure.name for figure in (*FIGURES.values(), *PROBLEM_FIGURES) if figure.headline
}  # fmt: skip
"""The figures by which several maps are compared at a glance: heading and name."""


def finite_numbers(value: Any) -> Any:
    """A document for JSON, which knows no NaN: unknown is `null`; infinities are spelled out."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {str(key): finite_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_numbers(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _against(check: Check) -> tuple[Cell, Cell, Cell]:
    """The cells of the relation, of what is expected and of the tolerance."""
    if check.exactly:
        return "", "exactly", None
    return "" if check.measured is None else RELATIONS[check.relation], check.expected, check.tolerance


@dataclass(frozen=True)
class Report:
    """A run of `verify-bound`: the checks, the figures, what can be said in words, and the plots.

    Attributes:
        title: what was verified.
        config: the resolved options of the run.
        checks: the checks, in the order of the table.
        figures: reported quantities.
        notes: sentences: what can and cannot be said about invertibility, and the like; `(group, sentence)`.
        plots: drawn when the report is written.
        card: the answer, at the head of the page and at the end of the output; `None` where nothing was measured.
    """

    title: str
    config: Mapping[str, Any]
    checks: tuple[Check, ...]
    figures: tuple[Quantity, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    plots: tuple[Plot, ...] = field(default=(), repr=False)
    card: Card | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """No check fails."""
        return not any(check.verdict == "fails" for check in self.checks)

    @property
    def groups(self) -> tuple[str, ...]:
        """The toys or maps of the report, in order."""
        names = [check.group for check in self.checks] + [figure.group for figure in self.figures]
        return tuple(dict.fromkeys(names))

    @property
    def by_prompt(self) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None:
        """Headers and rows, one a prompt, of the headline figures of single prompts; `None` where none has any."""
        checked = {check.group for check in self.checks}
        own = [group for group in self.groups if group not in checked]
        found = {(figure.group, figure.name): figure.text for figure in self.figures if figure.group in own}
        if not (checked and found):
            return None
        names = {head: name for head, name in HEADLINES.items() if (own[0], name) in found}
        (main,) = checked if len(checked) == 1 else ("",)
        rows = [
            (group.removeprefix(f"{main}: "), *(found.get((group, name), "–") for name in names.values()))
            for group in own
        ]
        return ("prompt (nats)", *names), tuple(rows)

    def counts(self) -> dict[str, int]:
        """How many checks reached each verdict."""
        verdicts = ("holds", "fails", "not applicable", "not certified")
        return {verdict: sum(check.verdict == verdict for check in self.checks) for verdict in verdicts}

    @property
    def comparisons(self) -> int:
        """Statistical comparisons that the checks made."""
        return sum(check.comparisons for check in self.checks)

    @property
    def false_alarm_rate(self) -> float:
        """Probability that a statistical check fails though every statement is true, at most."""
        return FALSE_ALARM * max(1.0, self.comparisons / FAMILY)

    def to_json(self) -> dict[str, Any]:
        """The whole report as a JSON document; unknown numbers are `null`."""
        document = {
            "title": self.title,
            "ok": self.ok,
            "verdict": None if self.card is None else self.card.to_json(),
            "counts": self.counts(),
            "config": dict(self.config),
            "checks": [asdict(check) for check in self.checks],
            "figures": [asdict(figure) for figure in self.figures],
            "notes": [{"group": group, "text": text} for group, text in self.notes],
            "plots": [plot.name + ".png" for plot in self.plots],
            "comparisons": self.comparisons,
            "false_alarm_rate": self.false_alarm_rate,
            "versions": versions(),
        }
        result: dict[str, Any] = finite_numbers(document)
        return result

    def summary(self) -> str:
        """The verdicts in one line."""
        parts = [f"{count} {verdict}" for verdict, count in self.counts().items() if count]
        return ", ".join(parts) or "no checks"

    def sections(self, pictures: Mapping[str, bytes], command: str = "") -> list[Section]:
        """The parts of the HTML page, given the drawn plots by name, and the command that makes it again."""
        sections = []
        if len({check.group for check in self.checks}) > 1:
            sections.append(Section("At a glance", (self._overview(),)))
        if pictures:
            drawn = tuple(Picture(pictures[plot.name], plot.caption) for plot in self.plots)
            sections.append(Section("Plots", drawn))
        for group in self.groups:
            if self.by_prompt is None or any(check.group == group for check in self.checks):
                sections.append(Section(group, tuple(self._group_blocks(group))))
        if self.by_prompt is not None:
            sections.append(Section("Prompt by prompt", (Table(*self.by_prompt),)))
        config = json.dumps({**finite_numbers(dict(self.config)), "versions": versions()}, indent=2, ensure_ascii=False)
        how = (
            "A fold is a place where T(x) = x + f(x) turns space over, so that noises overlap; E(J) = tr J - "
            "log|det(I + J)|, of the Jacobian J of f, is what the L2 term leaves out of the KL. "
            "Slack is what is left before a check fails. Statistical tolerances are confidence radii (Student's t), "
            f"set so that a run in which every statement is true shows a false alarm with probability below "
            f"{self.false_alarm_rate:.2g} over its {self.comparisons} comparisons. Not applicable: a "
            "hypothesis is not met. Not certified: it holds for the estimate, "
            "and no certificate exists."
        )
        sections.append(Section("How to read this", (Text(how), Code(config, "Resolved configuration"))))
        return [*sections, *([Section("Reproduce", (Code(command),))] if command else [])]

    def _overview(self) -> Table:
        """The headline figures of every group, and its worst verdict."""
        found = {(figure.group, figure.name): figure.text for figure in self.figures}
        said = dict(self.notes)
        rows: list[tuple[Cell, ...]] = []
        notes: dict[int, str] = {}
        for index, group in enumerate(self.groups):
            verdicts = [check.verdict for check in self.checks if check.group == group]
            figures = [found.get((group, name), "–") for name in HEADLINES.values()]
            applied = sum(verdict != "not applicable" for verdict in verdicts)
            verdict = "fails" if "fails" in verdicts else "holds"
            rows.append((verdict, group, *figures, f"{verdicts.count('holds')} of {applied}"))
            notes[index] = said.get(group, "")
        return Table(
            ("verdict", "map", *HEADLINES, "checks"),
            tuple(rows),
            "Nats, unless said otherwise; checks: how many hold of those that apply.",
            notes,
        )

    def _group_blocks(self, group: str) -> Iterable[Text | Table]:
        for owner, text in self.notes:
            if owner == group:
                yield Text(text)
        figures = [figure for figure in self.figures if figure.group == group]
        if figures:
            rows = tuple((figure.name, figure.text, figure.unit, figure.note) for figure in figures)
            yield Table(("figure", "value ± standard error", "unit", ""), rows)
        checks = [check for check in self.checks if check.group == group]
        if checks:
            headers = ("verdict", "check", "measured", "", "expected", "tolerance", "kind", "slack")
            rows_ = tuple(
                (c.verdict, c.name, c.measured, *_against(c), c.kind, None if c.exactly else c.slack) for c in checks
            )
            notes = {
                index: check.statement + (f"  ·  {check.note}" if check.note else "")
                for index, check in enumerate(checks)
            }
            yield Table(headers, rows_, notes=notes)

    def write(self, folder: str | Path, command: str = "") -> None:
        """Write `config.json`, `report.json`, one PNG per plot and the self-contained `report.html`.

        Args:
            folder: an existing, empty run folder.
            command: the command that makes the report again; none is shown where it is empty.

        Raises:
            OSError: the folder is read-only or full; no file is left half-written.
        """
        folder = Path(folder)
        pictures = {plot.name: plot.png() for plot in self.plots}
        for name, png in pictures.items():
            atomic_write(folder / f"{name}.png", png)
        write_json(folder / "config.json", finite_numbers(dict(self.config)))
        write_json(folder / "report.json", self.to_json())
        write_html(folder / "report.html", self.title, self.sections(pictures, command), card=self.card)
