"""Means, their standard errors, and how an estimate is printed."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import hnkit
from hnkit import Estimate
from hnkit.internal.stats import rounded_down, rounded_to_error, rounded_up
from hnkit.internal.values import number_of
from hnkit.output.page import format_estimate


def test_an_estimate_of_samples() -> None:
    samples = [1.0, 4.0, 2.5, -3.0]
    found = Estimate.of(torch.tensor(samples), bias_bound=0.25)
    assert found.value == pytest.approx(statistics.fmean(samples))
    assert found.stderr == pytest.approx(statistics.stdev(samples) / 2)
    assert found.bias_bound == 0.25
    assert Estimate.of(torch.tensor(samples)).bias_bound is None
    assert hnkit.Estimate is Estimate


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [
        (7.51783, 0.0678, "7.518 ± 0.068"),
        (-12.3456, 1.5, "-12.3 ± 1.5"),
        (1234.5, 67.8, "1234 ± 68"),
        (0.25, 0.0, "exactly 0.25"),  # known, and none
        (0.0, 0.0, "0"),
        (0.25, 1e-16, "exactly 0.25"),  # rounding
        (0.25, math.nan, "0.25 ± unknown"),
        (-1e-5, 0.037, "0.000 ± 0.037"),
        (1e-9, 2e-10, "1e-9 ± 2e-10"),
        (2.5e8, 1e7, "2.5e8 ± 1e7"),
        (math.inf, math.nan, "inf ± unknown"),
    ],
)
def test_a_value_is_rounded_to_its_error(value: float, stderr: float, text: str) -> None:
    assert str(Estimate(value, stderr)) == text == rounded_to_error(value, stderr)
    if math.isfinite(value) and abs(value) > 1e-6:
        assert format_estimate(value, stderr).startswith(text.split(" ")[0])


def test_a_bound_of_the_bias_is_said() -> None:
    assert str(Estimate(7.51783, 0.0678, 0.0123)) == "7.518 ± 0.068 (bias at most 0.013)"
    assert str(Estimate(7.51783, 0.0678, 0.0)) == "7.518 ± 0.068"


def test_one_sample_does_not_know_its_error() -> None:
    found = Estimate.of(torch.tensor([2.0]))
    assert (found.value, math.isnan(found.stderr)) == (2.0, True)


def test_bounds_are_rounded_to_their_own_side() -> None:
    """The nearest number of so many digits is below half of all upper bounds, which is no bound of them."""
    generator = torch.Generator().manual_seed(0)
    for value in (10 ** (8 * torch.rand(300, generator=generator, dtype=torch.float64) - 4)).tolist():
        for digits in (2, 4, 6):
            for signed in (value, -value):
                up, down = (float(shown(signed, digits)) for shown in (rounded_up, rounded_down))
                assert down <= signed <= up
                assert up - down <= 1.01 * 10 ** (math.floor(math.log10(value)) + 1 - digits)
    assert (rounded_up(0.12341), rounded_down(0.12349), rounded_up(0.5), rounded_down(-0.5)) == (
        "0.1235", "0.1234", "0.5", "-0.5",
    )  # fmt: skip
    assert (rounded_up(0.1 + 0.2), rounded_up(0.0), rounded_up(math.inf)) == ("0.3001", "0", "inf")
    assert (rounded_up(0.003, 2), rounded_down(0.29, 2)) == ("0.003", "0.29")  # that which reads back as itself
    assert (rounded_up(1 - 1e-9, 6), rounded_up(1 - 1e-9, 6, below=1.0)) == ("1", "0.999999999")
    assert rounded_down(-1 + 1e-9, 6, above=-1.0) == "-0.999999999"
    assert rounded_up(1.00004, 4, below=1.0) == "1.001"


def test_one_thing_is_not_many() -> None:
    words = [number_of(1, "prompt"), number_of(2, "prompt"), number_of(0, "batch", "batches")]
    assert words == ["1 prompt", "2 prompts", "0 batches"]
