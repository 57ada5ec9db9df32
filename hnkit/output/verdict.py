"""The verdict card: what a run's figures say of a hypernetwork, a line each, and one sentence on what to do.

Every command ends with it and every report begins with it. It is computed here alone, from plain figures; `page` and
`terminal` render it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hnkit.internal.files import read_plain
from hnkit.internal.folders import VERDICT_FILE
from hnkit.internal.stats import Estimate, rounded_down, rounded_up
from hnkit.internal.values import number_of, or_nan
from hnkit.output.page import CARD_MARKS, Card, CardLine, Mark, format_estimate, format_number

TOLERANCE = 0.1
"""Share of the KL that the L2 term may be off by before it matters; that of `hnkit.l2_verdict`, which says why."""
LEAST_EFFICIENCY = 1 / 3
"""Share of what its nats could buy below which a hypernetwork leaves most of what it pays for on the table."""
_TEMPERATURES = 2.0
"""Factor between two temperatures from which it is worth naming the other."""
_EXACT_UP_TO = 512
_TERMS = ("l2", "second-order", "arnoldi", "exact")
"""What `--kl` takes, each nearer to the KL than those before it."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What a run has measured of one map, as far as it has; `None` for what it has not. Nats unless said otherwise.

    Attributes:
        kl: mean of the KL integrand: the KL where `x + f(x)` is injective, else a lower bound of it.
        l2: mean of `|f|^2 / 2`.
        relative_error: `(L2 - KL) / KL`, no unit.
        l2_good: whether `hnkit.l2_verdict` shows the L2 term to be within its tolerance of the KL.
        advice: the term that it advises, as `--kl` names it.
        trained_with: the term of the loss that the map was trained with, as `--kl` names it.
        injective: "certified", "unknown" or "violated".
        folds: samples at which `x + f(x)` reverses orientation, and samples that were looked at.
        local_norm: largest `|J(x)|_2` of the samples.
        lipschitz: certified Lipschitz constant.
        bound: mean of the proved bound of the KL, where noise is injected.
        gap: distance of the steered law from its target, where that is known.
        gap_lower: that distance is at least so much, with a confidence.
        l2_gap: distance of the L2 loss's own optimum from the target, where that is known in closed form.
        gain: gain in mean reward over the base.
        judge: gain in the score of a judge that nothing was trained on.
        efficiency: the gain over the largest that so many nats can buy, no unit.
        efficiency_at_least: whether the nats are an upper bound, and the efficiency so an estimate from below.
        beyond_frontier: whether the nats are more than the base outputs carry the frontier to.
        alpha: temperature that the map was trained for.
        fitting_alpha: temperature whose law spends the nats that the map spends.
        failing: checks that fail.
        tuned: whether the generator itself was fine-tuned, so that no noise is moved.
        dim: dimensions of the noise.
    """

    kl: Estimate | None = None
    l2: Estimate | None = None
    relative_error: Estimate | None = None
    l2_good: bool | None = None
    advice: str | None = None
    trained_with: str | None = None
    injective: str | None = None
    folds: tuple[int, int] | None = None
    local_norm: float | None = None
    lipschitz: float | None = None
    bound: Estimate | None = None
    gap: Estimate | None = None
    gap_lower: tuple[float, float] | None = None
    l2_gap: float | None = None
    gain: Estimate | None = None
    judge: Estimate | None = None
    efficiency: Estimate | None = None
    efficiency_at_least: bool = False
    beyond_frontier: bool = False
    alpha: float | None = None
    fitting_alpha: float | None = None
    failing: int = 0
    tuned: bool = False
    dim: int | None = None

    @property
    def zero(self) -> bool:
        """Whether f was 0 wherever it was looked at."""
        return self.l2 is not None and self.l2.value == 0

    @property
    def efficient(self) -> bool | None:
        """Whether the gain is a third or more of what its nats buy; `None` where two standard errors leave it open."""
        if self.efficiency is None:
            return None
        stderr = 0.0 if math.isnan(self.efficiency.stderr) else 2 * self.efficiency.stderr
        if self.efficiency.value - stderr >= LEAST_EFFICIENCY:
            return True
        return False if self.efficiency.value + stderr < LEAST_EFFICIENCY else None

    @property
    def l2_matters(self) -> bool | None:
        """Whether what the L2 term is off by matters; `None` where that is open.

        Two standard errors and a known bias count against whatever is said; where they leave it open, or nothing was
        measured beside the L2 term, `hnkit.l2_verdict` may still know from its own bound.
        """
        off = self.relative_error
        if off is not None and math.isfinite(off.value) and self.kl is not None:
            spread = (0.0 if math.isnan(off.stderr) else 2 * off.stderr) + (self.kl.bias_bound or 0.0) / abs(
                self.kl.value
            )
            if abs(off.value) - spread > TOLERANCE and (off.value < 0 or self.injective != "violated"):
                return True
            if abs(off.value) + spread <= TOLERANCE:
                return None if self.injective == "violated" else False  # near a lower bound of the KL is no praise
            if abs(off.value) > TOLERANCE:
                return None  # two estimates that contradict each other
        return False if self.l2_good and self.injective != "violated" else None


def figures_of(measurement: Mapping[str, Any] | None, frontier: Mapping[str, Any] | None = None) -> RunFigures:
    """The figures of a measurement's record, and those of a method on a frontier.

    Args:
        measurement: what `hnkit.figures.Measurement.to_json` gives, or a part of it; `None`: nothing was measured.
        frontier: the record of one method of `hnkit.frontier.frontier_document`; `None`: there is none.
    """
    found = RunFigures()
    if measurement is not None:
        verdict: Mapping[str, Any] = measurement.get("l2_verdict") or {}
        injected = measurement.get("injected")
        folds = measurement.get("folds")
        found = RunFigures(
            kl=_estimate(measurement, "kl"),
            l2=_estimate(measurement, "l2"),
            relative_error=_estimate(measurement, "relative_error"),
            l2_good=verdict.get("good"),
            advice=verdict.get("advice"),
            injective=measurement.get("injective"),
            folds=None if folds is None else (folds["negative"], folds["samples"]),
            local_norm=measurement.get("local_norm", {}).get("max"),
            bound=None if not injected else _estimate(injected, "nats"),
            gap=_estimate(measurement, "gap"),
            alpha=measurement.get("alpha"),
        )
    return found if frontier is None else with_frontier(found, frontier)


def with_frontier(
    figures: RunFigures, method: Mapping[str, Any], points: Sequence[Mapping[str, Any]] = ()
) -> RunFigures:
    """The figures with those of a method on a frontier.

    Args:
        figures: what is known besides.
        method: the record of the method in `hnkit.frontier.frontier_document`.
        points: the points of that frontier, from which the temperature that fits the nats is read.
    """
    gap = method.get("gap")
    nats = method["nats"]
    at_most = bool(method.get("nats_at_most"))
    known: dict[str, Any] = {}
    if figures.kl is None and figures.bound is None and nats is not None:
        spent = Estimate(nats, 0.0 if method["nats_stderr"] is None else method["nats_stderr"])
        known = {"bound" if at_most else "kl": spent}
    return replace(
        figures,
        gain=_estimate({"gain": method["gain"], "gain_stderr": method["stderr"]}, "gain"),
        efficiency=_estimate(method, "efficiency"),
        efficiency_at_least=at_most,
        beyond_frontier=nats is not None and bool(points) and nats > points[-1]["nats"],
        gap_lower=None if gap is None else (gap["lower"], gap["confidence"]),
        alpha=figures.alpha if gap is None else gap["alpha"],
        fitting_alpha=None if nats is None or at_most else fitting_temperature(nats, points),
        **known,
    )


def fitting_temperature(nats: float, points: Sequence[Mapping[str, Any]]) -> float | None:
    """The temperature whose law spends `nats`, between the points of a frontier; `None` beyond them.

    Between two points `log beta` is linear in `log nats`: it is so where the tilt is small, where the nats are the
    square of beta times the variance of the reward, over two.
    """
    for one, other in pairwise(points):
        if one["nats"] <= nats <= other["nats"]:
            share = math.log(nats / one["nats"]) / math.log(other["nats"] / one["nats"])
            return float(1 / (one["beta"] * (other["beta"] / one["beta"]) ** share))
    return None


def _estimate(record: Mapping[str, Any], key: str) -> Estimate | None:
    """An estimate of a JSON record, `None` where it is not known."""
    value = record.get(key)
    if value is None:
        return None
    return Estimate(value, or_nan(record.get(f"{key}_stderr")), record.get("bias_bound") if key == "kl" else None)


# --- the card ---------------------------------------------------------------------------------------------------


def verdict_card(figures: RunFigures) -> Card:
    """The card of one map."""
    lines = [
        line
        for line in (
            _kl_line(figures), _l2_line(figures), _injective_line(figures), _norm_line(figures),
            _reward_line(figures), _target_line(figures),
        )
        if line is not None
    ]  # fmt: skip
    return Card(tuple(lines), sentence(figures))


def _kl_line(figures: RunFigures) -> CardLine | None:
    note = "how far the steered noise is from the standard normal that the generator was made for"
    if figures.bound is not None:
        return CardLine("KL, at most", f"{figures.bound} nats, proved for any f", note)
    if figures.kl is None:
        return None
    known = "" if figures.injective in ("certified", None) else ", or more where noises overlap"
    return CardLine("KL", f"{format_estimate(figures.kl.value, figures.kl.stderr)} nats{known}", note)


def _l2_line(figures: RunFigures) -> CardLine | None:
    if figures.l2 is None or figures.bound is not None:
        return None
    note = "half the mean square of f, which the usual training loss takes for the KL"
    value = f"{format_estimate(figures.l2.value, figures.l2.stderr)} nats"
    off = figures.relative_error
    if figures.zero:
        return CardLine("L2 term", f"{value}: f is 0", note)
    if off is not None and math.isfinite(off.value):
        value += f", {_off(off, 'that bound' if figures.injective == 'violated' else 'the KL')}"
    matters = figures.l2_matters
    words = {True: "this matters", False: "good enough", None: "may matter"}
    marks: dict[bool | None, Mark] = {True: "bad", False: "good", None: "open"}
    return CardLine("L2 term", f"{value}: {words[matters]}", note, marks[matters])


def _off(off: Estimate, kl: str) -> str:
    """`(L2 - KL) / KL` in words, in percent of the KL, or as a factor where it is one."""
    if off.value > 1:
        return f"{format_number(1 + off.value, 2)} times {kl}"
    size = format_estimate(100 * abs(off.value), 100 * off.stderr)
    return f"{size} % {'below' if off.value < 0 else 'above'} {kl}"


def _injective_line(figures: RunFigures) -> CardLine | None:
    if figures.injective is None or figures.bound is not None:
        return None
    note = "whether no two noises are moved to one place; a fold is a noise around which space is turned over"
    if figures.injective == "certified":
        return CardLine("injective", "certified, no folds: the KL above is the KL", note, "good")
    seen = None if figures.folds is None else f"{figures.folds[0]} of {figures.folds[1]} samples"
    if figures.injective == "violated":
        return CardLine("injective", f"no, it folds: orientation reversed at {seen or 'some samples'}", note, "bad")
    looked = ""
    if figures.folds is not None:
        looked = f"; no fold in {figures.folds[1]} samples, which is no proof"
        if figures.folds[0]:  # everywhere alike, so that no orientation was seen to change
            looked = f"; orientation reversed at {seen}"
    return CardLine("injective", f"not certified{looked}", note, "open")


def _norm_line(figures: RunFigures) -> CardLine | None:
    if figures.local_norm is None or math.isnan(figures.local_norm) or figures.bound is not None:
        return None
    note = "the most that f stretches a small difference between two noises; below 1, x + f(x) cannot fold there"
    value = f"{format_number(figures.local_norm, 3)} the largest seen"
    if figures.lipschitz is not None:
        value += f", certified at most {rounded_up(figures.lipschitz, 3)} everywhere"
    elif figures.local_norm < 1:
        value += ", below 1"
    else:
        value += ", not below 1: folds are possible"
    return CardLine("local norm", value, note, "good" if figures.local_norm < 1 else "open")


def _reward_line(figures: RunFigures) -> CardLine | None:
    if figures.gain is None:
        return None
    value = f"gain {format_estimate(figures.gain.value, figures.gain.stderr)}"
    judge = figures.judge
    if judge is not None:
        value += f" (judge {format_estimate(judge.value, judge.stderr)})"
    if figures.efficiency is None and figures.beyond_frontier:
        return CardLine("reward", f"{value}; nats beyond the frontier", f"{_BEYOND}; {_EFFICIENCY}")
    if figures.efficiency is None:
        return CardLine("reward", f"{value}; efficiency not known", _EFFICIENCY)
    if figures.efficiency.stderr > 1:  # tiny nats, few prompts: digits that say nothing
        return CardLine("reward", f"{value}; efficiency not known to 100 %", _EFFICIENCY, "open")
    share = format_estimate(100 * figures.efficiency.value, 100 * figures.efficiency.stderr)
    least = "at least " if figures.efficiency_at_least else ""
    of = " of what these nats buy" if judge is None else " efficient"
    marks: dict[bool | None, Mark] = {True: "good", False: "bad", None: "open"}
    return CardLine("reward", f"{value}, {least}{share} %{of}", _EFFICIENCY, marks[figures.efficient])


_BEYOND = "the base outputs are too few to say what so many nats can gain: take more of each prompt"
_EFFICIENCY = (
    "efficiency: the gain as a share of the most that any law of so many nats can gain (the frontier), which is "
    "estimated from rewards of base images; the judge is a score that nothing was trained on"
)


def _target_line(figures: RunFigures) -> CardLine | None:
    note = "the target is the base law tilted by exp(reward / alpha), alpha being the price of a nat in reward"
    if figures.gap is not None:
        return CardLine("target", f"{format_estimate(figures.gap.value, figures.gap.stderr)} nats away", note)
    if figures.gap_lower is not None and figures.gap_lower[0] > 0:
        bound, confidence = figures.gap_lower
        where = "" if figures.alpha is None else f", alpha = {format_number(figures.alpha, 3)}"
        away = f"at least {rounded_down(bound, 3)} nats away ({100 * confidence:.0f} % sure{where})"
        return CardLine("target", away, note)
    if figures.l2_gap is not None:
        away = f"the L2 loss's optimum is {format_number(figures.l2_gap, 3)} nats away"
        return CardLine("target", away, note, "good" if figures.l2_gap < 1e-9 else "open")
    return None


# --- the sentence -----------------------------------------------------------------------------------------------


def sentence(figures: RunFigures) -> str:
    """What the figures mean, and what to do: one sentence."""
    meaning = ", and ".join(part for part in (_worth(figures), _price(figures)) if part)
    actions = _actions(figures)
    do = ", and ".join(actions)
    return f"{meaning[0].upper()}{meaning[1:]}{': ' if do else ''}{do}."


def _measured(figures: RunFigures) -> bool:
    """Whether there is a map whose nats can be weighed."""
    nats = figures.kl is not None or figures.bound is not None
    return nats and not figures.zero and not figures.failing and not figures.tuned


def _worth(figures: RunFigures) -> str:
    """What the gain is worth, as far as it is known."""
    if not _measured(figures) or figures.gain is None:
        return ""
    judge = figures.judge
    if judge is not None and judge.value + 2 * judge.stderr < 0:
        return "the judge sees a loss, so that the reward is being exploited"
    if judge is not None and not judge.value - 2 * judge.stderr > 0:
        return "the judge sees no gain yet"
    return {True: "the gain is worth its nats", False: "most of its nats buy nothing", None: ""}[figures.efficient]


def _price(figures: RunFigures) -> str:
    """What is known of the price of the gain, the KL."""
    if figures.failing:
        fail = "1 check fails" if figures.failing == 1 else f"{figures.failing} checks fail"
        return f"{fail}, so that no figure of this run is to be trusted before it is explained"
    if figures.tuned:
        return "the generator itself was fine-tuned, so that there is no KL of the noise to weigh the gain against"
    if figures.bound is not None:
        return "the injected noise bounds the KL whatever f does, folds and large norms included"
    if figures.kl is None:
        return "the KL was not measured, so that the price of the gain is not known"
    if figures.zero:
        return "f is 0, so that the images are the base's and cost nothing"
    if figures.injective == "certified":
        return "the map is proved injective, so that the price is the KL above"
    if figures.injective == "violated":
        return "the map folds, so that the price is the KL above or more"
    if figures.injective is None:
        return "its nats are as they were given"
    if figures.local_norm is not None and figures.local_norm >= 1:
        return "norms of 1 or more leave open whether the price is more than the KL above"
    if figures.local_norm is not None and figures.local_norm < 1:
        return "nothing seen speaks against the price being the KL above"
    return "nothing proves that the price is no more than the KL above"


def _actions(figures: RunFigures) -> list[str]:
    """What to do, the most pressing first, two things at most."""
    if figures.failing:
        return ["see the checks marked ✗ (--verbose prints them all)"]
    if figures.tuned:
        return ["compare it at equal cost with hnkit compare"]
    if figures.kl is None and figures.bound is None:
        return ["measure it with hnkit verify-bound --backend NAME --adapter DIR"]
    if figures.zero:
        return ["train it"]
    unproved = figures.injective == "violated" or (
        figures.injective == "unknown" and figures.local_norm is not None and figures.local_norm >= 1
    )
    found = [_term(figures), *_more(figures)]
    if unproved and figures.bound is None:
        found.append("for a proved KL raise alpha or inject noise (train.injection)")
    return [action for action in found if action][:2]


def _term(figures: RunFigures) -> str:
    """Which term of the loss stands for the KL."""
    matters, own = figures.l2_matters, figures.trained_with
    if figures.bound is not None or (matters is None and figures.advice is None):
        return ""
    if matters is False:
        return "keep --kl l2 in the loss" if own in (None, "l2") else f"--kl l2 would do as well as --kl {own}"
    advice = figures.advice
    if matters is None and advice == "l2":
        return "measure more samples to see whether the L2 term is near enough"
    if advice in (None, "l2"):  # measured to be off by more than those samples had shown
        advice = "exact" if figures.dim is not None and figures.dim <= _EXACT_UP_TO else "arnoldi"
    if _is_as_near(own, advice):
        return f"keep --kl {own} in the loss"
    return f"train with --kl {advice}" if matters else f"to be safe train with --kl {advice}"


def _is_as_near(own: str | None, advice: str | None) -> bool:
    """Whether the term that a map was trained with is as near to the KL as the one that is advised."""
    return own in _TERMS and advice in _TERMS and _TERMS.index(own) >= _TERMS.index(advice)


def l2_words(verdict: Mapping[str, Any], trained_with: str | None) -> str:
    """What the record of an `hnkit.l2_verdict` says, without advice to take a term that the loss has, or has better.

    It stands beside the measured KL and rests on fewer samples, so that the two may differ: on how many, is said first.
    """
    text = str(verdict["text"])
    finding = text.removeprefix(f"Use --kl {verdict.get('advice')}: ")
    if finding != text and _is_as_near(trained_with, verdict["advice"]):
        text = finding
    looked = f"a quick look at {number_of(verdict['samples'], 'sample')}" if "samples" in verdict else "a quick look"
    return f"By {looked}: {text[0].lower()}{text[1:]}"


def _more(figures: RunFigures) -> list[str]:
    """What the gain, its efficiency and the temperature of its nats ask for."""
    judge, found = figures.judge, []
    if judge is not None and judge.value + 2 * judge.stderr < 0:
        found.append("lower the reward's weight or raise alpha")
    elif figures.efficient is False:
        found.append("train longer before you raise the reward's weight")
    elif figures.efficiency is not None and figures.efficient is None:
        found.append("measure more prompts to see whether it is worth its nats")
    if figures.alpha is None or figures.fitting_alpha is None:
        return found
    ratio = figures.fitting_alpha / figures.alpha
    asked, fits = format_number(figures.alpha, 2), format_number(figures.fitting_alpha, 2)
    if ratio > _TEMPERATURES and figures.efficient is not False:
        found.append(f"train longer for alpha = {asked}, or aim at {fits}, whose nats it spends")
    if ratio < 1 / _TEMPERATURES:
        found.append(f"expect the nats of alpha = {fits}, which it spends, not of {asked}")
    return found


# --- on the disk ------------------------------------------------------------------------------------------------


def read_card(folder: Path) -> Card | None:
    """The card that training left beside an adapter; `None` where there is none, or none that can be read."""
    try:
        return card_from(json.loads(read_plain(folder / VERDICT_FILE)))
    except (OSError, ValueError, RecursionError):
        return None


def card_from(document: Any) -> Card | None:
    """The card of which `document` is the `to_json`; `None` for anything else, such as what somebody has sent."""
    try:
        lines = [CardLine(*(line[key] for key in ("label", "value", "note", "mark"))) for line in document["lines"]]
        card = Card(tuple(lines), document["sentence"])
    except (LookupError, TypeError):
        return None
    texts = [card.sentence, *(text for line in lines for text in (line.label, line.value, line.note, line.mark))]
    plain = len(lines) <= _MOST and all(isinstance(text, str) and len(text) <= _LONGEST for text in texts)
    return card if plain and all(line.mark in CARD_MARKS for line in lines) else None


_LONGEST, _MOST = 600, 12
"""Characters and lines of a card that is believed to be one."""
