"""Types, accuracy, edges: docs/numerics.md is what happens. Seeds: two processes agree; threads: to rounding."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hnkit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def numerics():
    spec = importlib.util.spec_from_file_location("numerics", ROOT / "docs" / "numerics.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["numerics"] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["numerics"]


@pytest.fixture(scope="module")
def rows(numerics):
    return numerics.rows()


def test_the_page_is_not_stale(numerics, rows, monkeypatch):
    monkeypatch.setattr(numerics, "rows", lambda: rows)
    assert numerics.stale() == []


def test_a_stale_page_is_noticed(numerics, rows, monkeypatch, tmp_path):
    monkeypatch.setattr(numerics, "rows", lambda: rows)
    text = numerics.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(numerics, "PAGE", tmp_path / "numerics.md")
    for old, new in (
        (" float32, ", " float64, "),  # another type
        ("| inf |", "| nan |"),  # another outcome
        ("| function |", "| `gone` | x | f, 0 | f, 0 | f, 0 |\n| function |"),  # a function that is no more
        ("| `dense_jacobian` |", "| `renamed` |"),
        ("e-8 |", "e-11 |"),  # an error that has grown
    ):
        assert old in text
        numerics.PAGE.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert numerics.stale(), new


def test_every_public_function_is_in_the_table(numerics, rows):
    named = {row.function.partition(".")[0] for row in rows}
    assert set(numerics.public_functions()) <= named
    assert {"RowJacobian", "NoiseLoss"} <= named
    assert len(numerics.public_functions()) >= 13


LIMITS = {"float64": 1e-13, "float32": 2e-6, "bfloat16": 2e-2}
"""Largest relative error of any function, by the type of its input: a few roundings of that type."""


def test_accuracy_in_every_type(rows):
    for row in rows:
        assert row.error <= LIMITS[row.dtype], row


def test_nothing_comes_out_below_float32(rows):
    assert {row.out for row in rows} <= {"float64", "float32", "float", "str"}


def test_edges(numerics):
    found = {edge.call: (edge.outcome, numerics.outcome(edge.run)) for edge in numerics.edges()}
    assert {call: pair for call, pair in found.items() if pair[0] != pair[1]} == {}
    assert len(found) >= 40


# --- the same at every scale and size ---------------------------------------------------------------------------

exponents = st.integers(-300, 307)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(exponent=exponents, sign=st.sampled_from([-1.0, 1.0]), dim=st.integers(1, 3))
def test_log_det_error_at_every_magnitude(exponent, sign, dim):
    """`E(a I) = d (a - log|1 + a|)` against mpmath: small ones keep their digits, large ones never give nan."""
    a = sign * 10.0**exponent
    found = float(hnkit.log_det_error(a * torch.eye(dim, dtype=torch.float64)))
    if a == -1:
        assert found == math.inf
        return
    with mpmath.workdps(700):
        expected = float(dim * (mpmath.mpf(a) - mpmath.log(abs(1 + mpmath.mpf(a)))))
    assert math.isclose(found, expected, rel_tol=1e-13, abs_tol=1e-320)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lipschitz=st.floats(0, 1, exclude_max=True), dim=st.integers(1, 10**6))
def test_bounds_over_the_whole_domain(lipschitz, dim):
    """Finite, non-negative and ordered for every constant below 1, denormal ones too."""
    bound = hnkit.theorem7_bound(dim, lipschitz)
    assert 0 <= bound < math.inf
    norm = lipschitz * math.sqrt(dim)
    frobenius = hnkit.frobenius_bound(norm, lipschitz)
    remainder = hnkit.second_order_remainder_bound(norm, lipschitz)
    assert 0 <= remainder <= frobenius
    assert math.isclose(bound, frobenius, rel_tol=1e-14, abs_tol=1e-317 * dim)


@pytest.mark.parametrize("dim", [1, 2, 3, 17])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["exact", "l2", "arnoldi", "lanczos", "power", "roulette", "second-order"])
def test_small_dimensions_and_single_samples(dim, count, method):
    """Every method works at d = 1 and n = 1, where it has no error bar to give."""
    x = torch.randn(count, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    estimate = hnkit.noise_kl(lambda x: 0.25 * torch.sin(x), x, method=method, generator=generator)
    assert math.isfinite(estimate.value)
    assert math.isnan(estimate.stderr) == (count == 1)
    assert estimate.per_sample.dtype == torch.float64
    if dim == 1 and method not in ("l2", "second-order", "roulette"):
        f, J = 0.25 * torch.sin(x), 0.25 * torch.cos(x)
        exact = (f.square() / 2 + J - torch.log1p(J)).mean()
        assert math.isclose(estimate.value, float(exact), rel_tol=1e-3)


# --- processes and threads --------------------------------------------------------------------------------------

PROGRAM = """
import json, sys, tempfile
from pathlib import Path
import torch
import hnkit
from hnkit.config import resolve_config
from hnkit.training.run import train

layers = [torch.nn.utils.skip_init(torch.nn.Linear, a, b, dtype=torch.float64) for a, b in ((96, 256), (256, 96))]
generator = torch.Generator().manual_seed(0)
for layer in layers:
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.03, generator=generator)
f = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1]).eval()
x = torch.randn(64, 96, dtype=torch.float64, generator=generator)
found = {}
for method in ("exact", "arnoldi", "lanczos", "roulette"):
    estimate = hnkit.noise_kl(f, x[:8], method=method, generator=torch.Generator().manual_seed(1))
    found[method] = estimate.per_sample.tolist()
found["norms"] = hnkit.local_lipschitz(f, x[:8], tolerance=1e-10).tolist()
loss = hnkit.NoiseLoss(kl="arnoldi", steps=12)
terms = loss(f, x, torch.sigmoid, lambda y: y.mean(1), generator=torch.Generator().manual_seed(2))
terms.total.mean().backward()
found["loss"] = terms.total.tolist()
found["gradient"] = [float(p.grad.norm()) for p in f.parameters()]
with tempfile.TemporaryDirectory() as folder:
    options = ["train.steps=4", "train.batch=64", "train.measure_samples=64", "train.kl=second-order"]
    result = train(resolve_config(backend="toy", overrides=options), out=Path(folder) / "run")
    found["report"] = [result.report["measurement"][key] for key in ("kl", "l2", "gap", "symmetry_index")]
    found["metrics"] = (Path(folder) / "run" / "metrics.jsonl").read_text()
print(json.dumps(found))
"""


def figures(threads: int, hash_seed: int) -> dict:
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
        "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def one_thread():
    return figures(1, 0)


def test_two_processes_agree_to_the_last_bit(one_thread):
    assert figures(1, 12345) == one_thread


def test_threads_change_rounding_alone(one_thread):
    """The tolerance that docs/numerics.md states, 1e-9, on every figure of the same program with two threads."""
    two = figures(2, 0)
    for name, values in one_thread.items():
        if name != "metrics":
            assert two[name] == pytest.approx(values, rel=1e-9), name
    records = [[json.loads(line) for line in run["metrics"].splitlines()] for run in (one_thread, two)]
    for one, other in zip(*records, strict=True):
        assert one.keys() == other.keys()
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-9)
