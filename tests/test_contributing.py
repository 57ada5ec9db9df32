"""The examples of CONTRIBUTING.md do what the page says: checks in one file, bounds in one entry, toys in two files."""

from __future__ import annotations

import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

from hnkit.bounds import BOUNDS
from hnkit.checks.check import Registry
from hnkit.checks.reference_maps import contraction
from hnkit.checks.settings import VerifySettings
from hnkit.checks.verify_toys import verify_toys
from hnkit.figures import MeasuredMap
from hnkit.linalg.enclosures import certify_bounds
from hnkit.testing import assert_bounds

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(heading: str) -> str:
    """The first Python block under a heading."""
    section = PAGE.split(f"## {heading}")[1].split("\n## ")[0]
    found = re.search(r"^( *)```python\n(.*?)^ *```", section, re.DOTALL | re.MULTILINE)
    assert found is not None
    return textwrap.dedent(found.group(2))


def test_the_example_of_a_check(monkeypatch):
    registry = Registry()
    monkeypatch.setattr("hnkit.checks.maps.MAP_CHECKS", registry)
    exec(compile(example("Adding a check: one file"), "check", "exec"), {})
    x = torch.randn(32, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (check,) = registry.run(MeasuredMap("map", contraction(4), x), "map")
    assert check.verdict == "holds"
    assert 0 < check.measured < 1
    (scaled,) = registry.run(MeasuredMap("scaled", lambda x: 0.3 * x, x), "scaled")
    assert scaled.measured == pytest.approx(1.0)  # attained by multiples of the identity
    (large,) = registry.run(MeasuredMap("large", lambda x: 0.3 * x, torch.randn(2, 2000).double()), "large")
    assert large.verdict == "not applicable"


def test_the_example_of_a_bound(monkeypatch):
    pytest.importorskip("flint")
    monkeypatch.setitem(BOUNDS, "rational", BOUNDS["frobenius"])  # is taken away again
    exec(compile(example("Adding a bound: its proof and one entry"), "bound", "exec"), {})
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = MeasuredMap("map", contraction(4), x).rows
    assert bool((rows.left["rational"] <= rows.right["frobenius"]).all())
    assert bool((rows.right["frobenius"] <= rows.right["rational"]).all())
    A = 0.3 * torch.eye(3, dtype=torch.float64)
    assert_bounds(A)
    record = certify_bounds(A).bounds["rational"]
    assert record.verdict == "holds"
    assert record.bound.lower == pytest.approx(0.27 / 1.4)


def test_the_example_of_a_toy(monkeypatch):
    module = types.ModuleType("shift_toy")
    monkeypatch.setitem(sys.modules, "shift_toy", module)
    exec(compile(example("Adding a toy: two files"), "toy", "exec"), vars(module))
    report = verify_toys([module.shift(), module.shift(alpha=0.5)], VerifySettings(samples=256), references=[])
    assert report.ok, [check for check in report.checks if check.verdict == "fails"]
    assert report.counts()["holds"] > 60
