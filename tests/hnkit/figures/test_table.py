"""The one table of figures: whatever shows the figures of a map reads from it."""

from __future__ import annotations

import pytest
import torch

from hnkit import verify_bound
from hnkit.checks.quantities import Quantity, map_quantities
from hnkit.checks.reference_maps import contraction
from hnkit.checks.report import HEADLINES
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_toys import verify_toys
from hnkit.errors import NotApplicable
from hnkit.figures import FIGURES, Figure, MeasuredMap
from hnkit.figures.table import figure
from hnkit.internal.stats import Estimate


def measured(f=None, samples=16):
    x = torch.randn(samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return MeasuredMap("map", f or contraction(3), x)


def test_a_new_figure_is_one_entry(monkeypatch):
    added = Figure(
        "largest", "largest |f|", "", "of the samples", lambda m: float(m.value.norm(dim=1).max()), "largest"
    )
    monkeypatch.setitem(FIGURES, "largest", added)
    report = verify_bound(contraction(3), (3,), samples=16)
    found = next(quantity for quantity in report.figures if quantity.name == "largest |f|")
    assert found.value > 0
    toys = verify_toys([], VerifySettings(samples=16), references=["rotation"])
    assert "largest |f|" in {quantity.name for quantity in toys.figures}


def test_a_figure_that_cannot_be_read_turns_the_report_red(monkeypatch):
    def broken(_):
        raise ValueError("planted")

    monkeypatch.setitem(FIGURES, "l2", Figure("l2", "L2 term", "nats", "", broken, "L2 term"))
    quantities, failed = map_quantities(measured())
    assert [(check.name, check.verdict, check.note) for check in failed] == [
        ("figure: L2 term", "fails", "could not be made: ValueError: planted")
    ]
    assert {"KL (Stein form)", "E(J)"} <= {quantity.name for quantity in quantities}
    assert not verify_bound(contraction(3), (3,), samples=16).ok


def test_figures_whose_hypothesis_is_not_met_are_left_out():
    steep = measured(lambda x: 1.5 * torch.tanh(x))
    names = {quantity.name for quantity in map_quantities(steep)[0]}
    assert map_quantities(steep)[1] == []
    assert not names & {"Theorem 7 bound", "Theorem 7 estimate", "local Theorem 7 bound", "Frobenius bound"}
    for key in ("theorem7_estimate", "local_theorem7_bound", "singular_value_bound"):
        with pytest.raises(NotApplicable):
            FIGURES[key].read(steep)


def test_keys_are_unique_and_percentages_are_ratios():
    with pytest.raises(ValueError, match="two figures"):
        figure("kl", "another")(lambda m: 0.0)
    ratio = FIGURES["relative_error"].read(measured())
    assert isinstance(ratio, Estimate)
    shown = next(q for q in map_quantities(measured())[0] if q.name == FIGURES["relative_error"].name)
    assert (shown.value, shown.stderr) == (100 * ratio.value, 100 * ratio.stderr)
    assert HEADLINES["KL"] == FIGURES["kl"].name


def test_a_bound_is_shown_rounded_to_its_own_side():
    """A certified constant of 0.5000049 shown as 0.5 would be none; an estimate is rounded to the nearest."""
    for name, shown in (("lipschitz_certified", "0.5001"), ("lipschitz_lower", "0.5"), ("local_norm_max", "0.5")):
        assert Quantity.of(FIGURES[name], 0.5000049, "map").text == shown
    assert Quantity.of(FIGURES["lipschitz_lower"], 0.4999999, "map").text == "0.4999"
    sides = {figure.key: figure.side for figure in FIGURES.values() if figure.side}
    assert sides == {
        "injected_certified": "upper", "injected_ceiling": "upper", "lipschitz_lower": "lower",
        "lipschitz_certified": "upper", "theorem7_bound": "upper",
    }  # fmt: skip
