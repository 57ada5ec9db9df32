"""The check of the verdict on the L2 term: it holds on maps of every kind, and turns red under planted errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hnkit.checks.check import Check
from hnkit.checks.l2_term import _claimed, _roughly
from hnkit.checks.maps import MAP_CHECKS
from hnkit.checks.reference_maps import contraction, reference_maps
from hnkit.figures.measured_map import MeasuredMap
from hnkit.internal.stats import Estimate
from hnkit.kl import verdict
from hnkit.kl.verdict import L2Verdict
from tests.hnkit.checks.test_planted_errors import plant, with_fields
from tests.hnkit.functions import Linear, noise
from tests.hnkit.operator_zoo import matrix

Map = Callable[[Tensor], Tensor]

MAPS: dict[str, tuple[Map, int]] = {
    **{name: (f, dim) for name, (f, dim, _) in reference_maps().items()},
    "good": (contraction(8, 0.1), 8),
    "symmetric": (Linear(matrix("symmetric", 0.4, 24)), 24),
    "skew": (Linear(matrix("skew", 0.1, 24) + 0.2 * matrix("symmetric", 0.4, 24)), 24),
    "expansive": (Linear(matrix("gaussian", 1.5, 24)), 24),
    "overcounted": (Linear(matrix("skew", 1.5, 12) + 0.7 * matrix("symmetric", 1.0, 12)), 12),
    "constant": (lambda x: 0 * x + 2, 4),
    "nothing": (lambda x: 0 * x, 4),
}


def judged(name: str, seed: int = 0, n: int = 32) -> Check:
    f, dim = MAPS[name]
    measured = MeasuredMap(name, f, noise(n, dim, seed=seed), seed=seed)
    return MAP_CHECKS.statements["l2-verdict"].check(measured, name)


@pytest.mark.parametrize("name", MAPS)
def test_it_holds(name: str) -> None:
    """At a level of 1e-6 a comparison, none of 4 x 13 fails by chance."""
    for seed in range(4):
        check = judged(name, seed)
        assert check.verdict == "holds", check.note


def words(change: Callable[[str], str]) -> Callable[[Callable[[L2Verdict], str]], Callable[[L2Verdict], str]]:
    return lambda right: lambda self: change(right(self))


def changed(**changes: Callable[[L2Verdict], object]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda m: plant(m, verdict, "l2_verdict", with_fields(**changes))


def spoken(change: Callable[[str], str]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda m: m.setattr(L2Verdict, "__str__", words(change)(L2Verdict.__str__))


PLANTED: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "sign of the ratio": ("symmetric", changed(ratio=lambda v: Estimate(-v.ratio.value, v.ratio.stderr))),
    "the ratio halved": ("symmetric", changed(ratio=lambda v: Estimate(v.ratio.value / 2, v.ratio.stderr))),
    "sign of the share": ("symmetric", changed(missed=lambda v: -v.missed)),
    "the ratio of the share": ("symmetric", changed(missed=lambda v: v.missed / (1 - v.missed))),
    "NaN for a share": ("symmetric", changed(missed=lambda v: math.nan)),
    "sign of tr J^3": (
        "extremal",
        lambda m: plant(m, verdict, "_moments", with_fields(cube=lambda record: -record.cube)),
    ),
    "ends of the interval": ("symmetric", changed(lower=lambda v: -v.upper, upper=lambda v: -v.lower)),
    "an interval that is too small": ("extremal", changed(lower=lambda v: 0.4, upper=lambda v: 0.41)),
    "nothing beyond the third order": ("gradient-field", changed(lower=lambda v: v.missed, upper=lambda v: v.missed)),
    "tolerance left out": ("symmetric", changed(tolerance=lambda v: 1.0)),
    "misses for overcounts": ("symmetric", spoken(lambda text: text.replace("misses", "overcounts"))),
    "shares in place of percent": (
        "symmetric",
        lambda m: m.setattr(verdict, "_percent", lambda share, up=True: f"{share:.3g} %"),
    ),
    "shares in place of percent, roughly": (
        "fold",
        lambda m: m.setattr(verdict, "_percent", lambda share, up=True: f"{share:.3g} %"),
    ),
    "four fifths of the percentages": (
        "extremal",
        lambda m: m.setattr(verdict, "_percent", lambda share, up=True: f"{80 * share:.2g} %"),
    ),
    "the ratio in words": ("symmetric", spoken(lambda text: text.replace("tr(J²) is ", "tr(J²) is 9"))),
    "the ratio in the reason": (
        "symmetric",
        lambda m: m.setattr(verdict, "rounded_to_error", lambda value, error: f"{value / 100:.3g} ± {error:.2g}"),
    ),
    "advice": ("symmetric", changed(advice=lambda v: "l2")),
    "good in place of bad": ("symmetric", spoken(lambda text: "the L2 term is within 5 % of the KL (95 %): " + text)),
    "a map that vanishes": ("nothing", changed(ratio=lambda v: Estimate(0.0, 0.0))),
}


@pytest.mark.parametrize("error", PLANTED)
def test_it_fails_under_a_planted_error(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = PLANTED[error]
    wrong(monkeypatch)
    assert judged(name).verdict == "fails", error


def test_where_it_does_not_apply() -> None:
    assert "one sample" in judged("good", n=1).note
    wide = MeasuredMap("wide", lambda x: 0.1 * torch.tanh(x.roll(1, 1)), noise(16, 512))
    check = MAP_CHECKS.statements["l2-verdict"].check(wide, "wide")
    assert (check.verdict, check.note) == ("not applicable", "needs dense Jacobians of 16 samples")


def test_the_words_are_read_as_they_are_written() -> None:
    """Every form of the sentence has its interval: a form that the check cannot read would leave it without one."""
    found = verdict.l2_verdict(MAPS["symmetric"][0], noise(16, 24))
    forms = {
        "within": ({"lower": -0.02, "upper": 0.04}, (-0.04, 0.04), None),
        "misses": ({"lower": 0.41, "upper": 0.58}, (0.41, 0.58), None),
        "overcounts": ({"lower": -0.58, "upper": -0.41, "missed": -0.5}, (-0.58, -0.41), None),
        "within only": ({"lower": -0.3, "upper": 0.58}, (-0.58, 0.58), None),
        "misses about": ({"lower": -math.inf, "upper": math.inf, "missed": 0.5}, None, (0.45, 0.5)),
        "overcounts about": ({"lower": -math.inf, "upper": math.inf, "missed": -0.5}, None, (-0.5, -0.45)),
        "times": ({"lower": -math.inf, "upper": math.inf, "missed": -3.0}, None, (1 - 4.24, 1 - 3.76)),
    }
    for changes, claimed, roughly in forms.values():
        text = str(dataclasses.replace(found, **changes))
        assert _claimed(text) == pytest.approx(claimed or (-math.inf, math.inf)), text
        assert _roughly(text) == pytest.approx(roughly or (-math.inf, math.inf)), text
