"""Means, their standard errors, and how an estimate is printed."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

import hnkit
from hnkit import Estimate
from hnkit.internal.stats import rounded_to_error
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
        (0.25, 0.0, "0.25 ± 0"),  # known, and none
        (0.25, 1e-16, "0.25 ± 0"),  # rounding
        (0.25, math.nan, "0.25 ± unknown"),
        (1e-9, 2e-10, "1e-09 ± 2e-10"),
        (2.5e8, 1e7, "2.5e+08 ± 1e+07"),
        (math.inf, math.nan, "inf ± unknown"),
    ],
)
def test_a_value_is_rounded_to_its_error(value: float, stderr: float, text: str) -> None:
    assert str(Estimate(value, stderr)) == text == rounded_to_error(value, stderr)
    if math.isfinite(value) and abs(value) > 1e-6:
        assert format_estimate(value, stderr).startswith(text.split(" ")[0])


def test_a_bound_of_the_bias_is_said() -> None:
    assert str(Estimate(7.51783, 0.0678, 0.0123)) == "7.518 ± 0.068 (bias at most 0.012)"
    assert str(Estimate(7.51783, 0.0678, 0.0)) == "7.518 ± 0.068"


def test_one_sample_does_not_know_its_error() -> None:
    found = Estimate.of(torch.tensor([2.0]))
    assert (found.value, math.isnan(found.stderr)) == (2.0, True)
