"""The verdict card of a run of `verify-bound`: of one map, or of every toy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

from hnkit.checks.check import Check
from hnkit.errors import NotApplicable
from hnkit.figures.measured_map import MeasuredMap
from hnkit.figures.table import FIGURES
from hnkit.internal.stats import Estimate
from hnkit.output.page import Card, CardLine, format_number
from hnkit.output.verdict import RunFigures, verdict_card


def map_figures(measured: MeasuredMap) -> RunFigures:
    """What the card of one map rests on, read from the map as it was measured.

    Raises:
        NotApplicable: its KL cannot be estimated by the method of the run.
    """
    estimate = measured.stein
    verdict = None if measured.injection is not None else measured.l2_verdict
    try:
        local_norm: float | None = float(measured.norms.max())
    except NotApplicable:
        local_norm = None
    folds = estimate.folds
    return RunFigures(
        kl=Estimate(estimate.value, estimate.stderr, estimate.bias_bound),
        l2=Estimate.of(measured.half_square),
        relative_error=_read("relative_error", measured),
        l2_good=None if verdict is None else verdict.good,
        advice=None if verdict is None else verdict.advice,
        injective=estimate.injective,
        folds=None if folds is None else (folds.negative, folds.samples),
        local_norm=local_norm,
        lipschitz=measured.certified_constant,
        bound=None if measured.injection is None else measured.injected.nats,
        dim=measured.dim,
    )


def _read(key: str, measured: MeasuredMap) -> Estimate | None:
    reading = FIGURES[key].read(measured)
    return reading if isinstance(reading, Estimate) else None


def counted(checks: Sequence[Check]) -> CardLine:
    """How many checks reached which verdict."""
    words = (
        ("holds", "hold"),
        ("fails", "fail"),
        ("not applicable", "do not apply"),
        ("not certified", "not certified"),
    )
    verdicts = [check.verdict for check in checks]
    counts = [f"{verdicts.count(verdict)} {word}" for verdict, word in words if verdict in verdicts]
    note = "one that does not apply lacks a hypothesis, which it names; one not certified holds for the estimate"
    return CardLine("checks", ", ".join(counts) or "none", note, "bad" if "fails" in verdicts else "good")


def failing(checks: Sequence[Check]) -> int:
    """How many checks fail."""
    return sum(check.verdict == "fails" for check in checks)


def with_checks(card: Card, checks: Sequence[Check]) -> Card:
    """The card with the line of the checks before the others."""
    return Card((counted(checks), *card.lines), card.sentence)


def toys_card(maps: Sequence[MeasuredMap], checks: Sequence[Check]) -> Card:
    """The card of a run on several toys: the range of what they show, and whether hnkit can be trusted here."""
    found = {}
    for measured in maps:
        with contextlib.suppress(NotApplicable):  # a method that some map is beyond
            found[measured.name] = map_figures(measured)
    lines = [counted(checks), *(line for line in (_l2_range(found), _proofs(found), _norms(found)) if line)]
    if fails := failing(checks):
        return Card(tuple(lines), verdict_card(RunFigures(failing=fails)).sentence)
    return Card(
        tuple(lines),
        "Every statement that applies holds on this machine, so that the figures of a map of your own can be trusted: "
        "go on with hnkit verify-bound --map PKG.MOD:F --shape C,H,W.",
    )


def _l2_range(found: dict[str, RunFigures]) -> CardLine | None:
    off = {name: f.relative_error.value for name, f in found.items() if f.relative_error is not None}
    off = {name: value for name, value in off.items() if math.isfinite(value)}
    if not off:
        return None
    least, most = (choose(off, key=lambda name: off[name]) for choose in (min, max))
    text = f"from {_signed(off[least])} of the KL ({least}) to {_signed(off[most])} ({most})"
    return CardLine("L2 term off", text, "what the usual training loss takes for the KL, less the exact KL")


def _proofs(found: dict[str, RunFigures]) -> CardLine:
    proved = sum(figures.injective == "certified" for figures in found.values())
    folded = sum(figures.injective == "violated" for figures in found.values())
    text = f"certified for {proved} of {len(found)} maps, folds seen in {folded}"
    return CardLine("injective", text, "no two noises are moved to one place; then the figure called KL is the KL")


def _norms(found: dict[str, RunFigures]) -> CardLine | None:
    norms = {name: f.local_norm for name, f in found.items() if f.local_norm is not None}
    if not norms:
        return None
    most = max(norms, key=lambda name: norms[name])
    note = "the most that a map stretches a small difference between two noises"
    return CardLine("local norm", f"{format_number(norms[most], 3)} the largest seen ({most})", note)


def _signed(share: float) -> str:
    """A share in percent with its sign, which nothing has none of."""
    percent = round(100 * share)
    return f"{percent:+d} %" if percent else "0 %"
