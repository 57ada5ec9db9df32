"""What a check is, how its verdict is reached, and the report of a run of `hnkit verify-bound`.

A check compares one measured number with what a statement says about it. Exact checks have a numerical tolerance;
statistical ones compare a mean of independent samples by Student's t-test at a level that keeps the false-alarm
rate of a whole table (at most `FAMILY` comparisons) under `FALSE_ALARM`. The checks themselves are in `map_checks`
(any map) and `toy_checks` (problems whose tilted law is known).
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hnkit.errors import InputError
from hnkit.internal.files import atomic_write, write_json
from hnkit.output.page import (
    Cell,
    Code,
    Picture,
    Section,
    Table,
    Text,
    format_estimate,
    write_html,
)
from hnkit.output.plots import Plot

if TYPE_CHECKING:
    from torch import Tensor

    from hnkit.backend import NoiseMap

Kind = Literal["exact", "statistical"]
Verdict = Literal["holds", "fails", "not applicable", "not certified"]
Relation = Literal["=", "<=", ">="]

RELATIONS: Mapping[Relation, str] = {"=": "=", "<=": "≤", ">=": "≥"}
"""How each relation is shown."""

HEADLINES = {
    "KL, exact": "KL (Stein form)",
    "L2 term": "L2 term",
    "L2 error, %": "relative error of L2",
    "Theorem 7": "Theorem 7 bound",
    "L2 gap": "gap of the L2 optimum",
}
"""The figures by which several maps are compared at a glance: heading and name."""

FALSE_ALARM = 1e-3
"""Probability that a run in which every statement is true shows a statistical *fails*, at most."""

FAMILY = 1000
"""Statistical comparisons that one run may make, at most; each is tested at level `FALSE_ALARM / FAMILY`."""


@dataclass(frozen=True)
class Check:
    """One statement, what was measured, and whether the two agree.

    Attributes:
        name: short name, unique within its group.
        statement: what is claimed, in one line.
        proof: name of the folder in `proofs/` that derives it.
        group: the toy or map it was measured on.
        measured: the measured number, `None` where the check does not apply.
        expected: the value, or the bound, that the statement gives.
        tolerance: how far beyond `expected` the measured number may lie; for a statistical check a multiple of
            the standard error.
        kind: whether `tolerance` is numerical ("exact") or a confidence radius ("statistical").
        slack: what is left before the check fails, in the units of `measured`; negative if it fails.
        verdict: "holds", "fails", "not applicable" (a hypothesis is not met) or "not certified" (it holds for the
            estimate, and no certificate exists).
        note: which hypothesis is not met, or how loose a bound is.
        relation: how `measured` is to stand to `expected`.
    """

    name: str
    statement: str
    proof: str
    group: str
    measured: float | None
    expected: float | None
    tolerance: float | None
    kind: Kind
    slack: float | None
    verdict: Verdict
    note: str = ""
    relation: Relation = "="


@dataclass(frozen=True)
class Finding:
    """What a check measured, before it is judged.

    `certified=False` says that it rests on an estimate; `kind` replaces the statement's own where the method of the
    run makes an exact quantity a sampled one.
    """

    measured: float
    expected: float
    tolerance: float
    relation: Relation = "="
    note: str = ""
    certified: bool = True
    kind: Kind | None = None

    @property
    def slack(self) -> float:
        """What is left of the tolerance: negative, or NaN, where the statement fails."""
        difference = self.measured - self.expected
        return self.tolerance - {"=": abs(difference), "<=": difference, ">=": -difference}[self.relation]


class NotApplicable(Exception):  # noqa: N818 - it is a verdict, not an error
    """Raised inside a check whose hypothesis is not met; the message names the hypothesis."""


@dataclass(frozen=True)
class Statement:
    """A check that can be run: its name, its statement, its proof, and the function that measures it."""

    name: str
    text: str
    proof: str
    kind: Kind
    measure: Callable[[Any], Finding]

    def check(self, subject: Any, group: str) -> Check:
        """Measure the statement on `subject` and judge it."""
        blank = Check(self.name, self.text, self.proof, group, None, None, None, self.kind, None, "not applicable")
        try:
            found = self.measure(subject)
        except (NotApplicable, InputError) as reason:  # InputError: the map lacks something that this check needs
            return replace(blank, note=str(reason))
        # Written so that a NaN anywhere fails.
        verdict: Verdict = "fails" if not found.slack >= 0 else "holds" if found.certified else "not certified"
        return replace(
            blank,
            measured=found.measured,
            expected=found.expected,
            tolerance=found.tolerance,
            slack=found.slack,
            verdict=verdict,
            note=found.note,
            relation=found.relation,
            kind=found.kind or self.kind,
        )


class Registry:
    """The statements that can be checked on one kind of subject, in the order of the table."""

    def __init__(self) -> None:
        self.statements: dict[str, Statement] = {}

    def add(
        self, name: str, text: str, *, proof: str, kind: Kind = "exact"
    ) -> Callable[[Callable[[Any], Finding]], Callable[[Any], Finding]]:
        """Decorator: list the function that measures a statement."""

        def register(measure: Callable[[Any], Finding]) -> Callable[[Any], Finding]:
            if name in self.statements:
                raise ValueError(f"two checks are called {name!r}")
            self.statements[name] = Statement(name, text, proof, kind, measure)
            return measure

        return register

    def run(self, subject: Any, group: str) -> tuple[Check, ...]:
        """Every check of the registry on one subject."""
        return tuple(statement.check(subject, group) for statement in self.statements.values())


def checks_by_proof() -> dict[str, list[str]]:
    """Folder in `proofs/` and the checks of `verify-bound` whose statements are derived there."""
    from hnkit.checks.maps import MAP_CHECKS
    from hnkit.checks.matrices import CERTIFIED_CHECKS
    from hnkit.checks.problems import TOY_CHECKS

    found: dict[str, list[str]] = {}
    for registry in (MAP_CHECKS, TOY_CHECKS, CERTIFIED_CHECKS):
        for name, statement in registry.statements.items():
            found.setdefault(statement.proof, []).append(name)
    return found


def mean_finding(
    samples: Tensor, expected: float, *, relation: Relation = "=", note: str = "", floor: float = 0.0
) -> Finding:
    """Compare the mean of independent samples with `expected` by a two-sided t-test.

    The radius is `t * stderr + floor`, with `t` the quantile of Student's law of `n - 1` degrees of freedom at
    level `FALSE_ALARM / FAMILY`.

    Args:
        samples: `(n,)` independent values.
        expected: what their mean should be (or be bounded by, see `relation`).
        relation: how the mean is to stand to `expected`.
        note: passed on.
        floor: numerical error of one sample, added to the radius.

    Raises:
        NotApplicable: fewer than two samples: their error is not known.
    """
    from hnkit.internal.stats import mean_and_stderr

    mean, stderr = mean_and_stderr(samples)
    return Finding(mean, expected, confidence_radius(stderr, samples.numel()) + floor, relation, note)


def confidence_radius(stderr: float, count: int) -> float:
    """Half-width `t * stderr` of the interval that a mean of `count` samples leaves with the family's level."""
    from scipy.stats import t as student

    if count < 2:
        raise NotApplicable("one sample has no standard error: use --samples 2 or more")
    return float(student.isf(FALSE_ALARM / FAMILY / 2, count - 1)) * stderr


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

    @property
    def text(self) -> str:
        """`value +- stderr (+ bias bound)`."""
        return format_estimate(self.value, self.stderr, self.bias_bound)


