"""What a check is, and how its verdict is reached.

A check compares one measured number with what a statement says about it. Exact checks have a numerical tolerance;
statistical ones compare a mean of independent samples by Student's t-test at a level that keeps the false-alarm
rate of a whole table (at most `FAMILY` comparisons) under `FALSE_ALARM`. The checks themselves are in `checks.maps`
(any map), `checks.problems` (problems whose tilted law is known) and `checks.matrices` (enclosures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hnkit.errors import NotApplicable as NotApplicable
from hnkit.internal.kept import Keep, not_kept

if TYPE_CHECKING:
    from torch import Tensor


Kind = Literal["exact", "statistical"]


Verdict = Literal["holds", "fails", "not applicable", "not certified"]


UNDERFLOWN = 1e-290
"""Numbers below this, in nats, may have lost digits on their way: products of them are below the range of float64."""

Relation = Literal["=", "<=", ">="]


RELATIONS: Mapping[Relation, str] = {"=": "=", "<=": "≤", ">=": "≥"}
"""How each relation is shown."""


FALSE_ALARM = 1e-3
"""Probability that a run in which every statement is true shows a statistical *fails*, at most."""


FAMILY = 1000
"""Statistical comparisons that one run may make, at most; each is tested at level `FALSE_ALARM / FAMILY`."""


_comparisons: ContextVar[int] = ContextVar("comparisons", default=0)


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
        comparisons: statistical comparisons that the check made, each at level `FALSE_ALARM / FAMILY`.
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
    comparisons: int = 0

    @property
    def exactly(self) -> bool:
        """Whether the expected value came out to the last digit, where nothing else was allowed."""
        return self.measured is not None and not self.tolerance and self.measured == self.expected


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


@dataclass(frozen=True)
class Statement:
    """A check that can be run: its name, its statement, its proof, and the function that measures it."""

    name: str
    text: str
    proof: str
    kind: Kind
    measure: Callable[[Any], Finding]

    def check(self, subject: Any, group: str) -> Check:
        """Measure the statement on `subject` and judge it.

        Only a hypothesis that is not met (`NotApplicable`, raised where it is tested) leaves the statement unjudged. A
        check that cannot be measured for any other reason *fails*: the code it rests on does.
        """
        blank = Check(self.name, self.text, self.proof, group, None, None, None, self.kind, None, "not applicable")
        made = _comparisons.get()
        try:
            found = self.measure(subject)
        except NotApplicable as reason:
            return replace(blank, note=str(reason), comparisons=_comparisons.get() - made)
        except Exception as error:  # noqa: BLE001 - whatever it is, the statement has not been shown to hold
            return replace(blank, verdict="fails", note=f"could not be measured: {one_line(error)}")
        # Written so that a NaN anywhere fails, and an infinite tolerance or figure does.
        sound = found.slack >= 0 and math.isfinite(found.measured) and math.isfinite(found.tolerance)
        verdict: Verdict = "fails" if not sound else "holds" if found.certified else "not certified"
        return replace(
            blank,
            measured=found.measured,
            expected=found.expected,
            tolerance=found.tolerance,
            slack=found.slack,
            verdict=verdict,
            note=found.note,
            relation=found.relation,
            comparisons=_comparisons.get() - made,
            kind=found.kind or self.kind,
        )


def reported(what: str, group: str, make: Callable[[], list[Any]]) -> tuple[list[Any], tuple[Check, ...]]:
    """What is reported beside the checks, such as figures or plots, and a check that fails if it cannot be made.

    Args:
        what: figures or plots, as the check is called.
        group: the toy or map.
        make: returns them; `NotApplicable` means that there are none.
    """
    try:
        return make(), ()
    except NotApplicable:
        return [], ()
    except Exception as error:  # noqa: BLE001 - a report that lacks them must not look whole
        text, note = f"the {what} can be made", f"could not be made: {one_line(error)}"
        proof = "estimates_certificates"
        return [], (Check(what, text, proof, group, None, None, None, "exact", None, "fails", note),)


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

    def run(self, subject: Any, group: str, keep: Keep = not_kept) -> tuple[Check, ...]:
        """Every check of the registry on one subject; those that `keep` knows are not made again."""
        return tuple(
            keep(f"check {statement.name}", partial(statement.check, subject, group))
            for statement in self.statements.values()
        )


def one_line(error: Exception) -> str:
    """An error as a note: its type, and the first line of what it says."""
    reason = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def worst(*values: float) -> float:
    """The largest of some numbers, or NaN if one of them is NaN: Python's own `max` may drop it."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


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
        note: what the check says beside its figures.
        floor: numerical error of one sample, added to the radius.

    Raises:
        NotApplicable: fewer than two samples: their error is not known.
    """
    from hnkit.internal.stats import mean_and_stderr

    mean, stderr = mean_and_stderr(samples)
    return Finding(mean, expected, confidence_radius(stderr, samples.numel()) + floor, relation, note)


def confidence_radius(stderr: float, count: int) -> float:
    """Half-width `t * stderr` of the interval that a mean of `count` samples leaves with the family's level.

    Every call is a comparison, and is counted as one of the `FAMILY`.

    Raises:
        NotApplicable: fewer than two samples: their error is not known.
    """
    from hnkit.internal.stats import student_quantile

    if count < 2:
        raise NotApplicable("one sample has no standard error: use --samples 2 or more")
    _comparisons.set(_comparisons.get() + 1)
    return -student_quantile(FALSE_ALARM / FAMILY / 2, count - 1) * stderr