def _finite(value: Any) -> Any:
    """JSON knows no NaN: unknown is `null`; infinities are spelled out."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _sign(check: Check) -> str:
    return "" if check.measured is None else RELATIONS[check.relation]


def versions() -> dict[str, str]:
    """Versions of what the figures were computed with."""
    found = {"python": platform.python_version()}
    for package in ("hnkit", "torch", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a distribution"
    return found


@dataclass(frozen=True)
class Report:
    """A run of `verify-bound`: the checks, the figures, what can be said in words, and the plots.

    Attributes:
        title: what was verified.
        config: the resolved options of the run.
        checks: in the order of the table.
        figures: reported quantities.
        notes: sentences: what can and cannot be said about invertibility, and the like; `(group, sentence)`.
        plots: drawn when the report is written.
    """

    title: str
    config: Mapping[str, Any]
    checks: tuple[Check, ...]
    figures: tuple[Quantity, ...] = ()
    notes: tuple[tuple[str, str], ...] = ()
    plots: tuple[Plot, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        """No check fails."""
        return not any(check.verdict == "fails" for check in self.checks)

    @property
    def groups(self) -> tuple[str, ...]:
        """The toys or maps of the report, in order."""
        names = [check.group for check in self.checks] + [figure.group for figure in self.figures]
        return tuple(dict.fromkeys(names))

    def counts(self) -> dict[str, int]:
        """How many checks reached each verdict."""
        verdicts = ("holds", "fails", "not applicable", "not certified")
        return {verdict: sum(check.verdict == verdict for check in self.checks) for verdict in verdicts}

    def to_json(self) -> dict[str, Any]:
        """The whole report as a JSON document; unknown numbers are `null`."""
        document = {
            "title": self.title,
            "ok": self.ok,
            "counts": self.counts(),
            "config": dict(self.config),
            "checks": [asdict(check) for check in self.checks],
            "figures": [asdict(figure) for figure in self.figures],
            "notes": [{"group": group, "text": text} for group, text in self.notes],
            "plots": [plot.name + ".png" for plot in self.plots],
            "false_alarm_rate": FALSE_ALARM,
            "versions": versions(),
        }
        result: dict[str, Any] = _finite(document)
        return result

    def summary(self) -> str:
        """The verdicts in one line."""
        parts = [f"{count} {verdict}" for verdict, count in self.counts().items() if count]
        return ", ".join(parts) or "no checks"

    def sections(self, pictures: Mapping[str, bytes]) -> list[Section]:
        """The parts of the HTML page, given the drawn plots by name."""
        sections = []
        if len({check.group for check in self.checks}) > 1:
            sections.append(Section("At a glance", (self._overview(),)))
        if pictures:
            drawn = tuple(Picture(pictures[plot.name], plot.caption) for plot in self.plots)
            sections.append(Section("Plots", drawn))
        for group in self.groups:
            sections.append(Section(group, tuple(self._group_blocks(group))))
        config = json.dumps({**_finite(dict(self.config)), "versions": versions()}, indent=2, ensure_ascii=False)
        how = (
            "Slack is what is left before a check fails. Statistical tolerances are confidence radii (Student's t), "
            f"set so that a run in which every statement is true shows a false alarm with probability below "
            f"{FALSE_ALARM:g}. Not applicable: a hypothesis is not met. Not certified: it holds for the estimate, "
            "and no certificate exists."
        )
        sections.append(Section("How to read this", (Text(how), Code(config, "Resolved configuration"))))
        return sections

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
            rows.append((group, *figures, f"{verdicts.count('holds')} of {applied}", verdict))
            notes[index] = said.get(group, "")
        return Table(
            ("", *HEADLINES, "checks", "verdict"),
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
            headers = ("check", "measured", "", "expected", "tolerance", "kind", "slack", "verdict")
            rows_ = tuple(
                (c.name, c.measured, _sign(c), c.expected, c.tolerance, c.kind, c.slack, c.verdict) for c in checks
            )
            notes = {
                index: check.statement + (f"  ·  {check.note}" if check.note else "")
                for index, check in enumerate(checks)
            }
            yield Table(headers, rows_, notes=notes)

    def write(self, folder: Path) -> None:
        """Write `config.json`, `report.json`, one PNG per plot and the self-contained `report.html`.

        Args:
            folder: an existing, empty run folder.

        Raises:
            OSError: the folder is read-only or full; no file is left half-written.
        """
        pictures = {plot.name: plot.png() for plot in self.plots}
        for name, png in pictures.items():
            atomic_write(folder / f"{name}.png", png)
        write_json(folder / "config.json", _finite(dict(self.config)))
        write_json(folder / "report.json", self.to_json())
        verdict = "No check fails" if self.ok else "At least one check fails"
        write_html(folder / "report.html", self.title, self.sections(pictures), lead=f"{verdict}: {self.summary()}.")


def verify_bound(
    f: NoiseMap,
    shape: tuple[int, ...],
    *,
    samples: int | None = None,
    seed: int = 0,
    method: str | None = None,
    name: str = "map",
    certify: bool = False,
    **options: Any,
) -> Report:
    """Measure a map on base noise and check everything the theory says about it.

    Args:
        f: batch-first map `x -> delta`, rows independent, differentiable; `x` of shape `(n, *shape)`.
        shape: noise shape of one row.
        samples: how many noise samples; standard errors come from them. `None`: 256, fewer in many dimensions.
        seed: of the noise and of every probe.
        method: of `noise_kl`; `None` takes "exact" up to 1024 dimensions, "arnoldi" above.
        name: how the report calls the map.
        certify: enclose E(A) and its bounds in ball arithmetic at some points (needs python-flint).
        options: passed to `noise_kl` (`probes`, `steps`, `rel_error`, `budget`, `probe`).

    Returns:
        The report; `report.ok` is false if a check fails, `report.write(folder)` writes the run folder.

    Raises:
        InputError: bad options, or a map that returns another shape, couples rows, is not deterministic, not
            differentiable or not finite.

    Source:
        arXiv 2508.09968, Theorem 7, Lemmas 5 and 6, eqs. 53 and 55.
    """
    from hnkit.checks.runs import VerifySettings, verify_map

    return verify_map(f, tuple(shape), VerifySettings(samples, seed, method, certify, options), name=name)


__all__ = [
    "FALSE_ALARM",
    "FAMILY",
    "Check",
    "Finding",
    "NotApplicable",
    "Quantity",
    "Registry",
    "Report",
    "Statement",
    "checks_by_proof",
    "confidence_radius",
    "mean_finding",
    "verify_bound",
]
